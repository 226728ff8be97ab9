"""What the training of one layer needs, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.calibration.stream import LayerCall
from intarsia.errors import UserError
from intarsia.healing.settings import LayerwiseSettings
from intarsia.healing.states import States
from intarsia.healing.training import load_state

Tell = Callable[[int, float], None]
"""Told after every step: the tokens of the step, and its loss."""


@dataclass(frozen=True, kw_only=True)
class LayerTask:
    """Everything that the training of one layer needs.

    Attributes:
        index: which output layer.
        inputs, targets: H^start and H^stop of the teacher; the last `held_out` sequences are not trained on.
        mask: True at real tokens; None where all are.
        calls: the layer's arguments, by the number of sequences in a batch.
        names: the layer's tensors that are trained.
        folder: where state is kept; None keeps none.
    """

    index: int
    module: nn.Module
    inputs: States
    targets: States
    sequences: int
    held_out: int
    seq_len: int
    mask: Tensor | None
    calls: Mapping[int, LayerCall]
    names: tuple[str, ...]
    settings: LayerwiseSettings
    folder: Path | None
    device: str


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What the training of one layer gave. Losses are held-out ones; `stopped` says why it ended early, if it did."""

    layer: int
    loss_before: float
    loss_after: float
    steps: int
    tokens: int
    seconds: float
    stopped: str | None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained layer: its new tensors, or none where nothing was better than what it had."""

    report: LayerReport
    tensors: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)


def finished(folder: Path | None, index: int) -> Trained | None:
    """What an earlier run has finished of a layer."""
    found = None if folder is None else load_state(state_path(folder, index, "done"))
    if found is None:
        return None
    tensors, facts = found
    return Trained(
        report=LayerReport(**facts), tensors={name: np.asarray(tensor.numpy()) for name, tensor in tensors.items()}
    )


def state_path(folder: Path, index: int, kind: str) -> Path:
    """Where a layer's state (kind `state`), or what came of it (`done`), is kept."""
    return folder / f"layer-{index:03d}.{kind}.safetensors"


def on_device(call: LayerCall, device: torch.device, dtype: torch.dtype) -> LayerCall:
    """A layer's arguments on a device, floating ones in a dtype."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, (tuple, list)):
            return type(value)(moved(entry) for entry in value)
        return value

    return LayerCall(
        args=tuple(moved(value) for value in call.args),
        kwargs={key: moved(value) for key, value in call.kwargs.items()},
    )


def trained_names(parameters: Sequence[str], only: Sequence[str]) -> tuple[str, ...]:
    """The parameters of a layer that `only` names (all if it is empty): by tensor, by module, or by part of a name.

    Raises:
        UserError: a name fits none.
    """

    def fits(name: str, word: str) -> bool:
        return f".{word}." in f".{name}."

    for word in only:
        if not any(fits(name, word) for name in parameters):
            raise UserError.of(
                where="--only",
                expected=f"tensors or modules of a layer: {', '.join(parameters)}",
                found=repr(word),
                remedy="Name one of them, or a part of a name, such as down_proj or mlp.",
            )
    return tuple(name for name in parameters if not only or any(fits(name, word) for word in only))
