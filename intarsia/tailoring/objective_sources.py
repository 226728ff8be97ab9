"""Questions of lm-eval's tasks as pairs of context and continuation, for scoring outside the harness.

That is possible for tasks of its type `multiple_choice` whose answer is one choice. Prompts, few-shot examples and
choices are the harness's own. What a task makes of answers beyond that (mutual information, own metrics) is not used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.data.corpus import tokenize
from intarsia.data.sources import documents
from intarsia.errors import Problem, UserError
from intarsia.evaluation.likelihood import Request, encode_pairs
from intarsia.evaluation.task_file import Question, names_a_file, read_questions, read_targets
from intarsia.evaluation.tasks import Task, load_tasks
from intarsia.progress import current
from intarsia.tailoring.family_file import ObjectiveSpec, Range
from intarsia.tailoring.objective import Example, Objective, in_order

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
    (task,) = load_tasks([name])
    return questions_of(task, part)


def questions_of(task: Task, part: Range) -> list[HarnessQuestion]:
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
    # After the choices there may be others, without context, for mutual information.
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


_WHOLE: Range = (0.0, 1.0)
_MOST_READ = 2 * 1024 * 1024  # bytes of one text that are tokenised, unless more is needed
_BYTES_A_TOKEN = 32


def read_objectives(
    specs: Sequence[ObjectiveSpec],
    tokenizer: Any,
    *,
    windows: int,
    seq_len: int,
    max_length: int | None,
    seed: int,
) -> tuple[Objective, ...]:
    """The objectives, each with its examples in the order of the budgets.

    Args:
        windows: how many windows to draw of a text, at most.
        seq_len: their tokens.
        max_length: positions of the model; None where it has no limit.
        seed: decides the order, and which windows are drawn.

    Raises:
        UserError: with everything that is wrong with their sources.
    """
    problems: list[Problem] = []
    found: list[Objective] = []
    with current().task("objectives", total=len(specs)) as task:
        for spec in specs:
            task.note(spec.name)
            try:
                examples = _examples(spec, tokenizer, windows, seq_len, max_length, seed)
            except UserError as error:
                problems += error.problems
                continue
            found.append(
                Objective(
                    name=spec.name,
                    measure=spec.metric if spec.kind == "task" else spec.kind,
                    source=part_of(spec),
                    examples=in_order(examples, seed),
                )
            )
            task.advance()
    if problems:
        raise UserError(problems)
    return tuple(found)


def _examples(
    spec: ObjectiveSpec, tokenizer: Any, windows: int, seq_len: int, max_length: int | None, seed: int
) -> list[Example]:
    if spec.kind == "task" and not names_a_file(spec.source):
        return _asked(harness_questions(spec.source, spec.split), tokenizer, max_length, spec.name)
    if spec.kind == "task":
        _, questions = read_questions(part_of(spec))
        return _asked([_as_asked(question) for question in questions], tokenizer, max_length, spec.name)
    if spec.kind == "loss" and names_a_file(spec.source) and _holds_targets(spec.source):
        _, targets = read_targets(part_of(spec))
        pairs = [(target.query, target.target) for target in targets]
        requests = encode_pairs(pairs, tokenizer, max_length=max_length, where=spec.name)
        return [Example(requests=(request,)) for request in requests]
    return _windows(part_of(spec), tokenizer, windows, seq_len, seed)


def _as_asked(question: Question) -> HarnessQuestion:
    """As in `intarsia.evaluation.tasks`: a choice stands after the query and a space."""
    return HarnessQuestion(
        pairs=tuple((question.query, " " + choice) for choice in question.choices),
        characters=tuple(len(choice) for choice in question.choices),
        gold=question.gold,
    )


def _asked(questions: Sequence[HarnessQuestion], tokenizer: Any, max_length: int | None, where: str) -> list[Example]:
    pairs = [pair for question in questions for pair in question.pairs]
    requests = iter(encode_pairs(pairs, tokenizer, max_length=max_length, where=where))
    return [
        Example(
            requests=tuple(next(requests) for _ in question.pairs),
            gold=question.gold,
            characters=question.characters,
            source=question.source,
        )
        for question in questions
    ]


def _windows(spec: str, tokenizer: Any, windows: int, seq_len: int, seed: int) -> list[Example]:
    tokens = windows * seq_len
    corpus = tokenize(
        documents(spec, limit_bytes=max(_MOST_READ, _BYTES_A_TOKEN * tokens), seed=seed),
        tokenizer,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        shuffle=True,
        description=spec,
        least=1,
    )
    rows = corpus.input_ids.tolist()
    return [Example(requests=(Request(context=(row[0],), continuation=tuple(row[1:])),)) for row in rows]


def part_of(spec: ObjectiveSpec) -> str:
    """The source with its split, as files are written on the command line.

    Raises:
        UserError: the source has no parts.
    """
    if spec.split == _WHOLE:
        return spec.source
    if spec.source.startswith("hub:"):
        raise UserError.of(
            where=f"objective {spec.name}",
            expected="no split for a data set of the hub",
            found=spec.source,
            remedy="Name another split of the data set itself, such as train[:10%].",
        )
    joint = "&" if "#" in spec.source else "#"
    return f"{spec.source}{joint}{spec.split[0]:g}:{spec.split[1]:g}"


def _holds_targets(source: str) -> bool:
    """Whether the first line is a query with a target; what is wrong with a file is reported by whoever reads it."""
    path = Path(source) if Path(source).is_file() else Path(source.partition("#")[0])
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = json.loads(next((line for line in file if line.strip()), ""))
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and {"query", "target"} <= first.keys()
