"""Questions of lm-eval's tasks as pairs of context and continuation, for scoring outside the harness.

That is possible for tasks of its type `multiple_choice` whose answer is one choice. Prompts, few-shot examples and
choices are the harness's own. What a task makes of answers beyond that (mutual information, own metrics) is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from intarsia.errors import UserError
from intarsia.evaluation.tasks import HarnessTask, load_harness
from intarsia.tailoring.family_file import Range

_KIND = "multiple_choice"


@dataclass(frozen=True, kw_only=True)
class HarnessQuestion:
    """Of each choice what is read and what is scored, and its characters; the right one; the task it is from."""

    pairs: tuple[tuple[str, str], ...]
    characters: tuple[int, ...]
    gold: int
    source: str = ""


def harness_questions(name: str, part: Range) -> list[HarnessQuestion]:
    """The questions of a task of lm-eval, or of all tasks of a group.

    Args:
        part: of each task's items; item i of n is in it if start * n <= i < end * n.

    Raises:
        UserError: lm-eval is not installed, there is no such task, or it is none of choices with one right answer.
    """
    (task,) = load_harness([name])
    return questions_of(task, part)


def questions_of(task: HarnessTask, part: Range) -> list[HarnessQuestion]:
    """The questions of a task that is loaded; see `harness_questions`."""
    found = [question for leaf in task.leaves for question in _of_leaf(leaf, part)]
    if not found:
        raise _refused(task.name, "an empty part of it")
    return found


def _of_leaf(leaf: Any, part: Range) -> Iterator[HarnessQuestion]:
    name = str(leaf.config.task)
    kind = str(leaf.get_config("output_type"))
    if kind != _KIND:
        raise _refused(name, f"a task of type {kind}")
    leaf.build_all_requests(limit=None, rank=0, world_size=1)
    by_item: dict[int, list[Any]] = {}
    for instance in leaf.instances:
        by_item.setdefault(instance.doc_id, []).append(instance)
    for place, item in enumerate(sorted(by_item)):
        if part[0] * len(by_item) <= place < part[1] * len(by_item):
            yield _question(leaf, name, sorted(by_item[item], key=lambda instance: instance.idx))


def _question(leaf: Any, name: str, instances: list[Any]) -> HarnessQuestion:
    document = instances[0].doc
    choices = [str(choice) for choice in leaf.doc_to_choice(document)]
    # Where choices are contexts before one ending (as in WinoGrande), the right one stands in the text's place.
    gold = leaf.doc_to_text(document) if leaf.multiple_input else leaf.doc_to_target(document)
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise _refused(name, f"a question whose answer is {gold!r}")
    # Behind the choices may stand others, without context, for mutual information.
    pairs = tuple((str(instance.args[0]), str(instance.args[1])) for instance in instances[: len(choices)])
    if not all(context.strip() and continuation.strip() for context, continuation in pairs):
        raise _refused(name, "a question that is blank")
    return HarnessQuestion(pairs=pairs, characters=tuple(map(len, choices)), gold=gold, source=name)


def _refused(name: str, found: str) -> UserError:
    return UserError.of(
        where=f"task {name}",
        expected="multiple choice with one right answer to each question",
        found=found,
        remedy="Choose such a task, or pass a local file of query, choices and gold (.jsonl); "
        "for texts that are written, use loss on a file of query and target.",
    )
