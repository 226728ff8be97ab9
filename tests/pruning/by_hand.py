"""What planners are compared with, worked out from a model's own forward; and plans made by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from intarsia.building.loaded_model import LoadedModel
from intarsia.data.corpus import Corpus
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.methods.evolve import EvolveSettings
from intarsia.pruning.prune import StepHealer, prune
from intarsia.pruning.step import Change, Planner, Step
from intarsia.recipe.recipe import Op, Recipe, Variant, identity
from intarsia.registry import planners
from intarsia.run_dir import RunDir
from tests import families


def real_tokens(corpus: Corpus) -> torch.Tensor:
    """True at real tokens, `[N, T]`."""
    return torch.ones_like(corpus.input_ids, dtype=torch.bool) if corpus.mask is None else corpus.mask


def residual_stream(resident: LoadedModel, corpus: Corpus) -> list[torch.Tensor]:
    """H^0 .. H^L `[N, T, D]`, float64; H^L by a hook, because transformers shows it after the final norm only."""
    seen: list[torch.Tensor] = []

    def look(module: object, args: object, output: object) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach())

    handle = resident.layers[-1].register_forward_hook(look)
    with torch.no_grad():
        own = resident.model(
            corpus.input_ids, attention_mask=real_tokens(corpus).long(), output_hidden_states=True, use_cache=False
        )
    handle.remove()
    return [h.double() for h in (*own.hidden_states[:-1], seen[0])]


def with_layers(resident: LoadedModel, states: list[dict[str, torch.Tensor]]) -> PreTrainedModel:
    """A model of its own whose layers have these tensors."""
    model = copy.deepcopy(resident.model)
    path, _, name = resident.architecture.family.modules.layers.rpartition(".")
    layers = getattr(model.get_submodule(path), name)
    kept = [copy.deepcopy(layers[index]) for index in range(len(states))]
    for layer, state in zip(kept, states, strict=True):
        layer.load_state_dict(state)
    setattr(model.get_submodule(path), name, torch.nn.ModuleList(kept))
    return model


METHODS = planners.names
QUICK = {"evolve": EvolveSettings(generations=2, offspring=4)}


def planner_of(method: str, settings: Any = None, in_loop: ClosedFormSettings | None = None) -> Any:
    """A planner with these settings, where they are the method's."""
    chosen, settings = planners.choose(method), settings or QUICK.get(method)
    if chosen.entry.settings is not None and isinstance(settings, chosen.entry.settings):
        chosen = replace(chosen, settings=settings)
    planner = chosen.create()
    if in_loop is not None:
        planner.in_loop = in_loop
    return planner


def progressive_methods() -> list[str]:
    """Methods that measure the model after every step."""
    return [method for method in METHODS if planner_of(method).progressive]


def ladder_in(folder: Path, settings: Mapping[str, Any] | None = None) -> Ladder:
    """The ladder of a run folder, which is started if it is not there."""
    RunDir(folder).pin("settings", settings or {})
    return Ladder(folder)


def climb(planner: Planner, model: Intermediate, start: Recipe, target: int, run: Ladder, **how: Any) -> str | None:
    """`prune`; with `in_loop`, steps are healed that way."""
    planner.in_loop = how.get("in_loop", planner.in_loop)
    return prune(planner, model, start, target, run)


def ladder_of(
    method: str, resident: LoadedModel, corpus: Corpus, folder: Path, target: int, settings: Any = None
) -> tuple[Ladder, str | None, Intermediate]:
    """A run down to a depth, why it stopped, and the model at its end."""
    run = ladder_in(folder)
    start = identity(Variant(name="base", model="m"), families.DEPTH)
    depths = run.depths()
    start = run.recipe(depths[-1]) if depths else start
    model = Intermediate(resident, corpus, start.layers, batch_tokens=2 * corpus.seq_len)
    return run, prune(planner_of(method, settings), model, start, target, run), model


def kept_layers(run: Ladder, depth: int) -> list[int]:
    """The original layers that a recipe selects."""
    return [op.sources[0].layer for op in run.recipe(depth).layers]


def losses_with(
    model: Intermediate, start: int, count: int, ops: Sequence[Op], *, sequences: slice | None = None
) -> torch.Tensor:
    """Summed loss of each sequence if `ops` stood in the place of `count` layers."""
    return next(model.losses_with([Change(start=start, count=count, ops=tuple(ops))], sequences=sequences))


def take(healer: StepHealer, start: int, count: int, op: Op | None) -> dict[str, Any]:
    """What the healer reports of one step that it takes."""
    return healer.take(Step(start=start, count=count, op=op, evidence={}))
