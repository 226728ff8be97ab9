"""From what a family.yaml names as objectives to examples in tokens. Every mistake of every objective at once.

- `task` of a `.jsonl` file: its questions; else a task of lm-eval (`intarsia.tailoring.harness_examples`).
- `loss` of a `.jsonl` file with queries and targets: the targets, given their queries.
- `loss` or `kl` of another text: windows of `seq_len` tokens from everywhere in it, as calibration text is drawn.

A split is of a file's items, of a text's bytes, or of a task's items. The same first tokens of a window as the rest of
the project: BOS where the tokenizer puts one by itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intarsia.calibration.packing import tokenize
from intarsia.calibration.sources import documents
from intarsia.errors import Problem, UserError
from intarsia.evaluation.choices import Question
from intarsia.evaluation.requests import Request, encode_pairs
from intarsia.evaluation.task_file import names_a_file, read_questions, read_targets
from intarsia.progress import Progress
from intarsia.tailoring.examples import Example, in_order
from intarsia.tailoring.family_file import ObjectiveSpec, Range
from intarsia.tailoring.harness_examples import HarnessQuestion, harness_questions
from intarsia.tailoring.objective import Objective

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
    progress: Progress,
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
    with progress.task("objectives", total=len(specs)) as task:
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
    """As in `intarsia.evaluation.choices`: a choice stands behind the query and a space."""
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
        short_is_fine=True,
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
    """Whether the first line is a query with a target; what is wrong with a file is told by whoever reads it."""
    path = Path(source) if Path(source).is_file() else Path(source.partition("#")[0])
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = json.loads(next((line for line in file if line.strip()), ""))
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and {"query", "target"} <= first.keys()
