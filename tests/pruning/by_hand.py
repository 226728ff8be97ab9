"""What planners are held against, worked out from a model's own forward."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from intarsia.building.loaded_model import Resident
from intarsia.data.corpus import Corpus
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.ladder import climb, planner_of
from intarsia.pruning.run_folder import RunFolder
from intarsia.pruning.settings import Settings
from intarsia.recipe.recipe import Variant, identity
from tests import families


def real_tokens(corpus: Corpus) -> torch.Tensor:
    """True at real tokens, `[N, T]`."""
    return torch.ones_like(corpus.input_ids, dtype=torch.bool) if corpus.mask is None else corpus.mask


def residual_stream(resident: Resident, corpus: Corpus) -> list[torch.Tensor]:
    """H^0 .. H^L `[N, T, D]`, float64; H^L by a hook, because transformers shows it behind the final norm only."""
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


def with_layers(resident: Resident, states: list[dict[str, torch.Tensor]]) -> PreTrainedModel:
    """A model of its own whose layers have these tensors."""
    model = copy.deepcopy(resident.model)
    path, _, name = resident.architecture.family.layers_module.rpartition(".")
    layers = getattr(model.get_submodule(path), name)
    kept = [copy.deepcopy(layers[index]) for index in range(len(states))]
    for layer, state in zip(kept, states, strict=True):
        layer.load_state_dict(state)
    setattr(model.get_submodule(path), name, torch.nn.ModuleList(kept))
    return model


def ladder_of(
    method: str, resident: Resident, corpus: Corpus, folder: object, target: int, settings: Settings | None = None
) -> tuple[RunFolder, str | None, Intermediate]:
    """A run down to a depth, why it stopped, and the model at its end."""
    run = RunFolder.start(folder, {})  # type: ignore[arg-type]
    start = identity(Variant(name="base", model="m"), families.DEPTH)
    depths = run.depths()
    start = run.recipe(depths[-1]) if depths else start
    model = Intermediate(resident, corpus, start.layers, batch_tokens=2 * corpus.seq_len)
    return run, climb(planner_of(method, settings), model, start, target, run), model


def kept_layers(run: RunFolder, depth: int) -> list[int]:
    """The original layers that a recipe selects."""
    return [op.sources[0].layer for op in run.recipe(depth).layers]
