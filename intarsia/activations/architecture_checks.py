"""Whether an architecture is right: every check of a family, on a small model of its kind.

Where no family file describes the layers of a model, the checks come before any work on it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from intarsia.activations import architecture_trials as trials
from intarsia.activations.stream import State, probe
from intarsia.architecture.spec import PARTS, Architecture
from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from intarsia.inspection.small import small_config
from intarsia.inspection.structure import config_of, on_meta, problem_of, removals
from intarsia.progress import current, quiet_transformers

_EXACT = 1e-4
"""Relative error of float32 arithmetic in another order, through a few layers."""
_FAILS = {
    "layers": "no layer can be removed",
    "tensors": "its class and files do not agree on the tensors",
    "parity": "its layers, run one by one, are not the model",
    "causal": "a token reads later ones",
    "removal": "a model without some layers is not the one in which they are skipped",
    "build and load": "a model without some layers cannot be built and loaded",
    "generation": "with a cache it generates something else than without",
    "config": "its config does not follow the layers",
    "streaming": "its layers, read one by one, are not the model",
}
"""What a failed check of layers that can only be removed says of the model."""
_LEAK = 3e-5
"""The same of sums over tokens that a later one must not change at all."""


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
        """What a failure says of the model."""
        words = _FAILS.get(self.check, self.check)
        return words if self.error is not None else f"{words} ({self.note})"


def check_rows(large: Architecture, folder: Path) -> Iterator[CheckRow]:
    """Every check of a family, on a small model like `large`; files go into `folder`."""
    small_model(small_config(large)).save_pretrained(folder / "small")
    try:
        checkpoint = Checkpoint.open(folder / "small", model="small")
    except UserError as error:
        first, *more = error.problems
        note = f"{first}{f' And {len(more)} more like this.' if more else ''}".replace(str(folder), "")
        yield CheckRow(check="tensors", result="failed", error=None, note=note.removeprefix("/small: "))
        return
    small = checkpoint.architecture
    note = f"{len(small.layer_shapes())} in a layer, of the expected shapes"
    yield CheckRow(check="tensors", result="ok", error=None, note=note)
    try:
        trial = trials.Trial.of(LoadedModel(checkpoint, device=torch.device("cpu")))
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

    yield _row("parity", "layer by layer is the model's own forward", partial(trials.parity, trial))
    for kind in dict.fromkeys(kinds):
        note = f"pieces of a layer ({kind}) in another order, norms folded" if kind else "pieces in another order"
        yield _row("pieces", note, partial(trials.order, trial, kinds.index(kind)))
    yield _row("ratio [1, 0]", "is dropping the second layer", partial(trials.everything_and_nothing, trial, same))
    for part in PARTS:
        if not small.is_mixture(part):
            work = partial(trials.own_inputs, trial, part, same)
            yield _row(f"merge, {part}", "pieces of two layers compute what they did", work, approximated=approximated)
    yield from _round_trip(partial(trials.built, trial, trials.shallower(small, same), folder / "built"))


def _removal_rows(trial: trials.Trial, folder: Path) -> Iterator[CheckRow]:
    """Where no family file describes the layers: removing some is skipping them."""
    found, whole = removals(trial.architecture), range(trial.architecture.n_layers)
    if not found:
        reason = problem_of(trial.architecture, [layer for layer in whole if layer != len(whole) // 2])
        yield CheckRow(check="layers", result="failed", error=None, note=reason or "each is the last of its kind")
    yield _row("parity", "layer by layer is the model's own forward", partial(trials.parity, trial))
    yield _row("causal", "no token reads a later one", partial(trials.foresight, trial), least=_LEAK)
    for number, kept in enumerate(found):
        dropped = ", ".join(str(layer) for layer in whole if layer not in kept)
        ops = [trials.select(layer) for layer in kept]
        yield from _round_trip(partial(trials.built, trial, ops, folder / f"built-{number}"), dropped)
    yield _row("streaming", "layers read one by one give what the model gives", partial(trials.streamed, trial))


def _round_trip(work: Callable[[], Mapping[str, float]], dropped: str = "") -> Iterator[CheckRow]:
    notes = {
        "removal": ("removal", f"a model without layers {dropped} is the original in which they are skipped"),
        "logits": ("build and load", "a shallower model from disk is the one in memory"),
        "generation": ("generation", "with the cache as without"),
        "config": ("config", "its per-layer lists follow the layers"),
    }
    try:
        found = work()
    except Exception as error:  # whatever breaks here is what the user wants to see in the table
        yield _broken("build and load", error)
    else:
        yield from (_compared(*notes[key], value) for key, value in found.items())


def _row(
    check: str, note: str, work: Callable[[], float], *, approximated: bool = False, least: float = _EXACT
) -> CheckRow:
    try:
        return _compared(check, note, work() * _EXACT / least, approximated=approximated)
    except Exception as error:  # whatever breaks here is what the user wants to see in the table
        return _broken(check, error)


def _compared(check: str, note: str, error: float, *, approximated: bool = False) -> CheckRow:
    result = "ok" if error < _EXACT else "approximated" if approximated else "failed"
    return CheckRow(check=check, result=result, error=error if error < float("inf") else None, note=note)


def _broken(check: str, error: Exception) -> CheckRow:
    words = " ".join(str(error).split())[:300]
    return CheckRow(check=check, result="failed", error=None, note=f"{type(error).__name__}: {words}")


def small_model(config: Mapping[str, Any], *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in evaluation mode, in which nothing is neutral: norms are no ones, biases no zeros.

    Raises:
        UserError: transformers does not know the model type, or cannot make a model of this config.
    """
    rest = {key: value for key, value in config.items() if key != "model_type"}
    model_type = str(config["model_type"])
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"transformers {transformers.__version__} has no model type {model_type!r} to build a small model.",
            "Correct model_type in the config, or install a version of transformers that has it.",
        )
    try:
        made = AutoConfig.for_model(model_type, **rest)
        assert isinstance(made, PreTrainedConfig)
        model = AutoModelForCausalLM.from_config(made)
    except Exception as error:
        # What a config class objects to, and how, differs between families and versions.
        words = " ".join(str(error).split())[:300]
        raise UserError(
            f"transformers makes no small model of type {model_type}: {type(error).__name__}: {words}.",
            "Set the fields that must fit together in the family file's table [tiny].",
        ) from error
    assert isinstance(model, PreTrainedModel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            parameter.copy_(1.0 + 0.3 * noise if is_norm else (0.5 if "embed" in name else 0.2) * noise)
    return model.float().eval()


@torch.no_grad()
def verified(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, where a small model of its kind passes every check; layers that can only be removed are checked
    before work.

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
                f"`intarsia anatomy check {checkpoint.folder / 'config.json'}` shows every check. Use another model.",
            )
        small = Checkpoint.open(Path(folder) / "small", model="small")
        trial = trials.Trial.of(LoadedModel(small, device=torch.device("cpu")))
        found, without = _known_writers(trial)
    if without:
        current().say(
            f"closed form: no output projection is recognised in {', '.join(without)}; these layers stay as they are"
        )
    return replace(
        checkpoint, architecture=replace(architecture, inspected=replace(architecture.inspected, writers=found))
    )


def _known_writers(trial: trials.Trial) -> tuple[dict[str, float], list[str]]:
    """The modules that write to the residual stream, and the kinds of layers in which there is none."""
    architecture, found, wrong, without = trial.architecture, dict[str, float](), set[str](), []
    assert architecture.inspected is not None
    in_files = {parameter for parameter, _ in architecture.inspected.rows.values()}
    kinds = architecture.layer_types or ("",) * architecture.n_layers
    for kind in dict.fromkeys(kinds):
        layer = kinds.index(kind)
        own = {name: scale for name, scale in trials.writers(trial, layer).items() if f"{name}.weight" in in_files}
        names = {name for name, _ in trial.resident.layers[layer].named_modules()}
        wrong |= {name for name in found if name in names and abs(own.get(name, 0.0) - found[name]) > _EXACT}
        found |= own
        if not own:
            without.append(kind or "its layers")
    return {name: scale for name, scale in found.items() if name not in wrong}, without


def state_of(architecture: Architecture) -> State:
    """How a model's state is laid out, without its weights: seen from its class, and from a small model."""
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
