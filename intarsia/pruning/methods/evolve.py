"""Evolve: search for the attention and MLP sub-blocks to keep, by mutation and selection.

Source: Sieberling et al., EvoPress, arXiv 2410.14649: the best model so far is mutated by level switches (one dropped
sub-block comes back, another one is dropped), offspring are selected in stages on growing samples of text, by KL to
the original's next tokens, and the parent stays unless one of them is better on all of it.

Deviations: sub-blocks are dropped so that whole layers are left, each an attention and a later or its own MLP, which
makes the result a stock checkpoint (published: any, as many attentions as MLPs); so a switch moves a pair of adjacent
ones. The search starts from greedy removal of whole layers, selected in the same stages, or from the best block of
adjacent layers (published: random choices). Stages see parts of one calibration text (published: samples of a large
text).

A model runs from the original's hidden states before its first change. Evaluations are logged, so a resumed search
repeats none.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from intarsia.architecture.spec import Architecture
from intarsia.errors import check
from intarsia.healing.settings import Check
from intarsia.progress import current
from intarsia.pruning.step import Change, Criterion, Planner, PlanSettings, Step, without_half_layers
from intarsia.recipe.algebra import half_layers
from intarsia.recipe.recipe import Op
from intarsia.registry import planner

if TYPE_CHECKING:
    from intarsia.pruning.intermediate import Intermediate

Kept: TypeAlias = tuple[int, ...]
"""The sub-blocks of a model, ascending: 2 i is the attention of layer i, 2 i + 1 its MLP."""

_STAGES = ((1 / 8, 1 / 4), (1 / 2, 1 / 8))
"""For each stage but the last: the share of the text, and the share of models that survive it."""
_TRIES = 50
"""Draws of a mutation that gives no new model, before giving up."""


@dataclass(frozen=True, kw_only=True)
class EvolveSettings(PlanSettings):
    """How the search runs."""

    # Generations of the search.
    generations: int = 60
    # Mutations of the best model to try in each generation.
    offspring: int = 16
    # Most level switches in a mutation.
    switches: int = 3
    # Also drop runs of attention and MLP that start in the middle of a layer.
    half_layers: bool = True
    # Compare candidates and blocks by their loss, or by KL(original || candidate) of the next token.
    criterion: Criterion = "kl"
    # Heal the N best models, and keep the nearest to the original on the selection text.
    finalists: int = 1
    # Seed of the search.
    search_seed: int = 0

    def checks(self) -> Iterator[Check]:
        yield from super().checks()
        yield from self.at_least(0, "generations")
        yield from self.at_least(1, "offspring", "switches", "finalists")


@planner("evolve", settings=EvolveSettings, paper="2410.14649")
class Evolve(Planner):
    """Search for the attention and MLP sub-blocks to keep, by mutation and selection."""

    # Every depth is a search of its own, from the original to the target.
    layers_at_once = 1_000_000

    def __init__(self, settings: EvolveSettings) -> None:
        self.settings, self.finalists = settings, settings.finalists
        self.blocks, self.plan_tokens, self.criterion = settings.blocks, settings.plan_tokens, settings.criterion

    def decide(self, model: Intermediate, target: int, history: Sequence[Mapping[str, Any]]) -> Step:
        """The best model of the search, in one step."""
        search = _Search(self, model, target)
        best, losses = search.run()
        ops = search.ops(best)
        assert ops is not None
        first = next(place for place in range(2 * model.depth) if place not in best)
        evidence = {
            "dropped": words_of(best, model.depth),
            "losses": losses,
            "evaluated": len({kept for kept, _, _ in search.losses if len(kept) == len(best)}),
            "others": [kept for kept in search.ranked() if kept != best][: self.finalists - 1],
        }
        current().say(f"dropped: {evidence['dropped']}")
        return Step(start=first // 2, count=model.depth - target, op=None, whole=ops, evidence=evidence)

    def other_finalists(
        self, evidence: Mapping[str, Any], whole: Sequence[Op], architecture: Architecture
    ) -> dict[str, list[Op]]:
        """The runners-up of the search."""

        def layers(kept: Kept) -> list[Op]:
            pairs = ((first // 2, second // 2) for first, second in zip(kept[::2], kept[1::2], strict=True))
            return [whole[i] if i == j else half_layers(whole[i], whole[j], "fold", architecture) for i, j in pairs]

        return {
            f"the original without {words_of(kept, len(whole))}": layers(tuple(kept)) for kept in evidence["others"]
        }

    def forwards_at_most(self, architecture: Architecture, target: int, sequences: int) -> float:
        """The models of every stage, run as a whole; and the original."""
        depth = architecture.n_layers
        greedy = sum(_passes(left, sequences) * (left - 1) for left in range(depth, target, -1))
        models = _passes(2 * target + 1, sequences)  # blocks
        models += self.settings.generations * _passes(self.settings.offspring, sequences)
        return depth + greedy + models * target


class _Search:
    """A running search.

    Attributes:
        losses: the summed loss of each model so far, by the range of sequences that it ran on.
        logged: the same, from before a restart.
    """

    def __init__(self, planner: Evolve, model: Intermediate, target: int) -> None:
        self.settings, self.journal, self.model, self.target = planner.settings, planner.journal, model, target
        self.depth, self.number = model.depth, model.rows.stop
        assert self.depth == model.architecture.n_layers, "the search starts from the whole model"
        self.random = random.Random(self.settings.search_seed)
        self.losses: dict[tuple[Kept, int, int], float] = {}
        entries = [] if self.journal is None else self.journal.entries()
        self.logged = {(tuple(entry["kept"]), *entry["rows"]): entry["loss"] for entry in entries if "loss" in entry}
        self._joined: dict[tuple[int, int], Op | None] = {}

    def run(self) -> tuple[Kept, list[float]]:
        """The best model, and the loss of the best one after each generation."""
        generations, removed = self.settings.generations, self.depth - self.target
        with current().task("evolving", removed + 1 + generations, units=removed) as task:
            greedy: Kept | None = tuple(range(2 * self.depth))
            for left in range(self.depth, self.target, -1):
                task.note(f"greedy removal, {left} layers")
                greedy = None if greedy is None else self._without_one(greedy)
                task.advance()
            best = self._select(self._blocks(), greedy)
            losses = [self._loss(best)]
            for _ in range(generations):
                task.note(f"{self.settings.criterion} {losses[-1]:.4f}")
                task.advance()
                best = self._select(self._offspring(best), best)
                losses.append(self._loss(best))
            task.advance()
        return best, losses

    def ranked(self) -> list[Kept]:
        """The models of the target depth that were evaluated on all of the text, best first."""
        known = [kept for kept, start, stop in self.losses if (start, stop) == (0, self.number)]
        return sorted((kept for kept in known if len(kept) == 2 * self.target), key=self._loss)

    def ops(self, kept: Kept) -> tuple[Op, ...] | None:
        """The layers of a model; None if some cannot be joined, or some of the dropped ones are required."""
        found = tuple(
            self._join(attention // 2, mlp // 2) for attention, mlp in zip(kept[::2], kept[1::2], strict=True)
        )
        if None in found or not self.model.may_become([attention // 2 for attention in kept[::2]]):
            return None
        return found  # type: ignore[return-value]

    def _join(self, attention: int, mlp: int) -> Op | None:
        if attention == mlp:
            return self.model.ops[attention]
        if (attention, mlp) not in self._joined:
            self._joined[attention, mlp] = without_half_layers(self.model, attention, mlp - attention + 1)
        return self._joined[attention, mlp]

    def _without_one(self, kept: Kept) -> Kept | None:
        """The best model of one layer less; None where no layer can be removed."""
        tried = [kept[:place] + kept[place + 2 :] for place in range(0, len(kept), 2)]
        tried = [each for each in tried if self.ops(each) is not None]
        return self._select(tried, None) if tried else None

    def _blocks(self) -> list[Kept]:
        """The original without each block of adjacent layers."""
        gone = 2 * (self.depth - self.target)
        starts = range(0, 2 * self.target + 1, 1 if self.settings.half_layers else 2)
        blocks = [(*range(start), *range(start + gone, 2 * self.depth)) for start in starts]
        return [kept for kept in blocks if self.ops(kept) is not None]

    def _offspring(self, parent: Kept) -> list[Kept]:
        """Distinct mutations of a model that were not evaluated on all of the text; maybe fewer than asked for."""
        found: dict[Kept, None] = {}
        for _ in range(self.settings.offspring):
            for _ in range(_TRIES):
                most, kept = self.settings.switches, parent
                for _ in range(min(self.random.randint(1, most), self.random.randint(1, most))):
                    kept = self._switched(kept)
                known = kept in found or (kept, 0, self.number) in self.losses
                if not known and self.ops(kept) is not None:
                    found[kept] = None
                    break
        return list(found)

    def _switched(self, kept: Kept) -> Kept:
        """Drop two adjacent sub-blocks, and bring two back."""
        half = self.settings.half_layers
        place = self.random.randrange(0, len(kept) - 1, 1 if half else 2)
        left = kept[:place] + kept[place + 2 :]
        return self.random.choice([tuple(sorted((*left, *pair))) for pair in pairs(left, self.depth, half=half)])

    def _select(self, tried: list[Kept], parent: Kept | None) -> Kept:
        """The best of some models and their parent, in stages: fewer and fewer models on more and more text."""
        number = len(tried)
        for size, left in _sizes(number, self.number):
            start = self.random.randrange(self.number - size + 1)
            losses = self._evaluate(tried, slice(start, start + size))
            tried = sorted(tried, key=losses.__getitem__)[:left]
        self._evaluate(tried, slice(0, self.number))
        models = [*([] if parent is None else [parent]), *tried]
        check((bool(models), f"evolve finds no {self.depth - self.target} layers to remove.", "Choose sleb."))
        return min(models, key=self._loss)

    def _loss(self, kept: Kept) -> float:
        return self.losses[kept, 0, self.number] / float(self.model.counts_N.sum())

    def _evaluate(self, tried: Sequence[Kept], rows: slice) -> dict[Kept, float]:
        """The summed loss of models on some sequences; known losses are reused."""

        def key(kept: Kept) -> tuple[Kept, int, int]:
            return kept, rows.start, rows.stop

        new = [kept for kept in tried if key(kept) not in self.logged]
        found = self.model.losses_with(map(self._change, new), sequences=rows) if new else ()
        for kept, sums_N in zip(new, found, strict=True):
            self.logged[key(kept)] = float(sums_N.sum())
            if self.journal is not None:
                self.journal.append({"kept": kept, "rows": key(kept)[1:], "loss": self.logged[key(kept)]})
        self.losses |= {key(kept): self.logged[key(kept)] for kept in tried}
        return {kept: self.logged[key(kept)] for kept in tried}

    def _change(self, kept: Kept) -> Change:
        """A model as a change of the original: its layers after the shared prefix."""
        ops = self.ops(kept)
        assert ops is not None
        first = next((index for index, op in enumerate(ops) if op != self.model.ops[index]), len(ops))
        return Change(start=first, count=self.depth - first, ops=ops[first:])


def words_of(kept: Sequence[int], depth: int) -> str:
    """The sub-blocks that a model lacks, in words: `layers 4 to 6; mlp 9 to attention 11`."""
    words = []
    for first, end in _runs([place for place in range(2 * depth) if place not in kept]):
        start, last = first // 2, (end - 1) // 2
        if first % 2:
            words.append(f"mlp {start} to attention {last}")
        else:
            words.append(f"layer {start}" if start == last else f"layers {start} to {last}")
    return "; ".join(words)


def pairs(kept: Kept, depth: int, *, half: bool) -> list[tuple[int, int]]:
    """Sub-blocks that can come back, two at a time, so that every attention is followed by an MLP again.

    Args:
        kept: the sub-blocks of a model of whole layers, ascending.
        depth: the original's number of layers.
        half: whether the two may be parts of different layers.
    """
    found = []
    for first in range(2 * depth):
        before = bisect_left(kept, first)
        end = kept[before] if before < len(kept) else 2 * depth
        if first % 2 == before % 2 and first < end:
            found += [(first, second) for second in range(first + 1, end, 2)]
    return found if half else [(first, second) for first, second in found if first // 2 == second // 2]


def _sizes(number: int, sequences: int) -> list[tuple[int, int]]:
    """For each stage but the last: the number of sequences, and of models that survive it."""
    return [(math.ceil(sequences * size), math.ceil(number * left)) for size, left in _STAGES]


def _passes(number: int, sequences: int) -> float:
    """The cost of a selection among a number of models at most, in runs of one model over all of the text."""
    run = 0
    for size, left in _sizes(number, sequences):
        run += number * size
        number = left
    return run / sequences + number


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of adjacent numbers, as (first, last + 1)."""
    start = 0
    for place, row in enumerate(rows, start=1):
        if place == len(rows) or rows[place] != row + 1:
            yield rows[start], row + 1
            start = place
