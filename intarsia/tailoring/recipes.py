"""Recipes of candidates and trials, and the scores that choose pieces of joined layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint.reader import Checkpoint
from intarsia.data.corpus import Corpus
from intarsia.disk import replaced
from intarsia.options import Runtime
from intarsia.progress import current
from intarsia.pruning import scores as allocate
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.scores import part_scores
from intarsia.recipe import schema
from intarsia.recipe.algebra import concat_of, half_layers
from intarsia.recipe.methods import METHODS, with_defaults
from intarsia.recipe.recipe import LayerRef, Merge, Mix, Op, Recipe, Select, Variant, derive_spans, identity
from intarsia.tailoring.candidate import Blend, Candidate, Choice, Join
from intarsia.tailoring.evaluator import Evaluator
from intarsia.tailoring.family import open_family, read_config_only
from intarsia.tailoring.family_file import FamilyFile, TargetSpec, read_family_file
from intarsia.tailoring.run import FAMILY, Front, TailorRun, Trial
from intarsia.tailoring.space import Space, space_of

PieceScores = dict[LayerRef, dict[Part, Tensor]]
"""The sensitivity of each piece of a layer, `[P]` for each part: see `intarsia.pruning.scores.piece_scores`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Translator:
    """Translates candidates of a space to recipes."""

    space: Space
    architecture: Architecture
    # The members of the family, by name in the space.
    variants: Sequence[Variant]
    # Scores of every layer of every member; needed for joins only.
    scores: PieceScores
    # Seed of the methods that drop entries at random.
    seed: int = 0

    def recipe(self, candidate: Candidate) -> Recipe:
        """The recipe of a candidate of the space, without the variants that it does not use."""
        assert self.space.has(candidate), "a candidate of this space"
        ops = [
            self._op(choice, layer, self.space.removed_after(layer, candidate.positions))
            for position, choice in candidate.items()
            for layer in self.space.layers_of(position)
        ]
        used = {self.space.menu.members[0]}
        for op in ops:
            used |= {source.variant for source in op.sources}
        return Recipe(
            variants=tuple(variant for variant in self.variants if variant.name in used),
            base=self.space.menu.members[0],
            depth=self.space.depth,
            layers=tuple(ops),
            spans=derive_spans(ops, self.space.depth),
        )

    def _op(self, choice: Choice, layer: int, removed: int) -> Op:
        if isinstance(choice, Join):
            return self._joined(choice, layer, removed)
        if choice.mlp is None and choice.attention.method is None and choice.scale == 1.0:
            return Select(source=LayerRef(variant=choice.attention.members[0], layer=layer))
        blends = [choice.attention, *([] if choice.mlp is None else [choice.mlp])]
        members = [name for name in self.space.menu.members if any(name in blend.members for blend in blends)]
        mixes = [self._mix(blend, members) for blend in blends]
        base = LayerRef(variant=self.space.menu.members[0], layer=layer)
        return Merge(
            sources=tuple(LayerRef(variant=name, layer=layer) for name in members),
            weights=mixes[0].weights,
            method=mixes[0].method,
            params=mixes[0].params,
            base=base if any(METHODS[mix.method].base for mix in mixes) else None,
            scale=choice.scale,
            mlp=None if choice.mlp is None else mixes[1],
        )

    def _mix(self, blend: Blend, members: Sequence[str]) -> Mix:
        """A blend as weights of these members (0 for unused ones) and parameters."""
        method = blend.method or "linear"
        kind, values, count = METHODS[method], dict(blend.values), len(blend.members)
        own = [1.0] * count
        if "lead" in values:
            own = [values["lead"], *[(1.0 - values["lead"]) / (count - 1)] * (count - 1)]
        elif "lambda" in values and "lambda" not in kind.parameters:
            own = [values["lambda"]] * count
        params = kind.settle(values)
        if kind.random:
            params["seed"] = self.seed
        by_member = dict(zip(blend.members, own, strict=True))
        weights = tuple(by_member.get(name, 0.0) for name in members)
        return Mix(weights=weights, method=method, params=with_defaults(method, params))

    def _joined(self, choice: Join, layer: int, removed: int) -> Op:
        """Concatenation as in CoMe: the most sensitive pieces of each, norms folded in; or two half-layers."""
        after = 1 if choice.share is not None else removed
        refs = [LayerRef(variant=choice.first, layer=layer), LayerRef(variant=choice.second, layer=layer + after)]
        ops = [Select(source=ref) for ref in refs]
        if choice.share is None:
            return half_layers(ops[0], ops[1], "fold", self.architecture)
        totals = {part: self.architecture.n_pieces(part) for part in PARTS}
        shares = [choice.share, 1.0 - choice.share]
        counts = {part: allocate.counts(shares, totals[part]) for part in PARTS}
        kept = [
            {part: allocate.top(self.scores[ref][part], counts[part][index]) for part in PARTS}
            for index, ref in enumerate(refs)
        ]
        return concat_of(
            ops,
            kept,
            weights=[{part: counts[part][index] / totals[part] for part in PARTS} for index in range(2)],
            norm="fold",
            architecture=self.architecture,
        )


def measure_scores(
    members: Mapping[str, Checkpoint], corpus: Corpus, *, device: torch.device, dtype: torch.dtype | None
) -> PieceScores:
    """Measure the scores of every layer of every member, with one model in memory at a time."""
    found: PieceScores = {}
    with current().task("measuring the members", len(members)) as task:
        for name, checkpoint in members.items():
            task.note(name)
            resident = LoadedModel(checkpoint, device=device, dtype=dtype)
            whole = identity(Variant(name=name, model=checkpoint.model), checkpoint.architecture.n_layers)
            model = Intermediate(resident, corpus, whole.layers)
            try:
                model.measure()
                for layer, (measured, module) in enumerate(zip(model.measures, model.modules, strict=True)):
                    found[LayerRef(variant=name, layer=layer)] = {
                        part: part_scores(measured.channels[part], module, model.architecture, part).cpu()
                        for part in PARTS
                    }
            finally:
                model.close()
            task.advance()
    return found


def save_scores(scores: PieceScores, path: Path) -> None:
    """Write scores to a file, whole or not at all."""
    tensors = {
        f"{ref.variant}:{ref.layer}:{part}": tensor for ref, parts in scores.items() for part, tensor in parts.items()
    }
    with replaced(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def load_scores(path: Path) -> PieceScores:
    """Read scores from a file of `save_scores`."""
    found: PieceScores = {}
    for name, tensor in load_file(path).items():
        variant, layer, part = name.rsplit(":", 2)
        scores = found.setdefault(LayerRef(variant=variant, layer=int(layer)), {})
        scores[next(known for known in PARTS if known == part)] = tensor
    return found


SENSITIVITIES = "sensitivities.safetensors"


def translator_of(
    file: FamilyFile, architecture: Architecture, facts: Mapping[str, Any], scores: PieceScores
) -> Translator:
    """The translator for the members and the depth in `tailor.json`."""
    variants = tuple(
        Variant(name=name, model=entry["model"], revision=entry["revision"], sha256=entry["sha256"])
        for name, entry in facts["members"].items()
    )
    settled = file.model_copy(update={"target": TargetSpec(layers=facts["space"]["target"])})
    return Translator(
        space=space_of(settled, architecture),
        architecture=architecture,
        variants=variants,
        scores=scores,
        seed=file.search.seed,
    )


def trial_recipe(run: TailorRun, trial: Trial, evaluator: Evaluator | None = None, *, healed: bool = True) -> Recipe:
    """The recipe of a trial, healed if the trial was.

    Args:
        evaluator: that of the search, if it is open; only a healed trial needs one.
        healed: False for the recipe before healing.
    """
    kept = run.recipe_path(trial.number)
    if kept.exists() and healed:
        return schema.load(kept)
    file, facts = read_family_file(run.path / FAMILY), run.settings
    _, architecture = read_config_only(file.base.model, file.base.revision)
    path = run.path / SENSITIVITIES
    scores = load_scores(path) if path.exists() else {}
    recipe = translator_of(file, architecture, facts, scores).recipe(trial.candidate)
    if healed and file.heals(trial.budget):
        if evaluator is None:
            runtime = Runtime(device=facts["device"], dtype=facts["dtype"])
            evaluator = Evaluator(open_family(file.members), file, runtime, probe=False)
        recipe = evaluator.heal(recipe)
    names = [entry["name"] for entry in facts["objectives"]]
    provenance = {
        "method": "tailor",
        "settings": {
            "engine": trial.engine,
            "trial": trial.number,
            "origin": trial.origin,
            "budget": trial.budget,
            "costs": dict(zip(names, trial.costs or (), strict=True)),
            "seed": trial.seed,
        },
        "versions": facts["versions"],
    }
    return replace(recipe, provenance={**recipe.provenance, **provenance})


def keep_front(run: TailorRun, front: Front, evaluator: Evaluator) -> None:
    """Write the missing recipes of a front's trials."""
    for trial in front.points:
        path = run.recipe_path(trial.number)
        if not path.exists():
            recipe = trial_recipe(run, trial, evaluator)
            path.parent.mkdir(exist_ok=True)
            schema.save(recipe, path)
