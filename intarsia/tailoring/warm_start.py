"""What a search starts with: candidates that are known to be sensible, and what earlier searches have found.

- `random-middle`: the base without layers drawn from its middle, 8 times.
- a planner's ladder: its recipe at the target depth, as the nearest candidate; and the layers that it keeps, taken from
  each other member whole, and from all variants merged by each method of the space.
- an earlier search: its front; where it was measured on the same examples of the same family, all its trials too, each
  at the budget that it had. They are taken into the log, never counted as trials of this search, and not made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from intarsia.architecture.spec import PARTS, Part
from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint.reader import Checkpoint
from intarsia.data.corpus import Corpus
from intarsia.disk import damage_named, replaced, write_whole
from intarsia.progress import current
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.scores import part_scores
from intarsia.recipe.recipe import LayerRef, MergeMethod, Recipe, Variant, identity
from intarsia.recipe.schema import content_hash
from intarsia.tailoring.candidate import Blend, Keep, Menu, single, slots
from intarsia.tailoring.engine import Start
from intarsia.tailoring.history import Front, Trial
from intarsia.tailoring.space import Space
from intarsia.tailoring.translate import PieceScores, Translator

_MIDDLES = 8


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Candidates to start with, and trials of earlier searches."""

    starts: tuple[Start, ...] = ()
    earlier: tuple[Trial, ...] = ()

    def save(self, path: Path) -> None:
        """Keep it: a resumed search starts with the same."""
        write_whole(path, json.dumps(TypeAdapter(WarmStart).dump_python(self), allow_nan=False) + "\n")

    @classmethod
    def joined(cls, parts: Sequence[WarmStart]) -> WarmStart:
        """Several, each candidate and trial once."""
        starts = {start.candidate: start for part in reversed(parts) for start in reversed(part.starts)}
        earlier = {trial.key: trial for part in parts for trial in part.earlier}
        return cls(starts=tuple(reversed(starts.values())), earlier=tuple(earlier.values()))

    @classmethod
    def load(cls, path: Path) -> WarmStart:
        """What `save` has kept.

        Raises:
            UserError: it is damaged.
        """
        remedy = "The run folder is damaged; search into another one."
        with damage_named(path, expected="the warm start of a search", remedy=remedy):
            return TypeAdapter(cls).validate_json(path.read_text(encoding="utf-8"))


def random_middles(space: Space, seed: int) -> list[Start]:
    """The base without layers of its middle; in a fusion the base itself, once."""
    rng = Random(f"middle-{seed}")
    drawn = dict.fromkeys(space.random_middle(rng) for _ in range(_MIDDLES))
    return [Start(candidate=candidate, origin="warm start: random-middle") for candidate in drawn]


def from_recipe(recipe: Recipe, translator: Translator, name: str) -> list[Start]:
    """What a planner's recipe means in the space: nothing, where its layers are those of no candidate."""
    nearest = translator.nearest(recipe)
    if nearest is None:
        return []
    return list(_with_members(Start(candidate=nearest, origin=f"warm start: {name}"), translator.space, name))


def _with_members(start: Start, space: Space, name: str) -> Iterator[Start]:
    yield start
    changed = space.changed(start.candidate.positions)
    places = slots(space.positions(changed))
    everywhere = {f"on {member}": single(member) for member in space.menu.singles[1:]}
    everywhere |= {f"merged by {method}": Keep(attention=blend) for method, blend in _merged(space.menu)}
    for how, choice in everywhere.items():
        candidate = space.arrange(changed, dict.fromkeys(places, choice))
        yield Start(candidate=candidate, origin=f"warm start: {name} {how}")


def _merged(menu: Menu) -> Iterator[tuple[MergeMethod, Blend]]:
    """All variants merged in the usual way of each method; with the base, where a method takes no fewer members."""
    for method in menu.usable:
        variants = menu.nearest(menu.members[1:], method, {})
        blend = variants if variants.method == method else menu.nearest(menu.members, method, {})
        if blend.method == method:
            yield method, blend


def from_search(
    trials: Sequence[Trial], front: Front | None, translator: Translator, name: str, *, same: bool
) -> WarmStart:
    """What an earlier search says to this one.

    Args:
        same: whether its trials were measured on the same examples, of the same family. Even then a trial counts only
            where its candidate is the same recipe here as it was there.
    """
    space = translator.space
    reused = [
        replace(trial, origin=f"{name}, {trial.origin}")
        for trial in trials
        if same
        and trial.status == "ok"
        and space.has(trial.candidate)
        and content_hash(translator.recipe(trial.candidate)) == trial.recipe
    ]
    # A candidate whose costs are known need not be tried again at the least budget.
    known = {trial.candidate for trial in reused}
    points = [] if front is None else [point.candidate for point in front.points]
    starts = [candidate for candidate in points if space.has(candidate) and candidate not in known]
    return WarmStart(
        starts=tuple(Start(candidate=candidate, origin=f"warm start: {name}") for candidate in starts),
        earlier=tuple(reused),
    )


Scores = dict[LayerRef, dict[Part, Tensor]]


def measure(
    members: Mapping[str, Checkpoint], corpus: Corpus, *, device: torch.device, dtype: torch.dtype | None
) -> Scores:
    """The scores of every layer of every member; one model is in memory at a time."""
    found: Scores = {}
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


def save(scores: PieceScores, path: Path) -> None:
    """Write scores to a file that is there whole or not at all."""
    tensors = {
        f"{ref.variant}:{ref.layer}:{part}": tensor for ref, parts in scores.items() for part, tensor in parts.items()
    }
    with replaced(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def load(path: Path) -> Scores:
    """The scores in a file of `save`."""
    found: Scores = {}
    for name, tensor in load_file(path).items():
        variant, layer, part = name.rsplit(":", 2)
        scores = found.setdefault(LayerRef(variant=variant, layer=int(layer)), {})
        scores[next(known for known in PARTS if known == part)] = tensor
    return found
