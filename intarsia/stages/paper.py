"""What a plan would cost for models that are not here, with the formulas that the tool itself uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from intarsia.errors import UserError
from intarsia.healing.settings import ClosedFormSettings
from intarsia.planning.cost import Cost, predict, with_closed_form
from intarsia.planning.ladder import settings_of
from intarsia.planning.settings import Settings
from intarsia.planning.shapes import shape_of
from intarsia.planning.sizes import Held, Sizes
from intarsia.stages.plan_input import check_method
from intarsia.stages.target import depth_for

_LARGEST_BATCH = 32768


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One shape on one kind of device.

    Attributes:
        model_bytes: all weights, in bfloat16.
        petaflops: of planning, at most.
        in_memory_device_bytes, streamed_device_bytes: the peak on the device, with the largest batch that fits (of
            `batch_tokens` tokens, where it is streamed); None where one sequence does not.
        closed_form_device_bytes: of the streamed closed form; None where it does not fit.
        host_bytes: memory beside the device's; `disk_bytes`: hidden states that are spilled.
    """

    shape: str
    layers: int
    target: int
    model_bytes: int
    layer_forwards: int
    petaflops: float
    hidden_bytes: int
    device_memory_bytes: int
    in_memory_device_bytes: int | None
    streamed_device_bytes: int | None
    batch_tokens: int | None
    closed_form_device_bytes: int | None
    host_bytes: int
    disk_bytes: int


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What planning would cost."""

    method: str
    tokens: int
    memory_bytes: int
    rows: tuple[PaperRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


def plan_on_paper(
    shapes: Sequence[str],
    device_memory: Sequence[int],
    *,
    layers: int | None = None,
    sparsity: float | None = None,
    method: str = "come",
    settings: Settings | None = None,
    tokens: int = 65536,
    seq_len: int = 512,
    memory_bytes: int | None = None,
) -> Paper:
    """The cost of planning on devices of that much memory, with the model in it and streamed to it.

    Args:
        shapes: names in `shapes.toml`, or paths of configs.
        device_memory: bytes, for a table with a row for each.
        memory_bytes: what hidden states may take of the host's; by default 8 GB.

    Raises:
        UserError: there is no such shape, or the target does not fit it.
    """
    check_method(method)
    memory_bytes = 8 * 10**9 if memory_bytes is None else memory_bytes
    if not device_memory:
        raise UserError.of(
            where="--device-memory",
            expected="the memory of a device, such as 24GB",
            found="none",
            remedy="Name one or more, separated by commas.",
        )
    rows = []
    for name in shapes:
        sizes = Sizes.on_paper(shape_of(name))
        anatomy = sizes.anatomy
        parameters = sizes.weight_bytes // sizes.itemsize
        target = depth_for(anatomy, parameters, layers=layers, sparsity=sparsity)
        for memory in device_memory:
            job = _Job(sizes, method, settings_of(method, settings), target, tokens, seq_len, memory_bytes)
            rows.append(job.row(name, memory))
    return Paper(method=method, tokens=tokens, memory_bytes=memory_bytes, rows=tuple(rows))


@dataclass(frozen=True)
class _Job:
    sizes: Sizes
    method: str
    settings: Settings | None
    target: int
    tokens: int
    seq_len: int
    memory_bytes: int

    def row(self, name: str, memory: int) -> PaperRow:
        """This job on a device of so much memory."""
        whole, streamed = (self._fits(memory, stream=stream, heal=False) for stream in (False, True))
        healed = self._fits(memory, stream=True, heal=True)
        cost = self._cost(self._held(self.seq_len, stream=True), heal=False)
        return PaperRow(
            shape=name,
            layers=self.sizes.anatomy.n_layers,
            target=self.target,
            model_bytes=self.sizes.weight_bytes,
            layer_forwards=cost.layer_forwards_at_most,
            petaflops=cost.flops_at_most / 1e15,
            hidden_bytes=cost.hidden_bytes,
            device_memory_bytes=memory,
            in_memory_device_bytes=None if whole is None else whole[1].peak_device_bytes,
            streamed_device_bytes=None if streamed is None else streamed[1].peak_device_bytes,
            batch_tokens=None if streamed is None else streamed[0],
            closed_form_device_bytes=None if healed is None else healed[1].peak_device_bytes,
            host_bytes=cost.peak_memory_bytes,
            disk_bytes=cost.spilled_bytes,
        )

    def _fits(self, memory: int, *, stream: bool, heal: bool) -> tuple[int, Cost] | None:
        """The largest batch for which the device suffices, and the cost; batches are halved as the work itself does."""
        batch = max(_LARGEST_BATCH, self.seq_len)
        while batch >= self.seq_len:
            cost = self._cost(self._held(batch, stream=stream), heal=heal)
            assert cost.peak_device_bytes is not None
            if cost.peak_device_bytes <= memory:
                return batch, cost
            batch //= 2
        return None

    def _held(self, batch_tokens: int, *, stream: bool) -> Held:
        return Held(apart=True, stream=stream, devices=1, memory_bytes=self.memory_bytes, batch_tokens=batch_tokens)

    def _cost(self, held: Held, *, heal: bool) -> Cost:
        cost = predict(
            self.sizes,
            self.method,
            self.settings,
            target=self.target,
            tokens=self.tokens,
            seq_len=self.seq_len,
            held=held,
        )
        if not heal:
            return cost
        alone = replace(cost, peak_memory_bytes=0, peak_device_bytes=0)
        return with_closed_form(
            alone, self.sizes, ClosedFormSettings(), target=self.target, tokens=self.tokens, held=held
        )
