"""Scores candidates of a family, with everything that they share in memory.

No checkpoint is written and no model is loaded a second time. A trial runs what is new in it: layers after the
prefix that it shares with an earlier one, on examples that it was not run on yet. Each number is a function of the
recipe and the budget alone: on the CPU it is bit-identical whatever is cached.

Layers are made from the same tensors as a built folder's, and likelihoods are computed by the code that evaluates it.

A trial may be healed in closed form before it is scored, toward the same blend with no layer removed. A fit makes a
candidate look better on what it was fitted to than elsewhere. So it takes examples from the end of the order, and of
texts windows are drawn for it that no budget of the search reaches. Where an objective's examples are few, those of the
largest budgets serve for both; items outside the splits are seen by neither. Each objective gives the same number of
windows, as far as it has them: a question with its right answer, a query with its target, one after the other, or
windows of text.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from intarsia.activations.batches import Batches
from intarsia.activations.loop import Loop
from intarsia.building.loaded_model import LoadedModel, default_device
from intarsia.building.offload import free_bytes
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.evaluation.likelihood import default_batch_tokens, positions_of, takes_packed_rows
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
from intarsia.tailoring.family_file import FamilyFile
from intarsia.tailoring.history import Outcome, TrialFailed
from intarsia.tailoring.objective import QUESTIONS, Objective, check_budgets, check_varied, read_objectives
from intarsia.tailoring.trial_run import FamilyModel, Runner, Scored, Scorer

_HEAL_TOKENS = 16384
_SETTINGS = ClosedFormSettings()
_LEAST_WINDOWS = 2 * _SETTINGS.held_out  # so that something is held out, and more is not


def heal_corpus(objectives: Sequence[Objective], *, seq_len: int, eos: int | None) -> Corpus:
    """Windows of the examples' tokens, objectives taking turns.

    Args:
        eos: stands between two examples, where there is one.

    Raises:
        UserError: the examples are too few for a fit.
    """
    wanted = max(_HEAL_TOKENS // seq_len // len(objectives), 1)
    parts = [list(_windows(objective, seq_len, eos, wanted)) for objective in objectives]
    order = sorted((place, number) for number, part in enumerate(parts) for place in range(len(part)))
    if len(order) < _LEAST_WINDOWS:
        raise UserError(
            f"The examples have {len(order) * seq_len} tokens; healing trials in closed form needs at least "
            f"{_LEAST_WINDOWS * seq_len}.",
            "Widen the splits, add an objective on a text, or set heal: none.",
        )
    ids = torch.tensor([parts[number][place] for place, number in order])
    names = ", ".join(objective.name for objective in objectives)
    return Corpus.of(ids, description=f"examples of {names}", documents=len(order))


def heal_trial(recipe: Recipe, model: LoadedModel, corpus: Corpus) -> Recipe:
    """A recipe with its output projections fitted toward what it would be with no layer removed."""
    teacher_layers = [model.module(op) for op in reference_layers(recipe)]
    with TeacherStates(Loop(model, Batches(corpus, model.device)), layers=teacher_layers) as teacher:
        return fit(recipe, teacher, settings=_SETTINGS)[0]


def _windows(objective: Objective, seq_len: int, eos: int | None, most: int) -> Iterator[list[int]]:
    """Full windows alone: what is left over at the end is not used."""
    waiting: list[int] = []
    for example in reversed(objective.examples):
        request = example.requests[example.gold or 0]
        tokens = [*request.context, *request.continuation]
        if len(tokens) == seq_len and not waiting:
            yield tokens
            most -= 1
        else:
            waiting += tokens if eos is None else [*tokens, eos]
        while len(waiting) >= seq_len and most > 0:
            yield waiting[:seq_len]
            waiting = waiting[seq_len:]
            most -= 1
        if most <= 0:
            return


class KeptFits:
    """Fitted tensors of trials in a folder, by the hash of the recipe; nothing is kept where there is no folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, recipe: Recipe) -> Recipe | None:
        """A recipe as it was healed before, if it was."""
        path = self._path(recipe)
        try:
            return replace(recipe, fitted=schema.load(path).fitted) if path.exists() else None
        except UserError:  # damaged; it is fitted again
            for file in self._folder.glob(f"{path.stem}.*"):
                file.unlink(missing_ok=True)
            return None

    def keep(self, recipe: Recipe, healed: Recipe) -> None:
        """Keep what was fitted. On a full disk nothing is kept, and the fit is made again."""
        if self._folder.is_dir():
            with suppress(UserError, OSError):
                schema.save(healed, self._path(recipe))

    def keep_only(self, hashes: Collection[str]) -> None:
        """Delete the fits of all other recipes."""
        for path in self._folder.glob("[!.]*"):
            if path.stem not in hashes:
                path.unlink(missing_ok=True)

    def start(self) -> None:
        """Make the folder: from now on fits are kept."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def end(self) -> None:
        """Delete all of them."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, recipe: Recipe) -> Path:
        return self._folder / f"{schema.content_hash(recipe)}.yaml"


class Evaluator:
    """Scores recipes over one family; see `intarsia.tailoring.evaluator`.

    Attributes:
        objectives: their names, in the order of the costs.
        most: the largest budget; an objective with fewer examples is measured on all that it has.
        measured: the objectives, with their examples.
        model: the base in memory, which makes the layers of any recipe over the family.
        runner: runs them.
        base: what the uncut base costs at the largest budget of the search; None where that was not measured.
    """

    def __init__(
        self,
        model: FamilyModel,
        objectives: Sequence[Objective],
        file: FamilyFile,
        *,
        pack: bool,
        batch_tokens: int,
        cache_bytes: int,
        heal_on: Corpus | None = None,
        fits: KeptFits | None = None,
    ) -> None:
        """Most callers want `open_evaluator`.

        Args:
            pack, batch_tokens: see `Scorer`.
            cache_bytes: for states and arguments; layers have a cache of their own.
            heal_on: tokens for the closed form, where candidates may be healed.
            fits: where what was fitted is kept, and found again.
        """
        self.objectives = tuple(objective.name for objective in objectives)
        self.most = max(len(objective.examples) for objective in objectives)
        self.measured = tuple(objectives)
        self.model = model
        self.runner = Runner(model, prefix_bytes=cache_bytes * 3 // 4, entry_bytes=cache_bytes // 4)
        self.base: Outcome | None = None
        self._file, self._heal_on, self._fits = file, heal_on, fits
        self.uncut = identity(Variant(name=model.base, model=model.checkpoint.model), model.architecture.n_layers)
        search = file.search
        cuts = budget_ladder(search.min_budget, search.max_budget, search.eta)
        self._scorer = Scorer(
            self.runner, objectives, cuts=cuts, pack=pack, batch_tokens=batch_tokens, uncut=self.uncut
        )

    @property
    def data(self) -> Mapping[str, str]:
        """The hash of each objective's examples in their order: costs are comparable where these are the same."""
        return {objective.name: objective.sha256 for objective in self.measured}

    def evaluate(self, recipe: Recipe, budget: int, *, healed: bool | None = None) -> Outcome:
        """What a recipe costs on the first `budget` examples of every objective.

        Args:
            recipe: over the family, its variants called as the family's members are.
            healed: fit its output projections first, in closed form; None: as the family file says, unless something
                is fitted already.

        Raises:
            TrialFailed: something is not finite, or memory does not suffice.
            UserError: there is no such budget, or the recipe is none of this family.
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
        with self._failing():
            if healed:
                assert self._heal_on is not None, "opened for candidates that are healed"
                fitting = float(fit_forwards(recipe, _SETTINGS, self.model.architecture) * self._heal_on.tokens)
                recipe = self._healed(recipe)
            scored = self._scorer.score(recipe, budget)
        return self._outcome(scored, fitting, len(recipe.layers), self.model.made - made, start)

    def heal(self, recipe: Recipe) -> Recipe:
        """The recipe that `evaluate` scores with `healed`, its fitted tensors in it."""
        with self._failing():
            return self._healed(recipe)

    def probe(self, budget: int) -> None:
        """Measure the uncut base, and refuse objectives on which models cannot differ.

        Raises:
            UserError: the base cannot be scored, or naming these objectives.
        """
        start = time.perf_counter()
        try:
            with self._failing():
                scored = self._scorer.score(self.uncut, budget)
        except TrialFailed as error:
            raise UserError(
                f"The family's base cannot be scored on every objective: {error.reason}.",
                "Use bfloat16 or float32, a smaller model, or more memory.",
            ) from error
        check_varied(self.measured, dict(zip(self.objectives, scored.examples, strict=True)))
        self.base = self._outcome(scored, 0.0, len(self.uncut.layers), 0, start)

    def close(self) -> None:
        """Release all that is cached."""
        self.runner.clear()
        self._scorer.clear()

    def _healed(self, recipe: Recipe) -> Recipe:
        assert self._heal_on is not None, "opened for candidates that are healed"
        found = None if self._fits is None else self._fits.find(recipe)
        if found is None:
            found = heal_trial(recipe, self.model, self._heal_on)
            if self._fits is not None:
                self._fits.keep(recipe, found)
        return found

    def _outcome(self, scored: Scored, fitting: float, depth: int, made: int, start: float) -> Outcome:
        pairs = [objective.cost(found) for objective, found in zip(self.measured, scored.examples, strict=True)]
        wrong = [name for name, (cost, _) in zip(self.objectives, pairs, strict=True) if not np.isfinite(cost)]
        if wrong:
            raise TrialFailed(f"NaN or infinity in {', '.join(wrong)}")
        details: dict[str, Any] = {
            "stderr": [stderr for _, stderr in pairs],
            "accuracy": {
                name: (float(right.mean()), float(right.std(ddof=1) / np.sqrt(len(right))) if len(right) > 1 else 0.0)
                for name, right in zip(self.objectives, scored.right, strict=True)
                if right is not None
            },
            "tokens": scored.tokens,
            "reused": 1.0 - scored.work / scored.tokens / depth,
            "layers_made": made,
        }
        return Outcome(
            costs=tuple(cost for cost, _ in pairs),
            examples=tuple(map(len, scored.examples)),
            layer_forwards=(scored.work + fitting) / scored.tokens,
            seconds=time.perf_counter() - start,
            details=details,
        )

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What makes a trial fail, as `TrialFailed`; after a lack of memory the caches are empty."""
        try:
            with torch.inference_mode():
                yield
        except UserError as error:  # the recipe was checked before: something is not finite
            raise TrialFailed(str(error)) from error
        except (MemoryError, RuntimeError) as error:  # torch says it in words, if it has no class for it
            if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
                raise
            self.runner.clear()
            raise TrialFailed(f"out of memory: {(str(error).splitlines() or [''])[0]}") from error


_SEQ_LEN = 128  # a window of text is then about as much work as a question with its choices
_SHARE_OF_FREE = 0.3  # of memory, for caches
_MOST_ON_CPU = 2**30
_GPU_LOGITS = 2**30


def open_evaluator(
    family: Family,
    file: FamilyFile,
    runtime: Runtime | None = None,
    *,
    seq_len: int = _SEQ_LEN,
    examples: int | None = None,
    probe: bool = True,
    fits: KeptFits | None = None,
) -> Evaluator:
    """Read the objectives, load the base, and measure it.

    Args:
        family: opened with weights.
        runtime: its memory is for caches (layers that were made, and states after shared first layers), beside the
            family's own tensors; without it 1 GiB on the CPU, and three tenths of what is free elsewhere.
        seq_len: tokens of a window of text.
        examples: windows that are drawn of a text, where they are not those of a search; nothing is healed then.
        probe: measure the base at the largest budget, and refuse objectives on which models cannot differ.
        fits: where what is fitted for trials is kept.
    """
    runtime, search = runtime or Runtime(), file.search
    device = default_device() if runtime.device is None else torch.device(runtime.device)
    checkpoint = family.checkpoints()[family.names[0]]
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trusts())
    positions = positions_of(SimpleNamespace(**checkpoint.config))
    seq_len = min(seq_len, positions or seq_len)
    heals = file.heal != "none" and examples is None
    windows = examples or search.max_budget + (_HEAL_TOKENS // seq_len if heals else 0)
    objectives = read_objectives(
        file.objectives, tokenizer, windows=windows, seq_len=seq_len, max_length=positions, seed=search.seed
    )
    if examples is None:
        check_budgets(objectives, search.max_budget)
    heal_on = heal_corpus(objectives, seq_len=seq_len, eos=tokenizer.eos_token_id) if heals else None
    cache_bytes = runtime.memory_bytes or _cache_bytes(device)
    with current().task("loading the base", total=1) as task:
        dtype = None if runtime.dtype is None else getattr(torch, runtime.dtype)
        model = FamilyModel(family, device=device, dtype=dtype, memory_bytes=cache_bytes // 3)
        task.advance()
    made = Evaluator(
        model,
        objectives,
        file,
        pack=takes_packed_rows(model.model, _longest_row(objectives)),
        batch_tokens=runtime.batch_tokens or _batch_tokens(model),
        cache_bytes=cache_bytes * 2 // 3,
        heal_on=heal_on,
        fits=fits,
    )
    if probe:
        with current().task("measuring the base", total=1) as task:
            made.probe(search.max_budget)
            task.advance()
    return made


def _cache_bytes(device: torch.device) -> int:
    """A share of what is free, on the CPU no more than 1 GiB."""
    share = int(free_bytes(device) * _SHARE_OF_FREE)
    return share if device.type == "cuda" else min(_MOST_ON_CPU, share)


def _longest_row(objectives: Sequence[Objective]) -> int:
    """The longest row of a question with one of its choices, in tokens."""
    lengths = (
        len(request.context) + len(request.continuation)
        for objective in objectives
        if objective.measure in QUESTIONS
        for example in objective.examples
        for request in example.requests
    )
    return max(lengths, default=0)


def _batch_tokens(model: LoadedModel) -> int:
    """As for evaluation; on a GPU so few that the logits of a batch stay within 1 GiB."""
    usual = default_batch_tokens(model.device)
    if model.device.type == "cpu":
        return usual
    return max(1, min(usual, _GPU_LOGITS // (model.architecture.vocabulary * model.model.dtype.itemsize)))
