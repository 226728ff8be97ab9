"""Layers that are in memory only while they are used, and layers spread over several devices."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn

from intarsia.building.loading import set_parameter
from intarsia.checkpoint.files import give_back
from intarsia.recipe.recipe import Op

Values: TypeAlias = Mapping[str, Tensor]
"""A layer's tensors by the names of its parameters, on the device that it runs on."""

_PAGE = 4096


@dataclass(kw_only=True, eq=False)
class _Rest:
    """What is known of a layer while it is at rest: how to read it, and its parameters without values."""

    op: Op
    read: Callable[[], Values]
    empty: Mapping[str, nn.Parameter]
    users: int = 0
    runs: list[Any] = field(default_factory=list)


class Offload:
    """Keeps layers at rest.

    Attributes:
        reads: how often a layer was read, by what it is made of.
        in_memory: how many layers are in memory now; `most`: how many were at once, at most.
    """

    def __init__(self, device: torch.device) -> None:
        self.reads: Counter[Op] = Counter()
        self.most = 0
        self._device = device
        self._known: WeakKeyDictionary[nn.Module, _Rest] = WeakKeyDictionary()
        self._thread: ThreadPoolExecutor | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self.in_memory = 0

    def put(self, module: nn.Module, op: Op, read: Callable[[], Values]) -> None:
        """Take a layer, whose parameters have no values, into keeping; `read` gives them."""
        self._known[module] = _Rest(op=op, read=read, empty=dict(module.named_parameters()))
        module.register_forward_pre_hook(self._before_run)
        module.register_forward_hook(self._after_run, always_call=True)

    @contextmanager
    def awake(self, module: nn.Module) -> Iterator[nn.Module]:
        """The layer, with its values while the block runs."""
        rest = self._known.get(module)
        if rest is None:  # it has values of its own
            yield module
            return
        self._wake(module, rest, None)
        try:
            yield module
        finally:
            self._sleep(module, rest)

    def walk(self, modules: Iterable[nn.Module], *, ahead: bool = True) -> Iterator[nn.Module]:
        """One layer after the other, each with its values until the next is asked for.

        Args:
            ahead: read the next one meanwhile; not where work on a layer takes long, and its memory.
        """
        path = list(modules)
        coming: Future[Values] | None = None
        try:
            for index, module in enumerate(path):
                rest, read = self._known.get(module), coming
                coming = None
                if rest is not None:
                    self._wake(module, rest, read)
                del read
                try:
                    following = self._known.get(path[index + 1]) if index + 1 < len(path) else None
                    if ahead and following is not None and not following.users:
                        coming = self._submit(following)
                    yield module
                finally:
                    if rest is not None:
                        self._sleep(module, rest)
        finally:
            if coming is not None:
                with suppress(Exception):  # nobody asks for it any more
                    coming.result()
                    self._count(-1)

    def _wake(self, module: nn.Module, rest: _Rest, ahead: Future[Values] | None) -> None:
        if not rest.users:
            values = (ahead or self._submit(rest)).result()
            for name, value in values.items():
                if value.is_cuda:  # made on another stream: not to be reused before this one is done with it
                    value.record_stream(torch.cuda.current_stream(value.device))
                set_parameter(module, name, value)
        elif ahead is not None:
            ahead.result()
            self._count(-1)
        rest.users += 1

    def _sleep(self, module: nn.Module, rest: _Rest) -> None:
        rest.users -= 1
        if not rest.users:
            for name, parameter in rest.empty.items():
                set_parameter(module, name, parameter)
            self._count(-1)
            give_back()

    def _before_run(self, module: nn.Module, args: Any) -> None:
        rest = self._known.get(module)
        if rest is not None:
            rest.runs.append(None if rest.users else self.awake(module))
            if rest.runs[-1] is not None:
                rest.runs[-1].__enter__()

    def _after_run(self, module: nn.Module, args: Any, output: Any) -> None:
        rest = self._known.get(module)
        awake = rest.runs.pop() if rest is not None and rest.runs else None
        if awake is not None:
            awake.__exit__(None, None, None)

    def _submit(self, rest: _Rest) -> Future[Values]:
        # Always in the thread: what is made under `inference_mode` could take no part in a gradient.
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="intarsia-read")
        return self._thread.submit(self._read, rest)

    def _read(self, rest: _Rest) -> Values:
        self._count(+1)
        try:
            self.reads[rest.op] += 1
            if self._copies is None:
                values = rest.read()
                for value in values.values():
                    _touch(value)
                return values
            with torch.cuda.stream(self._copies):
                values = {
                    name: (value if value.is_cuda else value.pin_memory()).to(self._device, non_blocking=True)
                    for name, value in rest.read().items()
                }
                self._copies.synchronize()
            return values
        except BaseException:
            self._count(-1)
            raise

    def _count(self, change: int) -> None:
        with self._lock:
            self.in_memory += change
            self.most = max(self.most, self.in_memory)


def _touch(value: Tensor) -> None:
    """Read every page of a mapped tensor now, in this thread, so that whoever computes with it need not wait."""
    flat = value.detach().reshape(-1).view(torch.uint8) if value.is_contiguous() and value.numel() else None
    if flat is not None:
        flat[::_PAGE].max()


_SHARE_OF_FREE = 0.8  # the rest is for hidden states and logits


def place_layers(model: nn.Module, layers: Sequence[nn.Module], devices: Sequence[torch.device]) -> list[torch.device]:
    """Move a model, and give each layer its device.

    Returns:
        The device of every layer, in order.
    """
    sizes = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in inside)
    free = [free_bytes(device) * _SHARE_OF_FREE for device in devices]
    free[0] -= outside
    found = [devices[block] for block in blocks(sizes, free)]
    layered = {id(module) for layer in layers for module in layer.modules()}
    for part in model.modules():
        if id(part) not in layered:
            _move_own(part, devices[0])
    for layer, device in zip(layers, found, strict=True):
        nn.Module.to(layer, device)
    return found


def blocks(sizes: Sequence[int], free: Sequence[float]) -> list[int]:
    """Which block each layer belongs to: in order, each block's share of the bytes that of its room."""
    memory_budget = [max(share, 0.0) for share in free]
    memory_budget = memory_budget if sum(memory_budget) > 0 else [1.0] * len(free)
    ends = [sum(sizes) * sum(memory_budget[: index + 1]) / sum(memory_budget) for index in range(len(memory_budget))]
    found, before = [], 0.0
    for size in sizes:
        middle = before + size / 2
        found.append(next((index for index, end in enumerate(ends) if middle <= end), len(memory_budget) - 1))
        before += size
    return found


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else psutil.virtual_memory().available


def _move_own(module: nn.Module, device: torch.device) -> None:
    """Move what a module has itself, not what its parts have."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.device != device:
            parameter.data = parameter.data.to(device)  # in place: a tied head stays tied
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)
