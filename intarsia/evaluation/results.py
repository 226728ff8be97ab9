"""Scores on tasks, item by item, and retention: the share of one model's accuracy that another one keeps.

The primary metric of a task (`TaskScore.primary`) is `acc_norm` if the task has it, else `acc`, else the match of the
last number (GSM8K's other metric also requires the form of its examples), else the first metric. lm-eval's tasks define
`acc_norm` if choices differ in length (ARC, HellaSwag, OpenBookQA, PIQA), and only `acc` otherwise (WinoGrande, MMLU).

Retention is the second model's accuracy divided by the first's, on the same items; above chance, both minus the
accuracy of guessing. Over several tasks it is the ratio of the means over tasks. The interval is a paired bootstrap: it
contains 95 % of the ratios for items resampled with replacement, within each task, the same draw for both models. Items
with equal outcomes are interchangeable, so a draw of n items is a draw of the frequency of each pair of outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, TypeAdapter

from intarsia.errors import Problems, UserError
from intarsia.progress import current

_PREFERRED = ("acc_norm", "acc", "exact_match,flexible-extract")
_DRAWS = 10_000
_LEVELS = (2.5, 97.5)
_MOST_UNSOUND = 1e-3  # largest share of draws with a zero divisor; they are ignored

_Floats: TypeAlias = npt.NDArray[np.float64]
# From a string of digits, the form of outcomes of 0 and 1.
_Outcomes = Annotated[tuple[float, ...], BeforeValidator(lambda given: tuple(map(float, given)))]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of a text.

    `value` = exp(`nll`); `nll` is the mean loss in nats over the predicted tokens; `nll_stderr` its standard error over
    windows (0 with one window); `stderr` the same for `value` (to first order); `tokens` is the number of predicted
    tokens; `text` and `text_sha256` identify them.
    """

    value: float
    nll: float
    nll_stderr: float
    stderr: float
    tokens: int
    windows: int
    seq_len: int
    text: str
    text_sha256: str
    dtype: str

    @property
    def measure(self) -> dict[str, float | None]:
        """The value with its standard error; None for one window."""
        return {"value": self.value, "stderr": self.stderr if self.windows > 1 else None}

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.stderr:.2f} ({self.windows} windows of {self.seq_len}, {self.text})"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second of a model, medians over `repeats`.

    `prefill_tokens_per_s`: prompt tokens of the whole batch in one forward. `decode_tokens_per_s`: new tokens of the
    whole batch, decoded with the cache. `time_to_first_token_s`: seconds from the prompt to
    the first new token.
    """

    prefill_tokens_per_s: float
    time_to_first_token_s: float
    decode_tokens_per_s: float
    batch: int
    prompt_len: int
    new_tokens: int
    device: str
    dtype: str
    threads: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A mean over items."""

    value: float
    # Its standard error; None if lm-eval has none.
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of a model with the original.

    Along the original's answers: `agreement` is the share of equal next tokens, `kl` the divergence of next tokens from
    the original's, in nats. For the model's own answers, if it generated any: `loops` is the share that ends in a loop,
    `length` the mean number of tokens, `perplexity` the original's on them. All are means over `prompts`, with standard
    errors. `examples` are answers side by side.
    """

    agreement: Metric
    kl: Metric
    loops: Metric | None
    length: Metric | None
    perplexity: Metric | None
    prompts: int
    # Tokens of the original's answers.
    tokens: int
    # Where the prompts come from, and the hash of their tokens.
    source: str
    sha256: str
    examples: tuple[Mapping[str, Any], ...] = ()

    def measures(self) -> dict[str, dict[str, Any]]:
        """The numbers by table key, with standard errors."""
        numbers = {
            "agreement": self.agreement,
            "next_token_kl": self.kl,
            "loops": self.loops,
            "answer_length": self.length,
            "answer_perplexity": self.perplexity,
        }
        return {name: asdict(number) for name, number in numbers.items() if number is not None}


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A model's score on one task."""

    name: str
    metrics: Mapping[str, Metric]
    # Number of items.
    n: int
    # Mean of 1 / number of choices; None for tasks without choices.
    chance: float | None
    # The outcomes of all items, in order, for metrics that are their mean.
    outcomes: Mapping[str, _Outcomes]
    # Hash of the items: equal hashes mean the same questions.
    items_sha256: str
    # `local`, or lm-eval's version.
    source: str
    # The task's own version.
    version: str | None = None

    @property
    def primary(self) -> str:
        """The name of the primary metric."""
        return next((name for name in _PREFERRED if name in self.metrics), next(iter(self.metrics)))

    @property
    def value(self) -> float:
        return self.metrics[self.primary].value

    def to_dict(self) -> dict[str, Any]:
        """As plain data, with outcomes of 0 and 1 as a string of digits."""
        outcomes = {
            name: "".join(str(int(value)) for value in values) if set(values) <= {0.0, 1.0} else list(values)
            for name, values in self.outcomes.items()
        }
        return asdict(self) | {"primary": self.primary, "outcomes": outcomes}


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio with its interval; None if more than one draw in a thousand has a zero divisor."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Retained:
    """Retention on one task, or on the mean over tasks."""

    name: str
    metric: str
    # Number of items.
    n: int
    # None if the first model has accuracy 0.
    accuracy: Ratio | None
    # The same above chance.
    above_chance: Ratio | None


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Retention of another model's scores."""

    # The other model.
    against: str
    tasks: tuple[Retained, ...]
    # Retention on the mean over tasks.
    mean: Retained
    # Seed of the bootstrap.
    draws: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """A model's scores on several tasks."""

    model: str
    scores: tuple[TaskScore, ...]
    dtype: str
    limit: int | None = None
    num_fewshot: int | None = None
    # Retention of another model's scores, if one was given.
    retention: Retention | None = None

    @property
    def mean(self) -> float:
        """Mean of the tasks' primary metrics."""
        return math.fsum(score.value for score in self.scores) / len(self.scores)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mean": self.mean, "scores": [score.to_dict() for score in self.scores]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskResults:
        """The results from the data of `to_dict`."""
        return TypeAdapter(cls).validate_python(data)

    def summary(self) -> dict[str, Any]:
        """One row per task, without the outcomes of single items."""
        kept = {} if self.retention is None else {task.name: task for task in self.retention.tasks}
        rows: list[dict[str, Any]] = []
        for score in self.scores:
            row: dict[str, Any] = {"task": score.name, **{name: asdict(found) for name, found in score.metrics.items()}}
            row |= {"items": score.n, "chance": score.chance}
            if score.name in kept:
                row["kept"] = _written(kept[score.name].accuracy)
                row["kept above chance"] = _written(kept[score.name].above_chance)
            rows.append(row)
        shown: dict[str, Any] = {"model": self.model, "tasks": rows, "mean": self.mean}
        if self.retention is not None:
            shown["against"] = self.retention.against
            shown["kept of the mean"] = _written(self.retention.mean.accuracy)
            shown["above chance"] = _written(self.retention.mean.above_chance)
        return shown


def retention(
    dense: Sequence[TaskScore], other: Sequence[TaskScore], *, against: str, draws: int = _DRAWS, seed: int = 0
) -> Retention:
    """The share of `dense` that `other` keeps, in the primary metric of each task.

    Args:
        dense: the reference scores, of the model `against`.
        other: scores on the same tasks in the same order.

    Raises:
        UserError: the tasks or their items differ, or a score has no item outcomes.
    """
    _check_same_items(dense, other)
    tasks, draws_TD = [], []
    for number, (first, second) in enumerate(zip(dense, other, strict=True)):
        both = np.array([score.outcomes[first.primary] for score in (first, second)])
        (d_P, o_P), counts = np.unique(both, axis=1, return_counts=True)
        n, chance = both.shape[1], np.random.default_rng([seed, number])
        drawn_DP = chance.multinomial(n, counts / n, size=draws) / n
        drawn = (drawn_DP @ d_P, drawn_DP @ o_P)
        values = (first.value, second.metrics[first.primary].value)
        accuracy, above = _ratios(values, drawn, first.chance)
        tasks.append(Retained(name=first.name, metric=first.primary, n=n, accuracy=accuracy, above_chance=above))
        draws_TD.append(drawn)
    chances = [score.chance for score in dense if score.chance is not None]
    first_mean = math.fsum(first.value for first in dense) / len(dense)
    second_mean = math.fsum(b.metrics[a.primary].value for a, b in zip(dense, other, strict=True)) / len(dense)
    accuracy, above = _ratios(
        (first_mean, second_mean),
        (np.mean([d_D for d_D, _ in draws_TD], axis=0), np.mean([o_D for _, o_D in draws_TD], axis=0)),
        math.fsum(chances) / len(dense) if len(chances) == len(dense) else None,
    )
    n = sum(task.n for task in tasks)
    mean = Retained(name="mean", metric="primary", n=n, accuracy=accuracy, above_chance=above)
    return Retention(against=against, tasks=tuple(tasks), mean=mean, draws=draws, seed=seed)


def with_retention(dense: TaskResults, found: TaskResults, *, seed: int = 0) -> TaskResults:
    """Scores with their retention of `dense` on the same items, unless a metric is not a mean over items."""
    try:
        return replace(found, retention=retention(dense.scores, found.scores, against=dense.model, seed=seed))
    except UserError as error:
        current().say(f"no retention: {error}")
        return found


def _written(ratio: Ratio | None) -> str:
    """`0.93 (0.88 to 0.97)`."""
    if ratio is None:
        return "nothing to keep"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f} (no interval)"
    return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _check_same_items(dense: Sequence[TaskScore], other: Sequence[TaskScore]) -> None:
    names, found = ([score.name for score in scores] for scores in (dense, other))
    if not names or names != found:
        raise UserError(
            f"One model was scored on the tasks {', '.join(names)}, the other on {', '.join(found)}.",
            "Evaluate both on the same tasks.",
        )
    problems = Problems()
    for first, second in zip(dense, other, strict=True):
        if first.items_sha256 != second.items_sha256:
            problems.add(
                f"{first.name}: the two models were not scored on the same items ({first.n} and {second.n}).",
                "Evaluate both with the same task files, prompts and limit.",
            )
        elif not all(first.primary in score.outcomes for score in (first, second)):
            problems.add(
                f"{first.name}: its metric {first.primary} is not a mean over items, so retention has no interval.",
                "Leave this task out.",
            )
    problems.raise_any()


def _ratios(
    values: tuple[float, float], drawn: tuple[_Floats, _Floats], chance: float | None
) -> tuple[Ratio | None, Ratio | None]:
    """Ratios of accuracies, plain and above chance, from two models' values and their means in every draw."""
    (dense, other), (dense_D, other_D) = values, drawn
    plain = _ratio(dense, other, dense_D, other_D)
    if chance is None:
        return plain, None
    return plain, _ratio(dense - chance, other - chance, dense_D - chance, other_D - chance)


def _ratio(dense: float, other: float, dense_D: _Floats, other_D: _Floats) -> Ratio | None:
    """The ratio; None for a zero divisor, and without an interval if that is too likely in draws."""
    if dense <= 0:
        return None
    sound_D = dense_D > 0
    if np.mean(~sound_D) > _MOST_UNSOUND:
        return Ratio(value=other / dense, low=None, high=None)
    low, high = np.percentile(other_D[sound_D] / dense_D[sound_D], _LEVELS)
    return Ratio(value=other / dense, low=float(low), high=float(high))
