"""family.yaml: a family of models, and what to search for (read by `intarsia.tailoring.family_reader`).

Paths in it are relative to the folder in which the command runs, as on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from intarsia.recipe.ops import MergeMethod

Operation = Literal["remove", "select", "merge", "concat", "stack"]
Engine = Literal["smac", "evolve", "random"]
Heal = Literal["none", "finalists", "every"]
Metric = Literal["accuracy", "margin", "likelihood"]
Range = tuple[float, float]
BASE = "base"
RANDOM_MIDDLE = "random-middle"


@dataclass(frozen=True, kw_only=True)
class MemberSpec:
    """A model of the family as the user names it."""

    name: str
    model: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """One thing to be good at.

    `task`: an lm-eval task, or a JSONL file of questions, by `metric`; `loss`: the loss on a text, or on the targets of
    a JSONL file with queries and targets; `kl`: the divergence from the dense base on a text. `split` is the part of
    the file that the search may see.
    """

    name: str
    kind: Literal["task", "loss", "kl"]
    source: str
    split: Range = (0.0, 1.0)
    metric: Metric = "likelihood"


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """How to search. Budgets are numbers of examples over the whole of an objective."""

    engine: Engine = "smac"
    trials: int = 100
    min_budget: int = 16
    max_budget: int = 256
    eta: int = 3
    seed: int = 0
    warm_start: tuple[str, ...] = (RANDOM_MIDDLE,)


@dataclass(frozen=True, kw_only=True)
class FamilyFile:
    """What a family.yaml says.

    Ranges are of values that the search may choose: `lambdas` how much of a difference to the base a merge adds
    (`merge.scale`), `densities` how much of it is kept, `shares` the first layer's in a join, `scales` what a kept
    layer's output is multiplied by.
    """

    base: MemberSpec
    variants: tuple[MemberSpec, ...]
    layers: int | None
    sparsity: float | None
    operations: tuple[Operation, ...]
    methods: tuple[MergeMethod, ...]
    lambdas: Range = (0.0, 1.5)
    densities: Range = (0.1, 0.9)
    shares: Range = (0.1, 0.9)
    scales: Range = (1.0, 1.0)
    separate: bool = False
    groups: int | None = None
    objectives: tuple[ObjectiveSpec, ...] = ()
    search: SearchSpec = SearchSpec()
    heal: Heal = "none"
