"""Objectives: examples to measure candidates on, in the order in which budgets use them."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from intarsia.data.corpus import Corpus, tokenize
from intarsia.data.sources import documents
from intarsia.errors import Problems, UserError
from intarsia.evaluation.likelihood import Batch, Request, batches_of, encode_pairs
from intarsia.evaluation.task_file import Question, Target, names_a_file, read_items
from intarsia.evaluation.tasks import Task, load_tasks
from intarsia.progress import current
from intarsia.tailoring.family_file import ObjectiveSpec, Range

_LENGTHS = 3  # classes of length, of equal size


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question, a query with its target, or a window of text, as tokens."""

    # One for each choice of a question, else one. A window has its first token as context.
    requests: tuple[Request, ...]
    # Index of the right choice.
    gold: int | None = None
    # Length of each choice, by which its log-likelihood is divided.
    characters: tuple[int, ...] = ()
    # Its task, if the objective has several.
    source: str = ""

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return sum(len(request.continuation) for request in self.requests)

    @property
    def length(self) -> int:
        """Number of tokens to read, if shared prefixes are read once."""
        return len(self.requests[0].context) + self.tokens


def in_order(examples: Sequence[Example], seed: int) -> tuple[Example, ...]:
    """The examples in the order of the budgets."""
    rng = random.Random(seed)
    by_length = sorted(range(len(examples)), key=lambda index: (examples[index].length, index))
    length = {index: rank * _LENGTHS // len(examples) for rank, index in enumerate(by_length)}
    strata: dict[tuple[str, int, int], list[int]] = {}
    for index, example in enumerate(examples):
        gold = -1 if example.gold is None else example.gold
        strata.setdefault((example.source, gold, length[index]), []).append(index)
    places: list[tuple[float, int]] = []
    for stratum in sorted(strata):
        members = strata[stratum]
        rng.shuffle(members)
        offset = rng.random()
        places += [((step + offset) / len(members), index) for step, index in enumerate(members)]
    return tuple(examples[index] for _, index in sorted(places))


Measure: TypeAlias = Literal["accuracy", "margin", "likelihood", "loss", "kl"]
Segment: TypeAlias = tuple[int, int]
"""Examples `first` .. `last - 1` in an objective's order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """An objective with its examples in the order of the budgets; `source` names the data."""

    name: str
    measure: Measure
    source: str
    examples: tuple[Example, ...]

    @property
    def sha256(self) -> str:
        """The hash of the examples' tokens and right answers, in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            requests = [[request.context, request.continuation] for request in example.requests]
            digest.update(json.dumps([requests, example.gold, example.characters]).encode() + b"\n")
        return digest.hexdigest()

    @property
    def asks(self) -> bool:
        """Whether its examples are questions."""
        return self.measure not in ("loss", "kl")

    def requests(self, segment: Segment) -> list[Request]:
        """The requests of a segment, in order."""
        return [request for example in self.examples[slice(*segment)] for request in example.requests]

    def batches(self, segment: Segment, *, pack: bool, batch_tokens: int) -> tuple[Batch, ...]:
        """Batches of a segment's requests, numbered from 0."""
        # Packed rows need masks; windows and targets, each in a row of its own, do not.
        return tuple(batches_of(self.requests(segment), pack=pack and self.asks, batch_tokens=batch_tokens))

    def scores(self, values_R: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The score of each of the first examples, to be minimised, from the values of their requests, in order.

        Args:
            values_R: log-likelihoods, or for `kl` divergences, summed over a request's tokens.
        """
        if not self.asks:
            return values_R if self.measure == "kl" else -values_R
        found, start = [], 0
        for example in self.examples:
            if start == len(values_R):
                break
            values = values_R[start : start + len(example.requests)] / np.array(example.characters, dtype=np.float64)
            start += len(example.requests)
            assert example.gold is not None, "a question has a right choice"
            if self.measure == "accuracy":
                found.append(float(np.argmax(values) != example.gold))
            elif self.measure == "margin":
                found.append(float(np.delete(values, example.gold).max() - values[example.gold]))
            else:
                found.append(-float(values[example.gold]))
        return np.array(found)

    def accuracy(self, values_R: npt.NDArray[np.float64]) -> tuple[float, float]:
        """The share of correctly answered questions with its standard error, whatever the metric."""
        right = 1.0 - replace(self, measure="accuracy").scores(values_R)
        return float(right.mean()), float(right.std(ddof=1) / np.sqrt(len(right))) if len(right) > 1 else 0.0

    def cost(self, scores: npt.NDArray[np.float64]) -> tuple[float, float]:
        """The cost by the scores of the first examples, and its standard error (0 for one example)."""
        n = len(scores)
        tokens = np.array([float(example.tokens) for example in self.examples[:n]])
        weights = np.ones(n) if self.asks else tokens
        mean = math.fsum(scores) / math.fsum(weights)
        if n < 2:
            return mean, 0.0
        residuals = scores - mean * weights
        return mean, math.sqrt(math.fsum(residuals**2) / (n * (n - 1))) / float(weights.mean())


def longest_row(objectives: Sequence[Objective]) -> int:
    """The longest row of a question with one of its choices, in tokens."""
    asked = [example for objective in objectives if objective.asks for example in objective.examples]
    requests = [request for example in asked for request in example.requests]
    return max((len(request.context) + len(request.continuation) for request in requests), default=0)


def segments(count: int, cuts: Sequence[int]) -> Iterator[Segment]:
    """The first `count` examples, cut at every cut among them."""
    ends = sorted({cut for cut in cuts if 0 < cut < count} | {count})
    yield from zip([0, *ends[:-1]], ends, strict=True)


def check_varied(objectives: Sequence[Objective], scores: Sequence[npt.NDArray[np.float64]]) -> None:
    """Refuse objectives that cannot distinguish models: equal examples, or the same score of the base on each.

    Raises:
        UserError: with all of them.
    """
    problems = Problems()
    for objective, found in zip(objectives, scores, strict=True):
        if len(objective.examples) > 1 and len({example.requests for example in objective.examples}) == 1:
            problems.add(
                f"Objective {objective.name} ({objective.source}) cannot distinguish models: all "
                f"{len(objective.examples)} examples are the same.",
                "Give it other data.",
            )
        elif objective.measure != "kl" and len(found) > 1 and float(np.ptp(found)) == 0.0:
            problems.add(
                f"Objective {objective.name} ({objective.source}) cannot distinguish models: the base's score is the "
                f"same for each of its {len(found)} examples.",
                "Give it other data, or for a task metric: likelihood, which varies more than accuracy.",
            )
    problems.raise_any()


@dataclass(frozen=True, kw_only=True)
class HarnessQuestion:
    """A question of lm-eval."""

    # For each choice: its context, the scored text, and its number of characters.
    pairs: tuple[tuple[str, str], ...]
    characters: tuple[int, ...]
    # Index of the right choice.
    gold: int
    # Its task.
    source: str = ""


def questions_of(task: Task, part: Range) -> list[HarnessQuestion]:
    """The questions of a task of lm-eval, or of all tasks in a group.

    Args:
        part: of each task's items; item i of n is in it if start * n <= i < end * n.

    Raises:
        UserError: it is not multiple choice with one right answer.
    """
    found: list[HarnessQuestion] = []
    for leaf in task.leaves:
        name, kind = str(leaf.config.task), str(leaf.get_config("output_type"))
        if kind != "multiple_choice":
            raise _refused(name, f"a task of type {kind}")
        leaf.build_all_requests(limit=None, rank=0, world_size=1)
        by_item: dict[int, list[Any]] = {}
        for instance in leaf.instances:
            by_item.setdefault(instance.doc_id, []).append(instance)
        n = len(by_item)
        chosen = [item for place, item in enumerate(sorted(by_item)) if part[0] * n <= place < part[1] * n]
        found += [_question(leaf, name, sorted(by_item[item], key=lambda each: each.idx)) for item in chosen]
    if not found:
        raise _refused(task.name, "without a question in this part of it")
    return found


def _question(leaf: Any, name: str, instances: list[Any]) -> HarnessQuestion:
    document = instances[0].doc
    choices = [str(choice) for choice in leaf.doc_to_choice(document)]
    # If choices are contexts before one ending (as in WinoGrande), lm-eval puts the right one in the place of the text.
    gold = leaf.doc_to_text(document) if leaf.multiple_input else leaf.doc_to_target(document)
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise _refused(name, f"one with the answer {gold!r} to a question")
    # Instances without context for mutual information may follow the choices.
    pairs = tuple((str(instance.args[0]), str(instance.args[1])) for instance in instances[: len(choices)])
    if not all(context.strip() and continuation.strip() for context, continuation in pairs):
        raise _refused(name, "one with a blank question")
    return HarnessQuestion(pairs=pairs, characters=tuple(map(len, choices)), gold=gold, source=name)


def _refused(name: str, found: str) -> UserError:
    return UserError(
        f"A search needs multiple choice with one right answer to each question; task {name} is {found}.",
        "Choose such a task, or a local .jsonl file of query, choices and gold; for generated answers, use loss on a "
        "file of query and target.",
    )


_WHOLE: Range = (0.0, 1.0)
_MOST_READ = 2 * 1024 * 1024  # bytes of a text to tokenise, unless more are needed
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
        windows: most windows to draw from a text.
        seq_len: their tokens.
        max_length: positions of the model; None for no limit.
        seed: of the order, and of the windows.

    Raises:
        UserError: with every problem of their sources.
    """
    problems, found = Problems(), list[Objective]()
    with current().task("objectives", total=len(specs)) as task:
        for spec in specs:
            task.note(spec.name)
            with problems:
                examples = in_order(_examples(spec, tokenizer, windows, seq_len, max_length, seed), seed)
                measure = spec.metric if spec.kind == "task" else spec.kind
                found.append(Objective(name=spec.name, measure=measure, source=part_of(spec), examples=examples))
            task.advance()
    problems.raise_any()
    return tuple(found)


def _examples(
    spec: ObjectiveSpec, tokenizer: Any, windows: int, seq_len: int, max_length: int | None, seed: int
) -> list[Example]:
    if spec.kind == "task":
        if names_a_file(spec.source):
            # As in `intarsia.evaluation.tasks`: a choice follows the query and a space.
            questions = [
                HarnessQuestion(
                    pairs=tuple((item.query, f" {choice}") for choice in item.choices),
                    characters=tuple(map(len, item.choices)),
                    gold=item.gold,
                )
                for item in read_items(part_of(spec), Question)[1]
            ]
        else:
            (task,) = load_tasks([spec.source])
            questions = questions_of(task, spec.split)
        pairs = [pair for question in questions for pair in question.pairs]
        requests = iter(encode_pairs(pairs, tokenizer, max_length=max_length, where=spec.name))
        return [
            Example(
                requests=tuple(islice(requests, len(question.pairs))),
                gold=question.gold,
                characters=question.characters,
                source=question.source,
            )
            for question in questions
        ]
    if spec.kind == "loss" and names_a_file(spec.source) and _holds_targets(spec.source):
        pairs = [(target.query, target.target) for target in read_items(part_of(spec), Target)[1]]
        found = encode_pairs(pairs, tokenizer, max_length=max_length, where=spec.name)
        return [Example(requests=(request,)) for request in found]
    tokens, source = windows * seq_len, part_of(spec)
    corpus = tokenize(
        documents(source, limit_bytes=max(_MOST_READ, _BYTES_A_TOKEN * tokens), seed=seed),
        tokenizer,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        shuffle=True,
        description=source,
        least=1,
    )
    rows = corpus.input_ids.tolist()
    return [Example(requests=(Request(context=(row[0],), continuation=tuple(row[1:])),)) for row in rows]


def part_of(spec: ObjectiveSpec) -> str:
    """The source with its split, in the command line's form.

    Raises:
        UserError: the source cannot be split.
    """
    if spec.split == _WHOLE:
        return spec.source
    if spec.source.startswith("hub:"):
        raise UserError(
            f"Objective {spec.name} has a split, and {spec.source} is a data set of the hub.",
            "Name a split of the data set itself, such as train[:10%].",
        )
    joint = "&" if "#" in spec.source else "#"
    return f"{spec.source}{joint}{spec.split[0]:g}:{spec.split[1]:g}"


def _holds_targets(source: str) -> bool:
    """Whether the first line is a query with a target; the reader reports problems of the file."""
    path = Path(source) if Path(source).is_file() else Path(source.partition("#")[0])
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = json.loads(next((line for line in file if line.strip()), ""))
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and {"query", "target"} <= first.keys()


def heal_corpus(objectives: Sequence[Objective], *, seq_len: int, windows: int, least: int, eos: int | None) -> Corpus:
    """Text for the closed form: windows of the last examples' tokens, alternating between objectives.

    Args:
        windows: most windows, over all objectives.
        least: fewest windows, over all objectives.
        eos: separates two examples, if there is one.

    Raises:
        UserError: the examples are too few.
    """
    each = max(windows // len(objectives), 1)
    parts = [list(islice(_full_windows(objective, seq_len, eos), each)) for objective in objectives]
    found = [row for turn in zip_longest(*parts) for row in turn if row is not None]
    if len(found) < least:
        raise UserError(
            f"The examples have {len(found) * seq_len} tokens; healing trials in closed form needs at least "
            f"{least * seq_len}.",
            "Widen the splits, add an objective on a text, or set heal: none.",
        )
    names = ", ".join(objective.name for objective in objectives)
    return Corpus.of(torch.tensor(found), description=f"examples of {names}", documents=len(found))


def _full_windows(objective: Objective, seq_len: int, eos: int | None) -> Iterator[list[int]]:
    """Full windows of an objective's tokens; a shorter rest is not used."""
    waiting: list[int] = []
    for example in reversed(objective.examples):
        request = example.requests[example.gold or 0]
        tokens = [*request.context, *request.continuation]
        if len(tokens) == seq_len and not waiting:
            yield tokens
            continue
        waiting += tokens if eos is None else [*tokens, eos]
        while len(waiting) >= seq_len:
            yield waiting[:seq_len]
            waiting = waiting[seq_len:]
