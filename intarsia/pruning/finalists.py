"""Blocks of adjacent layers that the original could do without, instead of all steps that were taken so far.

Steps are taken one by one, each the best of its time, and their path need not lead to the best model: a block of layers
whose place is taken by the layer before it, repaired once, can be better than as many single steps, each repaired
(dev/LOG.md). A block of the original is what CoMe-P's concatenation is with all pieces from one layer; which one is
chosen as spans are, by the least influence (arXiv 2403.17887, where it is a method of its own), and then by the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from intarsia.building.recipe_layers import Tensors
from intarsia.healing.layer_fit import LayerFit
from intarsia.healing.restarts import Start
from intarsia.healing.teacher import TeacherStates
from intarsia.pruning.heal_in_loop import NEAREST, Repair, losses_after
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.step import Step, describe
from intarsia.recipe.ops import Op, sources_of
from intarsia.recipe.recipe import Recipe, identity

LAST_BLOCKS = 2
"""Blocks of the original that the final fit starts from too, where blocks were tried."""

_OF_A_STEP = ("dropped", "prior_ratios", "counts")


def best_blocks(
    whole: Intermediate,
    like: Step,
    number: int,
    loss: Callable[[Step], float],
    *,
    removed: int,
    known: Iterable[Sequence[Op]],
) -> list[tuple[Step, float]]:
    """Steps that leave `removed` layers out of the original, each with its loss: the one of least loss first.

    Args:
        whole: the original, with its hidden states.
        like: another step towards the same depth, for what it was decided on.
        loss: of the model that a step leads to, before any repair.
        known: models that are tried already.
    """
    seen = {tuple(ops) for ops in known}
    steps: list[Step] = []
    shared = {name: value for name, value in like.evidence.items() if name not in _OF_A_STEP}
    for start in range(whole.depth - removed + 1):
        stop = start + removed
        ops = (*whole.ops[:start], *whole.ops[stop:])
        if ops not in seen:
            steps.append(
                Step(
                    start=start,
                    count=removed,
                    op=None,
                    whole=ops,
                    evidence={**shared, "block": [start, stop], "dropped": sources_of(whole.ops[start:stop])},
                )
            )
    near = sorted(steps, key=lambda step: whole.span_distance(step.start, removed, "all-tokens"))[:NEAREST]
    return sorted(((step, loss(step)) for step in near), key=lambda found: found[1])[:number]


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A step, what is fitted if it is taken, and the held-out sequences' summed loss without and with that."""

    step: Step
    read_outs: list[LayerFit]
    fitted: Mapping[int, Tensors]
    before: float
    after: float

    @property
    def taken(self) -> bool:
        return self.after < self.before

    @property
    def loss(self) -> float:
        return min(self.before, self.after)


def settle(repair: Repair, steps: Sequence[Step], *, blocks: int = 0) -> tuple[Step, dict[str, Any]]:
    """Take the step whose repaired model has the least loss on held-out sequences; of equal ones the first.

    Args:
        blocks: how many blocks of the original are tried beside the steps.

    Returns:
        The step, and as plain data what `Repair.replace` tells of it, with what each of the others has shown.
    """
    model, rows = repair.model, repair.held_out
    original = model.original()  # held while the whole model is what was measured
    spent = model.layer_forwards
    trials: list[_Trial] = []
    with model.progress.task(f"repairing {len(steps) + blocks} finalists", len(steps) + blocks) as task:
        for step in steps:
            trials.append(_tried(repair, step, original, rows))
            task.advance()
        if blocks:
            trials += _blocks_tried(repair, steps, original, blocks, task.advance)
    best = min(trials, key=lambda trial: trial.loss)
    spent = model.layer_forwards - spent
    if best.step.whole is not None:
        model.become(best.step.whole, best.fitted if best.taken else None)
        model.measure(0)
    else:
        first, _ = repair.exchange(best.step.start, best.step.count, best.step.op)
        for index, tensors in best.fitted.items() if best.taken else ():
            model.fit(index, tensors)
        model.measure(first)
    tokens = max(int(model.counts_N[rows].sum()), 1)
    return best.step, {
        "read_outs": [asdict(fit) for fit in best.read_outs],
        "taken": best.taken,
        "held_out_loss": [best.before / tokens, best.after / tokens],
        "layer_forwards": spent,
        "finalists": [
            {
                "replaced": [trial.step.start, trial.step.start + trial.step.count],
                "op": None if trial.step.op is None else describe(trial.step.op),
                **({} if trial.step.whole is None else {"of": "the original"}),
                "held_out_loss": [trial.before / tokens, trial.after / tokens],
            }
            for trial in trials
        ],
    }


def _blocks_tried(
    repair: Repair, steps: Sequence[Step], original: TeacherStates, number: int, advance: Callable[[], None]
) -> list[_Trial]:
    """The original without a block of layers, of the blocks of least loss: each repaired and judged."""
    model, rows = repair.model, repair.held_out
    whole = model.beside(original)
    ops = list(whole.ops)
    aside = Repair(whole, repair.settings)

    def loss(step: Step) -> float:
        first, _ = aside.exchange(step.start, step.count, None)
        found = float(losses_after(whole, first, rows).sum())
        whole.become(ops)
        return found

    found = [
        [*model.ops[: step.start], *([] if step.op is None else [step.op]), *model.ops[step.start + step.count :]]
        for step in steps
    ]
    trials = []
    try:
        removed = len(ops) - len(found[0])
        for step, before in best_blocks(whole, steps[0], number, loss, removed=removed, known=found):
            trials.append(_tried(aside, step, original, rows, before=before))
            advance()
    finally:
        whole.close()
    return trials


def _tried(
    repair: Repair, step: Step, original: TeacherStates, rows: Sequence[int], *, before: float | None = None
) -> _Trial:
    """A step, repaired and judged; the model is as before afterwards.

    Args:
        before: the loss without the repair, where it is known.
    """
    model = repair.model
    was = list(model.ops), list(model.fitted), list(model.modules)
    first, due = repair.exchange(step.start, step.count, step.op)
    if before is None:
        before = float(losses_after(model, first, rows).sum())
    unrepaired = {index: model.fitted[index] for index in due}
    fits, _ = repair.fit(first, due, original)
    fitted = {
        index: tensors
        for index in due
        if (tensors := model.fitted[index]) is not None and tensors is not unrepaired[index]
    }
    after = float(losses_after(model, first, rows).sum()) if fitted else before
    model.ops, model.fitted, model.modules = was
    if model.measures:
        model.refresh()  # where a second layer was fitted, those before it were measured anew
    return _Trial(step=step, read_outs=fits, fitted=fitted, before=before, after=after)


def block_starts(ladder: Ladder, recipe: Recipe) -> tuple[Start, ...]:
    """Blocks of the original that the step to a recipe's depth was compared with: other starts for its final fit.

    Of those, `LAST_BLOCKS` of least loss there. They were compared with one layer of each fitted: the layers after it
    may change their order (dev/LOG.md).
    """
    entry = next((entry for entry in ladder.log() if entry["layers"] == len(recipe.layers)), {})
    tried = entry.get("evidence", {}).get("repair", {}).get("finalists", ())
    blocks = sorted((each for each in tried if "of" in each), key=lambda each: min(each["held_out_loss"]))
    whole = identity(recipe.variant(recipe.base), recipe.depth).layers
    found: list[Start] = []
    for first, end in (each["replaced"] for each in blocks):
        block = recipe.with_layers([*whole[:first], *whole[end:]])
        if block.layers != recipe.layers:
            found.append(Start(name=f"that leaves {first} to {end - 1} out of the original", recipe=block))
    return tuple(found[:LAST_BLOCKS])
