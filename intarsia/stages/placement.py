"""Where a model and its hidden states are while it is worked on, as the user asked for it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from intarsia.activations.hidden_store import PREFIX, Room
from intarsia.building.loaded_model import Resident
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import Problem, UserError
from intarsia.stages.setup import device_of, dtype_of


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Attributes:
    devices: the first has embedding and head; layers are laid over all of them.
    dtype: None for the checkpoint's own.
    stream: one layer in memory at a time.
    memory_bytes: what hidden states may take; None for two fifths of what is free.
    """

    devices: tuple[torch.device, ...]
    dtype: torch.dtype | None = None
    stream: bool = False
    memory_bytes: int | None = None

    @property
    def device(self) -> torch.device:
        """The device that data goes to."""
        return self.devices[0]

    def resident(self, checkpoint: Checkpoint, others: Mapping[str, Checkpoint] | None = None) -> Resident:
        """The model, ready to be worked with; recipes may take layers of `others` too, by the variants' names."""
        return Resident(
            checkpoint,
            device=self.device,
            dtype=self.dtype,
            others=others,
            stream=self.stream,
            devices=self.devices,
        )

    def room(self, run: Path | None = None) -> Room:
        """Room for hidden states; what does not fit goes to files in the run folder, where an earlier run may have left
        some when it was killed."""
        if run is not None and run.is_dir():
            for stale in run.glob(f"{PREFIX}*"):
                with suppress(OSError):
                    shutil.rmtree(stale)
        return Room(self.memory_bytes, run)


def placement(
    *,
    device: str | None = None,
    devices: Sequence[str] = (),
    dtype: str | None = None,
    stream: bool = False,
    memory_bytes: int | None = None,
) -> Placement:
    """What the user asked for, checked.

    Raises:
        UserError: there is no such device or dtype, or what is asked for does not go together.
    """
    if device is not None and devices:
        raise UserError.of(
            where="--device, --devices",
            expected="one of them",
            found="both",
            remedy="--devices names all devices that layers are laid over; the first has embedding and head.",
        )
    if stream and len(devices) > 1:
        raise UserError.of(
            where="--stream, --devices",
            expected="one device for a streamed model, or several for one that is in memory",
            found=", ".join(devices),
            remedy="Leave --stream out if the layers fit into the devices together, else name one --device.",
        )
    problems: list[Problem] = []
    found: list[torch.device] = []
    for name in devices or (device,):
        try:
            found.append(device_of(name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return Placement(devices=tuple(found), dtype=dtype_of(dtype), stream=stream, memory_bytes=memory_bytes)


def refuse_self_text(name: str) -> UserError:
    """A streamed model cannot write its own text: it would be read once for every token."""
    return UserError.of(
        where=name,
        expected="a text, since a streamed model would be read from disk once for every token that it writes",
        found="self",
        remedy="Give a file or a data set, or let the model write its text once without --stream: it is kept.",
    )
