"""The evaluator of a search: scores candidates of a family, and keeps in memory what they share.

No checkpoint is written and no model is loaded a second time. A trial runs only the layers after the prefix that it
shares with an earlier one, on examples that it has not seen yet. Each number is a function of the recipe and the budget
alone: on the CPU it is bit-identical whatever is cached. Layers use the same tensors as a built folder, and likelihoods
the same code as its evaluation.

The divergence from the base's next-token distribution needs little of the base: for each position its likeliest tokens,
8 bytes each, and the rest as one bucket. The divergence over these outcomes is a lower bound of the full one, and 0
where the full one is.

A trial may be healed in closed form before it is scored, toward the same blend with no layer removed. A fitted
candidate scores too well on the examples of the fit. So fits use examples from the end of the order, and windows of
texts that no budget of the search reaches. If an objective has few examples, those of the largest budgets serve for
both; neither uses items outside the splits.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoTokenizer

from intarsia.activations.batches import Batches
from intarsia.activations.loop import Loop
from intarsia.activations.loss import Likeliest
from intarsia.building.loaded_model import default_device
from intarsia.building.offload import free_bytes
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.evaluation.likelihood import Batch, default_batch_tokens, positions_of, score_batch, takes_packed_rows
from intarsia.healing.closed_form import fit, fit_forwards
from intarsia.healing.settings import ClosedFormSettings
from intarsia.healing.teacher import TeacherStates
from intarsia.inspection.own_code import trusts
from intarsia.options import Runtime
from intarsia.progress import current
from intarsia.recipe import schema
from intarsia.recipe.algebra import reference_layers
from intarsia.recipe.recipe import Recipe, Variant, identity
from intarsia.recipe.validate import check
from intarsia.tailoring.engine import budget_ladder
from intarsia.tailoring.family import Family
from intarsia.tailoring.family_file import FamilyFile, ObjectiveSpec, Range
from intarsia.tailoring.objective import (
    Segment,
    check_varied,
    heal_corpus,
    longest_row,
    read_objectives,
    segments,
)
from intarsia.tailoring.trial_run import ByteCache, FamilyModel, Runner, TrialFailed, path_of

_HEAL_TOKENS = 16384
_SHARE_OF_FREE = 0.3  # of memory, for caches
_MOST_ON_CPU = 2**30
_GPU_LOGITS = 2**30
_VALUES_BYTES = 32 * 2**20
_VALUES_OVERHEAD = 400  # bytes of a small array with its key
_SETTINGS = ClosedFormSettings()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The costs of a candidate, one for each objective, in the evaluator's order."""

    # To be minimised (accuracy is 1 - accuracy).
    costs: tuple[float, ...]
    # The number of examples of each objective.
    examples: tuple[int, ...]
    # The cost of the trial, in forward passes of one layer over all tokens of the budget.
    layer_forwards: float
    seconds: float
    # `stderr` of each cost; `accuracy` of question objectives, with standard errors; `tokens` of the budget, the
    # `reused` share of layer-forwards, and the number of layers made.
    details: Mapping[str, Any] = field(default_factory=dict)


Values = npt.NDArray[np.float64]
Unit = tuple[int, Segment]
"""Examples that run together: the number of their objective, and their range in it."""


class Evaluator:
    """Scores recipes over one family; see `intarsia.tailoring.evaluator`.

    Attributes:
        objectives: their names, in the order of the costs.
        measured: the objectives with their examples.
        most: the largest budget; an objective with fewer examples uses all of them.
        model: the base in memory; it makes the layers of any recipe over the family.
        runner: runs the layers.
        unpruned: the recipe of the whole base.
        base: its costs at the largest budget of the search; None if they were not measured.
    """

    def __init__(
        self,
        family: Family,
        file: FamilyFile,
        runtime: Runtime | None = None,
        *,
        seq_len: int = 128,
        examples: int | None = None,
        probe: bool = True,
        fits: Path | None = None,
    ) -> None:
        """Read the objectives, load the base, and measure it.

        Args:
            family: opened with weights.
            runtime: its memory is for caches (made layers, and states after shared first layers), beside the family's
                own tensors; the default is 1 GiB on the CPU, and three tenths of the free memory elsewhere.
            seq_len: tokens in a window of text; by default about as much work as a question with its choices.
            examples: windows to draw from a text for final scores, where nothing is healed.
            probe: measure the base at the largest budget, and refuse objectives on which models cannot differ.
            fits: the folder of fitted tensors of trials, if it exists.
        """
        runtime, search = runtime or Runtime(), file.search
        self._file, self._fits = file, fits
        device = default_device() if runtime.device is None else torch.device(runtime.device)
        checkpoint = family.checkpoints()[family.names[0]]
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trusts())
        positions = positions_of(SimpleNamespace(**checkpoint.config))
        seq_len = min(seq_len, positions or seq_len)
        heals = file.heal != "none" and examples is None
        heal_windows = _HEAL_TOKENS // seq_len if heals else 0
        windows = examples or search.max_budget + heal_windows
        self.measured = read_objectives(
            file.objectives, tokenizer, windows=windows, seq_len=seq_len, max_length=positions, seed=search.seed
        )
        self.objectives = tuple(objective.name for objective in self.measured)
        self.most = max(len(objective.examples) for objective in self.measured)
        if examples is None and search.max_budget > self.most:
            most = ", ".join(f"{each.name}: {len(each.examples)}" for each in self.measured)
            raise UserError(
                f"search.max_budget is {search.max_budget}; the objectives have at most {self.most} examples ({most}).",
                "Lower max_budget, or widen a split.",
            )
        self._heal_on: Corpus | None = None
        if heals:
            # At most half of the windows are held out.
            least, eos = 2 * _SETTINGS.held_out, tokenizer.eos_token_id
            self._heal_on = heal_corpus(self.measured, seq_len=seq_len, windows=heal_windows, least=least, eos=eos)
        share = int(free_bytes(device) * _SHARE_OF_FREE)
        memory = runtime.memory_bytes or (share if device.type == "cuda" else min(_MOST_ON_CPU, share))
        with current().task("loading the base", total=1) as task:
            dtype = None if runtime.dtype is None else getattr(torch, runtime.dtype)
            self.model = model = FamilyModel(family, device=device, dtype=dtype, memory_bytes=memory // 3)
            task.advance()
        self.runner = Runner(model, prefix_bytes=memory // 2, entry_bytes=memory // 6)
        self.unpruned = identity(Variant(name=model.base, model=checkpoint.model), model.architecture.n_layers)
        self._pack = takes_packed_rows(model.model, longest_row(self.measured))
        # Rows times columns of a batch; on a GPU, limit its logits to 1 GiB.
        self._batch_tokens = runtime.batch_tokens or default_batch_tokens(device)
        if runtime.batch_tokens is None and device.type != "cpu":
            logits = model.architecture.vocabulary * model.model.dtype.itemsize
            self._batch_tokens = max(1, min(self._batch_tokens, _GPU_LOGITS // logits))
        # Examples between two budgets are run together.
        self._cuts = budget_ladder(search.min_budget, search.max_budget, search.eta)
        self._batches: dict[Unit, tuple[Batch, ...]] = {}
        self._likeliest: dict[tuple[Unit, int], Likeliest] = {}
        # The log-likelihood of every request, or its divergence from the base, by the key of the recipe.
        self._values: ByteCache[tuple[str, Unit], Values] = ByteCache(_VALUES_BYTES)
        self.base: Outcome | None = None
        if probe:
            with current().task("measuring the base", total=1) as task:
                self.probe(search.max_budget)
                task.advance()

    @property
    def data(self) -> Mapping[str, str]:
        """The hash of each objective's examples in their order: costs are comparable where these are the same."""
        return {objective.name: objective.sha256 for objective in self.measured}

    def evaluate(self, recipe: Recipe, budget: int, *, healed: bool | None = None) -> Outcome:
        """The costs of a recipe on the first `budget` examples of every objective.

        Args:
            recipe: over the family, its variants named like the family's members.
            healed: fit its output projections first, in closed form; None: as the family file says, unless the recipe
                has fitted tensors.

        Raises:
            TrialFailed: something is not finite, or memory does not suffice.
            UserError: there is no such budget, or the recipe is not of this family.
        """
        start, made = time.perf_counter(), self.model.made
        if not 1 <= budget <= self.most:
            raise UserError(
                f"The budget is {budget}; the objectives have 1 to {self.most} examples.",
                "Choose another budget, or widen the objectives' splits.",
            )
        check(recipe, dict.fromkeys((self.model.base, *self.model.others), self.model.architecture))
        if healed is None:
            healed = self._heal_on is not None and self._file.heals(budget) and not recipe.fitted
        fitting = 0.0
        if healed:
            assert self._heal_on is not None, "this evaluator heals candidates"
            fitting = float(fit_forwards(recipe, _SETTINGS, self.model.architecture) * self._heal_on.tokens)
            recipe = self.heal(recipe)
        with self._failing():
            values, tokens, work = self._run(recipe, budget)
        scores = [objective.scores(found) for objective, found in zip(self.measured, values, strict=True)]
        costs = [objective.cost(found) for objective, found in zip(self.measured, scores, strict=True)]
        return Outcome(
            costs=tuple(cost for cost, _ in costs),
            examples=tuple(map(len, scores)),
            layer_forwards=(work + fitting) / tokens,
            seconds=time.perf_counter() - start,
            details={
                "stderr": [stderr for _, stderr in costs],
                "accuracy": {
                    objective.name: objective.accuracy(found)
                    for objective, found in zip(self.measured, values, strict=True)
                    if objective.asks
                },
                "tokens": tokens,
                "reused": 1.0 - work / tokens / len(recipe.layers),
                "layers_made": self.model.made - made,
            },
        )

    def scores(self, recipe: Recipe, budget: int) -> tuple[Values, ...]:
        """Each example's score, by objective."""
        with self._failing():
            values, _, _ = self._run(recipe, budget)
        return tuple(objective.scores(found) for objective, found in zip(self.measured, values, strict=True))

    def heal(self, recipe: Recipe) -> Recipe:
        """The recipe with output projections fitted toward the same blend with no layer removed."""
        assert self._heal_on is not None, "this evaluator heals candidates"
        kept = None if self._fits is None else self._fits / f"{schema.content_hash(recipe)}.yaml"
        if kept is not None and kept.exists():
            try:
                return replace(recipe, fitted=schema.load(kept).fitted)
            except UserError:  # damaged: fit again, without overwriting the file
                for path in (kept, kept.with_suffix(".safetensors")):
                    path.unlink(missing_ok=True)
        with self._failing():
            unpruned = [self.model.module(op) for op in reference_layers(recipe)]
            loop = Loop(self.model, Batches(self._heal_on, self.model.device))
            with TeacherStates(loop, layers=unpruned) as teacher:
                healed = fit(recipe, teacher, settings=_SETTINGS)[0]
        if kept is not None and kept.parent.is_dir():
            with suppress(UserError, OSError):  # the disk is full: build fits it again
                schema.save(healed, kept)
        return healed

    def probe(self, budget: int) -> None:
        """Measure the unpruned base, and refuse objectives on which models cannot differ.

        Raises:
            UserError: the base cannot be scored, or models cannot differ on an objective.
        """
        try:
            self.base = self.evaluate(self.unpruned, budget, healed=False)
        except TrialFailed as error:
            raise UserError(
                f"The family's base cannot be scored on every objective: {error.reason}.",
                "Use bfloat16 or float32, a smaller model, or more memory.",
            ) from error
        check_varied(self.measured, self.scores(self.unpruned, budget))

    def close(self) -> None:
        """Empty all caches."""
        self.runner.clear()
        self._batches.clear()
        self._likeliest.clear()
        self._values.clear()

    def _run(self, recipe: Recipe, budget: int) -> tuple[list[Values], int, int]:
        """The values of every objective's requests within a budget, its tokens, and layer-forwards times tokens."""
        counts = [min(budget, len(objective.examples)) for objective in self.measured]
        units = [(number, segment) for number, count in enumerate(counts) for segment in segments(count, self._cuts)]
        tokens = sum(batch.rows.ids_BT.numel() for unit in units for batch in self._of(unit))
        far = [unit for unit in units if self._measures_kl(unit) and (unit, 0) not in self._likeliest]
        # All of them or none: a later batch may run out of memory.
        self._likeliest |= {
            name: Likeliest.of(logits_NV) for name, _, logits_NV in self._logits(self.unpruned, far, tokens)
        }
        work, key = self.runner.work, path_of(recipe)[-1]
        known = {unit: value for unit in units if (value := self._values.get((key, unit))) is not None}
        new = {
            (number, segment): torch.zeros(len(self.measured[number].requests(segment)), dtype=torch.float64)
            for number, segment in units
            if (number, segment) not in known
        }
        for (unit, place), batch, logits_NV in self._logits(recipe, list(new), tokens):
            if self._measures_kl(unit):
                value_N = self._likeliest[unit, place].divergence(logits_NV)
                value_M = value_N[batch.position_M.to(value_N.device)]
            else:
                value_M = score_batch(logits_NV, batch)
            value_M = value_M.cpu().double()
            if not bool(value_M.isfinite().all()):
                raise TrialFailed(f"NaN or infinity in {self.objectives[unit[0]]}")
            new[unit].index_add_(0, batch.request_M, value_M)
        known |= {unit: sums_R.numpy() for unit, sums_R in new.items()}
        for unit in new:
            self._values.put((key, unit), known[unit], known[unit].nbytes + _VALUES_OVERHEAD)
        values = [np.concatenate([known[unit] for unit in units if unit[0] == n]) for n in range(len(counts))]
        return values, tokens, self.runner.work - work

    def _of(self, unit: Unit) -> tuple[Batch, ...]:
        """The batches of some examples."""
        if unit not in self._batches:
            objective, segment = self.measured[unit[0]], unit[1]
            self._batches[unit] = objective.batches(segment, pack=self._pack, batch_tokens=self._batch_tokens)
        return self._batches[unit]

    def _measures_kl(self, unit: Unit) -> bool:
        return self.measured[unit[0]].measure == "kl"

    def _logits(
        self, recipe: Recipe, units: Sequence[Unit], tokens: int
    ) -> Iterator[tuple[tuple[Unit, int], Batch, Tensor]]:
        """The logits of every batch, with its key."""
        batches = [((unit, place), batch) for unit in units for place, batch in enumerate(self._of(unit))]
        found = self.runner.logits(recipe, [(name, batch.rows) for name, batch in batches], tokens=tokens)
        for (name, batch), logits_NV in zip(batches, found, strict=True):
            yield name, batch, logits_NV

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn what makes a trial fail into `TrialFailed`; empty the caches when memory runs out."""
        try:
            with torch.inference_mode():
                yield
        except UserError as error:  # the recipe was checked, so something is not finite
            raise TrialFailed(str(error)) from error
        except (MemoryError, RuntimeError) as error:  # torch raises a RuntimeError where it has no class for it
            if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
                raise
            self.runner.clear()
            raise TrialFailed(f"out of memory: {(str(error).splitlines() or [''])[0]}") from error


# Final scores, on examples that the search has not seen


def rest_of(split: Range) -> Range | None:
    """The larger of the two parts of a source outside a split; None if the split is all of it."""
    before, after = (0.0, split[0]), (split[1], 1.0)
    part = after if after[1] - after[0] >= before[1] - before[0] else before
    return part if part[1] - part[0] > 1e-9 else None


def unseen(file: FamilyFile) -> tuple[FamilyFile, tuple[str, ...]]:
    """The family file with each objective on unseen data, and the objectives that have none."""
    kept: list[ObjectiveSpec] = []
    without: list[str] = []
    for objective in file.objectives:
        part = rest_of(objective.split)
        if part is None:
            without.append(objective.name)
        else:
            kept.append(objective.model_copy(update={"split": part}))
    return file.model_copy(update={"objectives": tuple(kept)}), tuple(without)


def final_scores(
    file: FamilyFile, family: Family, models: Mapping[str, Recipe], runtime: Runtime, *, examples: int
) -> dict[str, Any] | None:
    """The costs of the base and some recipes on unseen items; None if the search saw all items.

    Args:
        examples: most items of each objective.

    Returns:
        `rows`: for each model its name and its cost in each objective, `value` with `stderr`; for question objectives
        also `accuracy`, and after the base `kept`, the accuracy as a share of the base's, with the mean of these as
        `mean_kept`. `examples` by objective; `without`: objectives without unseen data.
    """
    rest, without = unseen(file)
    if not rest.objectives:
        current().say("No final scores: the search uses all of every objective's source. Give the objectives a split.")
        return None
    evaluator = Evaluator(family, rest, runtime, examples=examples, probe=False)
    rows: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    try:
        with current().task("final scores on unseen items", len(models) + 1) as task:
            for name, recipe in {"base": evaluator.unpruned, **models}.items():
                task.note(name)
                outcome = evaluator.evaluate(recipe, min(examples, evaluator.most))
                costs = zip(evaluator.objectives, outcome.costs, outcome.details["stderr"], strict=True)
                measures = {objective: {"value": cost, "stderr": stderr} for objective, cost, stderr in costs}
                row = {"model": name, "layers": len(recipe.layers), **measures}
                rows.append(row | _accuracies(outcome.details["accuracy"], rows[0] if rows else None))
                counts = dict(zip(evaluator.objectives, outcome.examples, strict=True))
                task.advance()
    finally:
        evaluator.close()
    return {"rows": rows, "examples": counts, "without": list(without)}


def _accuracies(found: Mapping[str, tuple[float, float]], base: Mapping[str, Any] | None) -> dict[str, Any]:
    """Accuracies of question objectives, and the shares kept of the base's (none where the base has 0)."""
    if not found:
        return {}
    row: dict[str, Any] = {
        "accuracy": {name: {"value": value, "stderr": error} for name, (value, error) in found.items()}
    }
    if base is not None:
        before = {name: base["accuracy"][name]["value"] for name in found}
        kept = {name: value / before[name] for name, (value, _) in found.items() if before[name]}
        row |= {"kept": kept, "mean_kept": sum(kept.values()) / len(kept)} if kept else {}
    return row
