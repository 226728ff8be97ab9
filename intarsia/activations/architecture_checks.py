"""Checks of an architecture: every check of a family, on a small model of its kind.

For models without a family file, the checks run before any work. Each check gives a relative error, or a fact.

Shape suffixes: `B` sequences, `T` tokens, `D` residual width, `C` inputs of an output projection.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from intarsia.activations.statistics import output_projections
from intarsia.activations.stream import Entry, LayerCall, LayerStream, State, probe
from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.building.loaded_model import LoadedModel, twin
from intarsia.building.materialize import assembled, materialize
from intarsia.building.slicing import positions
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError, in_words
from intarsia.inspection.small import small_config, small_model
from intarsia.inspection.structure import config_of, on_meta, problem_of, removals
from intarsia.progress import current, quiet_transformers
from intarsia.recipe.algebra import concat_of
from intarsia.recipe.recipe import Concat, Cut, LayerRef, Op, Select, Variant, identity

NAME = "model"
_SEQUENCES, _TOKENS, _WRITTEN = 3, 20, 12
_NOISE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A small model and tokens to run through it; the last sequences are padded."""

    resident: LoadedModel
    stream: LayerStream
    ids_BT: Tensor
    mask_BT: Tensor

    @classmethod
    def of(cls, resident: LoadedModel) -> Trial:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, resident.architecture.vocabulary, (_SEQUENCES, _TOKENS), generator=generator)
        lengths = torch.tensor([_TOKENS, _TOKENS // 2, 2])[:, None]
        mask = torch.arange(_TOKENS)[None, :] < lengths
        return cls(
            resident=resident, stream=LayerStream(resident.model, resident.architecture), ids_BT=ids, mask_BT=mask
        )

    @property
    def architecture(self) -> Architecture:
        return self.resident.architecture

    def through(self, layer: int, module: nn.Module) -> Tensor:
        """The output of a module in place of a layer, for that layer's input in the original model."""
        return self.stream.run(module, *self.before(layer))

    def before(self, layer: int) -> tuple[Tensor, LayerCall]:
        """A layer's input in the original model, and its other arguments."""
        entry = self.stream.enter(self.ids_BT, None)
        return self.run(range(layer), entry), entry.calls[layer]

    def run(self, layers: Iterable[int], entry: Entry) -> Tensor:
        """The output of these original layers in order, from the embedding."""
        h_BTD = entry.h_BTD
        for layer in layers:
            h_BTD = self.stream.run(self.resident.layers[layer], h_BTD, entry.calls[layer])
        return h_BTD

    def features(self, part: Part, module: nn.Module, donor: int) -> Tensor:
        """An output projection's inputs `[N, C]` if a module reads the embedding in place of layer `donor`."""
        entry = self.stream.enter(self.ids_BT, None)
        seen: list[Tensor] = []
        with output_projections(module, self.architecture, lambda which, x: seen.append(x) if which == part else None):
            self.stream.run(module, entry.h_BTD, entry.calls[donor])
        return seen[0].reshape(-1, seen[0].shape[-1])


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def parity(trial: Trial) -> float:
    """Compare logits of the layer loop with the model's own forward, on two texts in turns, one of them padded.

    This finds layers that pass on something besides the hidden state.
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
    """The effect of later tokens on the logits of earlier ones."""
    changed = trial.ids_BT.clone()
    half = _TOKENS // 2
    changed[:, half:] = changed[:, half:].flip(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads split the products of experts by rows, and round differently
    try:
        model = trial.resident.model
        logits, others = (model(ids, use_cache=False).logits[:, :half] for ids in (trial.ids_BT, changed))
    finally:
        torch.set_num_threads(threads)
    return difference(others, logits)


def streamed(trial: Trial) -> float:
    """Compare a streamed model with the one in memory."""
    other = LoadedModel(trial.resident.checkpoint, device=trial.resident.device, stream=True)
    return difference(other.model(trial.ids_BT).logits, trial.resident.model(trial.ids_BT).logits)


def built(trial: Trial, ops: Sequence[Op], folder: Path) -> dict[str, float]:
    """Build a model of these layers and load it: compare it with the one in memory and, for whole layers only, with the
    original without the others; generation with and without cache; and the config's lists."""
    kept = [op.sources[0].layer for op in ops]
    variant = Variant(name=NAME, model=trial.resident.checkpoint.model)
    recipe = identity(variant, trial.architecture.n_layers).with_layers(ops)
    materialize(recipe, {NAME: trial.resident.checkpoint}, folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    logits, found = loaded(trial.ids_BT).logits, dict[str, float]()
    if all(isinstance(op, Select) for op in ops):
        h_BTD = trial.run(kept, trial.stream.enter(trial.ids_BT, None))
        found["removal"] = difference(logits, trial.stream.logits(h_BTD, trial.ids_BT, None))
    settings = {"max_new_tokens": _WRITTEN, "min_new_tokens": _WRITTEN, "do_sample": False, "pad_token_id": 0}
    cached, plain = (loaded.generate(trial.ids_BT[:1, :9], use_cache=use, **settings) for use in (True, False))
    return {
        **found,
        "logits": difference(logits, assembled(recipe, trial.resident)(trial.ids_BT).logits),
        "generation": float((cached != plain).float().mean()),
        # Per-layer lists of the loaded config that do not say what the layers were.
        "config": float(
            sum(
                list(getattr(loaded.config, name)) != [values[layer] for layer in kept]
                for name, values in trial.architecture.per_layer.items()
            )
        ),
    }


def writers(trial: Trial, layer: int) -> dict[str, float]:
    """The linear modules of a layer whose scaled output is added to the residual stream, in the order of execution.

    Each is tested with all other parts of the layer switched off: a change of its output must then be a change of the
    layer's output.
    """
    module, width = trial.resident.layers[layer], trial.architecture.width
    given = trial.before(layer)
    shift_D = torch.randn(width, generator=torch.Generator().manual_seed(1))
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    run: list[str] = []
    found: dict[str, float] = {}
    with ExitStack() as stack:
        for name, part in linears.items():
            handle = part.register_forward_hook(lambda *_, name=name: run.append(name))
            stack.callback(handle.remove)
        trial.stream.run(module, *given)
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
                outputs.append(trial.stream.residual(trial.stream.run(module, *given)))
        change_BTD = outputs[1] - outputs[0]
        scale = float((change_BTD * shift_D).sum() / (shift_D.square().sum() * change_BTD[..., 0].numel()))
        if abs(scale) > _NOISE and difference(change_BTD, scale * shift_D.expand_as(change_BTD)) < _NOISE:
            found[name] = scale
    return found


def _nothing(module: nn.Module, args: object, out: Any) -> Any:
    """Zeros in place of a module's output."""
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)


def order(trial: Trial, layer: int) -> float:
    """A layer with its pieces in another order and norms folded computes the same."""
    rng = random.Random(0)
    pieces = {
        part: rng.sample(range(trial.architecture.n_pieces(part)), trial.architecture.n_pieces(part)) for part in PARTS
    }
    op = Concat(cuts=(_cut(layer, pieces["attention"], pieces["mlp"], 1.0),), norm="fold")
    return difference(
        trial.through(layer, trial.resident.module(op)), trial.through(layer, trial.resident.layers[layer])
    )


def everything_and_nothing(trial: Trial, layers: tuple[int, int]) -> float:
    """All pieces of one layer and none of another give the first layer, and in the planners' algebra the same op."""
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
    """Pieces of two layers in one: each computes the same as in its own layer, on equal input."""
    op = halves(trial.architecture, layers)
    modules = [_alone(trial, part, trial.resident.module(op))]
    modules += [_alone(trial, part, trial.resident.layers[layer]) for layer in layers]
    joined, *sources = (trial.features(part, module, layers[0]) for module in modules)
    # The writer's columns: contiguous features for each piece.
    writer = trial.architecture.writer(part)
    expected = [
        source[:, positions(trial.architecture, writer, cut.pieces(part))[0]]
        for cut, source in zip(op.cuts, sources, strict=True)
    ]
    return difference(joined, torch.cat(expected, dim=1))


def shallower(architecture: Architecture, layers: tuple[int, int]) -> list[Op]:
    """Two layers in one, so that all layers after it have new indices."""
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


def _alone(trial: Trial, part: Part, module: nn.Module) -> nn.Module:
    """The layer with everything before a part switched off, so that the part reads the layer's own input."""
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


_EXACT = 1e-4
"""Relative error of float32 arithmetic in another order, through a few layers."""
_FAILS = {
    "layers": "no layer can be removed",
    "tensors": "its class and files disagree about the tensors",
    "parity": "its layers, run one by one, differ from the model",
    "causal": "tokens attend to later ones",
    "removal": "removing layers differs from skipping them",
    "build and load": "a model without some layers cannot be built and loaded",
    "generation": "generation with a cache differs from generation without",
    "config": "its config does not follow the layers",
    "streaming": "its streamed layers differ from the model",
}
"""The meaning of each failed check of a model whose layers can only be removed."""
_LEAK = 3e-5
"""The tolerance of the causal check."""


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """One check of a family."""

    check: str
    # `ok`, `approximated` (as the family declares) or `failed`
    result: str
    # relative; None if it was not measured
    error: float | None
    note: str

    @property
    def why(self) -> str:
        """The meaning of a failure."""
        words = _FAILS.get(self.check, self.check)
        return words if self.error is not None else f"{words} ({self.note})"


def check_rows(large: Architecture, folder: Path) -> Iterator[CheckRow]:
    """Run every check of a family on a small model like `large`, with files in `folder`."""
    small_model(small_config(large)).save_pretrained(folder / "small")
    try:
        checkpoint = Checkpoint.open(folder / "small", model="small")
    except UserError as error:
        first, *more = error.problems
        note = f"{first}{f' And {len(more)} similar ones.' if more else ''}".replace(str(folder), "")
        yield CheckRow(check="tensors", result="failed", error=None, note=note.removeprefix("/small: "))
        return
    small = checkpoint.architecture
    note = f"{len(small.layer_shapes())} in a layer, of the expected shapes"
    yield CheckRow(check="tensors", result="ok", error=None, note=note)
    try:
        trial = Trial.of(LoadedModel(checkpoint, device=torch.device("cpu")))
    except Exception as error:  # as below
        yield _broken("parity", error)
        return
    if small.removal_only:
        yield from _removal_rows(trial, folder)
        return
    kinds = small.layer_types or ("",) * small.n_layers
    # Two neighbours of one kind may be merged.
    first_of_two = next(index for index in range(small.n_layers - 1) if kinds[index] == kinds[index + 1])
    same, approximated = (first_of_two, first_of_two + 1), bool(small.approximations)

    yield _row("parity", "layer by layer equals the model's own forward", partial(parity, trial))
    for kind in dict.fromkeys(kinds):
        note = f"pieces of a layer ({kind}) in another order, norms folded" if kind else "pieces in another order"
        yield _row("pieces", note, partial(order, trial, kinds.index(kind)))
    yield _row("ratio [1, 0]", "equals dropping the second layer", partial(everything_and_nothing, trial, same))
    for part in PARTS:
        if not small.is_mixture(part):
            work = partial(own_inputs, trial, part, same)
            yield _row(
                f"merge, {part}", "pieces of two layers compute the same as before", work, approximated=approximated
            )
    yield from _round_trip(partial(built, trial, shallower(small, same), folder / "built"))


def _removal_rows(trial: Trial, folder: Path) -> Iterator[CheckRow]:
    """The checks without a family file: removing layers equals skipping them."""
    found, whole = removals(trial.architecture), range(trial.architecture.n_layers)
    if not found:
        reason = problem_of(trial.architecture, [layer for layer in whole if layer != len(whole) // 2])
        yield CheckRow(check="layers", result="failed", error=None, note=reason or "each is the last of its kind")
    yield _row("parity", "layer by layer equals the model's own forward", partial(parity, trial))
    yield _row("causal", "no token attends to a later one", partial(foresight, trial), least=_LEAK)
    for number, kept in enumerate(found):
        dropped = ", ".join(str(layer) for layer in whole if layer not in kept)
        ops = [select(layer) for layer in kept]
        yield from _round_trip(partial(built, trial, ops, folder / f"built-{number}"), dropped)
    yield _row("streaming", "streamed layers equal the model", partial(streamed, trial))


def _round_trip(work: Callable[[], Mapping[str, float]], dropped: str = "") -> Iterator[CheckRow]:
    notes = {
        "removal": ("removal", f"a model without layers {dropped} equals the original that skips them"),
        "logits": ("build and load", "a shallower model from disk equals the one in memory"),
        "generation": ("generation", "equal with and without the cache"),
        "config": ("config", "its per-layer lists follow the layers"),
    }
    try:
        found = work()
    except Exception as error:  # any failure here belongs in the table
        yield _broken("build and load", error)
    else:
        yield from (_compared(*notes[key], value) for key, value in found.items())


def _row(
    check: str, note: str, work: Callable[[], float], *, approximated: bool = False, least: float = _EXACT
) -> CheckRow:
    try:
        return _compared(check, note, work() * _EXACT / least, approximated=approximated)
    except Exception as error:  # any failure here belongs in the table
        return _broken(check, error)


def _compared(check: str, note: str, error: float, *, approximated: bool = False) -> CheckRow:
    result = "ok" if error < _EXACT else "approximated" if approximated else "failed"
    return CheckRow(check=check, result=result, error=error if error < float("inf") else None, note=note)


def _broken(check: str, error: Exception) -> CheckRow:
    return CheckRow(check=check, result="failed", error=None, note=in_words(error))


@torch.no_grad()
def verified(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint if a small model of its kind passes every check; only models whose layers can only be
    removed are checked.

    Raises:
        UserError: a check fails.
    """
    architecture = checkpoint.architecture
    if architecture.inspected is None or architecture.inspected.writers is not None:
        return checkpoint
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="intarsia-check-") as folder:
        failed = [row for row in check_rows(architecture, Path(folder)) if row.result == "failed"]
        if failed:
            raise UserError(
                f"Layers of {checkpoint.model} cannot be removed: on a small model of its kind, "
                + "; ".join(row.why for row in failed[:2])
                + ".",
                f"`intarsia anatomy check {checkpoint.folder / 'config.json'}` lists every check. Use another model.",
            )
        small = Checkpoint.open(Path(folder) / "small", model="small")
        trial = Trial.of(LoadedModel(small, device=torch.device("cpu")))
        found, without = _known_writers(trial)
    if without:
        current().say(
            f"closed form: no output projection is recognised in {', '.join(without)}; these layers are not fitted"
        )
    return replace(
        checkpoint, architecture=replace(architecture, inspected=replace(architecture.inspected, writers=found))
    )


def _known_writers(trial: Trial) -> tuple[dict[str, float], list[str]]:
    """The modules that write to the residual stream, and the kinds of layers without any."""
    architecture, found, wrong, without = trial.architecture, dict[str, float](), set[str](), []
    assert architecture.inspected is not None
    in_files = {parameter for parameter, _ in architecture.inspected.rows.values()}
    kinds = architecture.layer_types or ("",) * architecture.n_layers
    for kind in dict.fromkeys(kinds):
        layer = kinds.index(kind)
        own = {name: scale for name, scale in writers(trial, layer).items() if f"{name}.weight" in in_files}
        names = {name for name, _ in trial.resident.layers[layer].named_modules()}
        wrong |= {name for name in found if name in names and abs(own.get(name, 0.0) - found[name]) > _EXACT}
        found |= own
        if not own:
            without.append(kind or "its layers")
    return {name: scale for name, scale in found.items() if name not in wrong}, without


def state_of(architecture: Architecture) -> State:
    """The layout of a model's state, from its class and a small model, without its weights."""
    width = architecture.width
    if architecture.inspected is None:
        return State.of((1, 2, width), width, ())
    whole = on_meta(config_of(architecture.config, "the config"), "the config")
    with torch.random.fork_rng(devices=[]):
        small = small_model(small_config(architecture))
    layers, small_layers = (model.get_submodule(architecture.layers_in_memory) for model in (whole, small))
    assert isinstance(layers, nn.ModuleList) and isinstance(small_layers, nn.ModuleList)
    _, shape = probe(small, small_layers[0], torch.device("cpu"))
    return State.of((*shape[:-1], width), width, layers)
