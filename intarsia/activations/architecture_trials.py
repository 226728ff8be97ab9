"""What is tried on a small model to see whether an architecture is right. Each trial gives a relative error, or a fact.

Shape suffixes: `B` sequences, `T` tokens, `D` residual width, `C` inputs of an output projection.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from intarsia.activations.hooks import output_projections
from intarsia.activations.stream import LayerStream
from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.building.loaded_model import LoadedModel, twin
from intarsia.building.materialize import assembled, materialize
from intarsia.building.slicing import positions
from intarsia.recipe.algebra import concat_of
from intarsia.recipe.recipe import Concat, Cut, LayerRef, Op, Select, Variant, identity

NAME = "model"
_SEQUENCES, _TOKENS, _WRITTEN = 3, 20, 12
_NOISE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A small model and tokens to run through it, the last sequences of which are padded."""

    resident: LoadedModel
    stream: LayerStream
    ids_BT: Tensor
    mask_BT: Tensor

    @classmethod
    def of(cls, resident: LoadedModel) -> Trial:
        """Random tokens for a model."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, resident.architecture.vocabulary, (_SEQUENCES, _TOKENS), generator=generator)
        lengths = torch.tensor([_TOKENS, _TOKENS // 2, 2])[:, None]
        mask = torch.arange(_TOKENS)[None, :] < lengths
        return cls(
            resident=resident, stream=LayerStream(resident.model, resident.architecture), ids_BT=ids, mask_BT=mask
        )

    @property
    def architecture(self) -> Architecture:
        """The small model's architecture."""
        return self.resident.architecture

    def through(self, layer: int, module: nn.Module) -> Tensor:
        """What a module in the place of a layer makes of that layer's input in the original model."""
        entry = self.stream.enter(self.ids_BT, None)
        h_BTD = entry.h_BTD
        for index in range(layer):
            h_BTD = self.stream.run(self.resident.layers[index], h_BTD, entry.calls[index])
        return self.stream.run(module, h_BTD, entry.calls[layer])

    def features(self, part: Part, module: nn.Module, donor: int) -> Tensor:
        """An output projection's inputs `[N, C]` when a module reads the embedding as if it were layer `donor`."""
        entry = self.stream.enter(self.ids_BT, None)
        seen: list[Tensor] = []
        with output_projections(module, self.architecture, lambda which, x: seen.append(x) if which == part else None):
            self.stream.run(module, entry.h_BTD, entry.calls[donor])
        return seen[0].reshape(-1, seen[0].shape[-1])


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def parity(trial: Trial) -> float:
    """Layer by layer, two texts in turns and one of them padded, against the model's own forward: logits.

    So layers that leave something for later ones are found.
    """
    texts = [(trial.ids_BT, trial.mask_BT), (trial.ids_BT.flip(0, 1), None)]
    calls = [trial.stream.calls(*text) for text in texts]
    states = [trial.stream.enter(*text).h_BTD for text in texts]
    for index, layer in enumerate(trial.resident.layers):
        states = [trial.stream.run(layer, h, call[index]) for h, call in zip(states, calls, strict=True)]
    worst = 0.0
    for h_BTD, (ids_BT, mask_BT) in zip(states, texts, strict=True):
        keep = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT
        own = trial.resident.model(ids_BT, attention_mask=None if mask_BT is None else mask_BT.long(), use_cache=False)
        worst = max(worst, difference(trial.stream.logits(h_BTD, ids_BT, mask_BT)[keep], own.logits[keep]))
    return worst


def foresight(trial: Trial) -> float:
    """By how much later tokens change the logits of earlier ones."""
    changed = trial.ids_BT.clone()
    half = _TOKENS // 2
    changed[:, half:] = changed[:, half:].flip(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several split the products of experts by their number of rows, and round otherwise
    try:
        model = trial.resident.model
        logits, others = (model(ids, use_cache=False).logits[:, :half] for ids in (trial.ids_BT, changed))
    finally:
        torch.set_num_threads(threads)
    return difference(others, logits)


def streamed(trial: Trial) -> float:
    """A model whose layers are read one by one, against the one in memory."""
    other = LoadedModel(trial.resident.checkpoint, device=trial.resident.device, stream=True)
    return difference(other.model(trial.ids_BT).logits, trial.resident.model(trial.ids_BT).logits)


def built(trial: Trial, ops: Sequence[Op], folder: Path) -> dict[str, float]:
    """A model of these layers, built to disk and loaded: against the one in memory and, of whole layers alone, against
    the original in which the others are skipped; generation with and without cache; and its config's lists."""
    kept = [op.sources[0].layer for op in ops]
    variant = Variant(name=NAME, model=trial.resident.checkpoint.model)
    recipe = identity(variant, trial.architecture.n_layers).with_layers(ops)
    materialize(recipe, {NAME: trial.resident.checkpoint}, folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    logits, found = loaded(trial.ids_BT).logits, dict[str, float]()
    if all(isinstance(op, Select) for op in ops):
        entry = trial.stream.enter(trial.ids_BT, None)
        h_BTD = entry.h_BTD
        for layer in kept:
            h_BTD = trial.stream.run(trial.resident.layers[layer], h_BTD, entry.calls[layer])
        found["removal"] = difference(logits, trial.stream.logits(h_BTD, trial.ids_BT, None))
    return {
        **found,
        "logits": difference(logits, assembled(recipe, trial.resident)(trial.ids_BT).logits),
        "generation": _generation(loaded, trial.ids_BT[:1, :9]),
        "config": float(len(list(_wrong_lists(loaded, trial.architecture, kept)))),
    }


def writers(trial: Trial, layer: int) -> dict[str, float]:
    """The linear modules of a layer whose output is added to the residual stream times a number, in the order in which
    they are run.

    Each is tried with everything beside the part of the layer that holds it switched off: a change of its output must
    then be a change of the layer's.
    """
    module, width = trial.resident.layers[layer], trial.architecture.width
    entry = trial.stream.enter(trial.ids_BT, None)
    h_BTD = entry.h_BTD
    for index in range(layer):
        h_BTD = trial.stream.run(trial.resident.layers[index], h_BTD, entry.calls[index])
    shift_D = torch.randn(width, generator=torch.Generator().manual_seed(1))
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    run: list[str] = []
    found: dict[str, float] = {}
    with ExitStack() as stack:
        for name, part in linears.items():
            handle = part.register_forward_hook(lambda *_, name=name: run.append(name))
            stack.callback(handle.remove)
        trial.stream.run(module, h_BTD, entry.calls[layer])
    for name in dict.fromkeys(run):
        if linears[name].out_features != width:
            continue
        outputs = []
        for shift in (torch.zeros(width), shift_D):
            with ExitStack() as stack:
                for child_name, child in module.named_children():
                    if not f"{name}.".startswith(f"{child_name}."):
                        stack.callback(child.register_forward_hook(_nothing).remove)
                moved = linears[name].register_forward_hook(lambda _, args, out, by=shift: out + by)
                stack.callback(moved.remove)
                outputs.append(trial.stream.residual(trial.stream.run(module, h_BTD, entry.calls[layer])))
        change_BTD = outputs[1] - outputs[0]
        scale = float((change_BTD * shift_D).sum() / (shift_D.square().sum() * change_BTD[..., 0].numel()))
        if abs(scale) > _NOISE and difference(change_BTD, scale * shift_D.expand_as(change_BTD)) < _NOISE:
            found[name] = scale
    return found


def _nothing(module: nn.Module, args: object, out: Any) -> Any:
    """In the place of what a module gives: zeros."""
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)


def order(trial: Trial, layer: int) -> float:
    """A layer with its pieces in another order, norms folded, computes what it did: each keeps where it starts."""
    rng = random.Random(0)
    pieces = {
        part: rng.sample(range(trial.architecture.n_pieces(part)), trial.architecture.n_pieces(part)) for part in PARTS
    }
    op = Concat(cuts=(_cut(layer, pieces["attention"], pieces["mlp"], 1.0),), norm="fold")
    return difference(
        trial.through(layer, trial.resident.module(op)), trial.through(layer, trial.resident.layers[layer])
    )


def everything_and_nothing(trial: Trial, layers: tuple[int, int]) -> float:
    """All pieces of one layer and none of another: the first one, and by way of the planners the very same op."""
    architecture, (first, second) = trial.architecture, layers
    whole = {part: range(architecture.n_pieces(part)) for part in PARTS}
    op = concat_of(
        [select(first), select(second)],
        [whole, {}],
        weights=[dict.fromkeys(PARTS, 1.0), dict.fromkeys(PARTS, 0.0)],
        norm="fold",
        architecture=architecture,
    )
    if op != select(first):
        return float("inf")
    by_hand = Concat(cuts=(_cut(first, whole["attention"], whole["mlp"], 1.0), _cut(second, (), (), 0.0)), norm="fold")
    return difference(
        trial.through(first, trial.resident.module(by_hand)), trial.through(first, trial.resident.layers[first])
    )


def own_inputs(trial: Trial, part: Part, layers: tuple[int, int]) -> float:
    """Pieces of two layers in one: whether each still computes what it computed in its own layer, on equal input."""
    op = halves(trial.architecture, layers)
    modules = [_alone(trial, part, trial.resident.module(op))]
    modules += [_alone(trial, part, trial.resident.layers[layer]) for layer in layers]
    joined, *sources = (trial.features(part, module, layers[0]) for module in modules)
    # The writer's columns: one run of features for each piece.
    writer = trial.architecture.writer(part)
    expected = [
        source[:, positions(trial.architecture, writer, cut.pieces(part))[0]]
        for cut, source in zip(op.cuts, sources, strict=True)
    ]
    return difference(joined, torch.cat(expected, dim=1))


def shallower(architecture: Architecture, layers: tuple[int, int]) -> list[Op]:
    """Two layers in one, and one layer fewer, so that all after it have new places."""
    rest = [select(layer) for layer in range(architecture.n_layers) if layer not in layers]
    return [*rest[1:2], halves(architecture, layers), *rest[2:]]


def halves(architecture: Architecture, layers: tuple[int, int]) -> Concat:
    """Every other piece of each of two layers, in equal shares."""
    kept = [{part: range(index, architecture.n_pieces(part), 2) for part in PARTS} for index in range(2)]
    return Concat(
        cuts=tuple(
            _cut(layer, pieces["attention"], pieces["mlp"], 0.5) for layer, pieces in zip(layers, kept, strict=True)
        ),
        norm="fold",
    )


def _generation(model: Any, ids_BT: Tensor) -> float:
    """Share of tokens that are others with the cache than without it."""
    settings = {"max_new_tokens": _WRITTEN, "min_new_tokens": _WRITTEN, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(ids_BT, use_cache=use, **settings) for use in (True, False))
    return float((cached != plain).float().mean())


def _wrong_lists(model: nn.Module, architecture: Architecture, sources: Sequence[int]) -> Iterator[str]:
    """Per-layer lists of a loaded config that do not say what the layers were."""
    for name, values in architecture.per_layer.items():
        if list(getattr(model.config, name)) != [values[layer] for layer in sources]:
            yield name


def _alone(trial: Trial, part: Part, module: nn.Module) -> nn.Module:
    """The layer with what stands before a part switched off, so that the part reads the layer's own input."""
    if part == "attention":
        return module
    module = twin(module)
    writer = module.get_submodule(trial.architecture.writer("attention").module)
    for name, parameter in list(writer.named_parameters()):
        setattr(writer, name, nn.Parameter(torch.zeros_like(parameter), requires_grad=False))
    return module


def select(layer: int) -> Select:
    """A whole layer of the small model."""
    return Select(source=LayerRef(variant=NAME, layer=layer))


def _cut(layer: int, groups: Sequence[int], channels: Sequence[int], weight: float) -> Cut:
    return Cut(
        source=LayerRef(variant=NAME, layer=layer),
        kv_groups=tuple(groups),
        channels=tuple(channels),
        weights=dict.fromkeys(PARTS, weight),
    )
