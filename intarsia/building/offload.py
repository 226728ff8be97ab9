"""Offloading: layers that are in memory only while in use, and layers placed on several devices."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TypeAlias
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn

from intarsia.checkpoint.files import give_back
from intarsia.recipe.recipe import Op

Values: TypeAlias = Mapping[str, Tensor]
"""A layer's tensors by parameter name, on the device of the layer."""

_PAGE = 4096


@dataclass(kw_only=True, eq=False)
class _Rest:
    """The state of an offloaded layer: how to read it, and its parameters without values."""

    op: Op
    read: Callable[[], Values]
    empty: Mapping[str, nn.Parameter]
    # Number of open blocks and running forwards that need the values; forwards may be in several threads.
    users: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    # The values, if they are prefetched.
    coming: Future[Values] | None = None


class Offload:
    """Offloads layers, and reads them when they are needed.

    Attributes:
        reads: number of reads of each op.
        in_memory: number of layers in memory now; `most`: its maximum so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.reads: Counter[Op] = Counter()
        self.in_memory = self.most = 0
        self._device = device
        self._known: WeakKeyDictionary[nn.Module, _Rest] = WeakKeyDictionary()
        # Always read in the thread: tensors made under `inference_mode` cannot take part in a gradient.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="intarsia-read")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()

    def put(self, module: nn.Module, op: Op, read: Callable[[], Values]) -> None:
        """Register a layer whose parameters have no values; `read` gives them."""
        self._known[module] = _Rest(op=op, read=read, empty=dict(module.named_parameters()))
        module.register_forward_pre_hook(lambda module, args: self._wake(module))
        module.register_forward_hook(lambda module, args, output: self._sleep(module), always_call=True)

    @contextmanager
    def awake(self, module: nn.Module) -> Iterator[nn.Module]:
        """A context in which the layer has its values."""
        self._wake(module)
        try:
            yield module
        finally:
            self._sleep(module)

    def walk(self, modules: Iterable[nn.Module], *, ahead: bool = True) -> Iterator[nn.Module]:
        """Layers one at a time, each with its values until the next is requested.

        Args:
            ahead: prefetch the next one; not for long or memory-hungry work on a layer.
        """
        path = list(modules)
        following: _Rest | None = None
        try:
            for index, module in enumerate(path):
                with self.awake(module):
                    following = self._known.get(path[index + 1]) if ahead and index + 1 < len(path) else None
                    if following is not None and not following.users and following.coming is None:
                        following.coming = self._thread.submit(self._read, following)
                    yield module
        finally:
            if following is not None and following.coming is not None:
                with suppress(Exception):  # it is no longer needed
                    following.coming.result()
                    self._count(-1)
                following.coming = None

    def _wake(self, module: nn.Module) -> None:
        rest = self._known.get(module)
        if rest is None:  # it is not offloaded
            return
        with rest.lock:
            if not rest.users:
                coming, rest.coming = rest.coming or self._thread.submit(self._read, rest), None
                for name, value in coming.result().items():
                    if value.is_cuda:  # made on another stream, so keep it until this one has finished with it
                        value.record_stream(torch.cuda.current_stream(value.device))
                    set_parameter(module, name, value)
            rest.users += 1

    def _sleep(self, module: nn.Module) -> None:
        rest = self._known.get(module)
        if rest is None:
            return
        with rest.lock:
            if not rest.users:  # reading failed
                return
            rest.users -= 1
            if not rest.users:
                for name, parameter in rest.empty.items():
                    set_parameter(module, name, parameter)
                self._count(-1)
                give_back()

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
    """Read every page of a mapped tensor in this thread, so that computation does not wait for the disk."""
    flat = value.detach().reshape(-1).view(torch.uint8) if value.is_contiguous() and value.numel() else None
    if flat is not None:
        flat[::_PAGE].max()


_SHARE_OF_FREE = 0.8  # the rest is for hidden states and logits


def place_layers(layers: Sequence[nn.Module], outside: int, devices: Sequence[torch.device]) -> None:
    """Spread a model's layers over devices, in blocks by free memory.

    Args:
        outside: bytes of the rest of the model, to reserve on the first device.
    """
    sizes = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers]
    free = [free_bytes(device) * _SHARE_OF_FREE for device in devices]
    free[0] -= outside
    for layer, block in zip(layers, blocks(sizes, free), strict=True):
        nn.Module.to(layer, devices[block])


def blocks(sizes: Sequence[int], free: Sequence[float]) -> list[int]:
    """The block of each layer: in order, with sizes in proportion to the free memory."""
    room = [max(share, 0.0) for share in free]
    room = room if any(room) else [1.0] * len(free)
    ends = [sum(sizes) * end / sum(room) for end in accumulate(room)]
    middles = (end - size / 2 for size, end in zip(sizes, accumulate(sizes), strict=True))
    return [next((index for index, end in enumerate(ends) if middle <= end), len(ends) - 1) for middle in middles]


def free_bytes(device: torch.device) -> int:
    """Free memory of a device."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else psutil.virtual_memory().available


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace the values of a parameter, without gradient; an existing parameter stays the same object."""
    owner, _, attribute = name.rpartition(".")
    parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    setattr(module.get_submodule(owner), attribute, parameter)
