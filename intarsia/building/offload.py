"""Layers that are in memory only while they are used, and layers spread over several devices."""

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
"""A layer's tensors by the names of its parameters, on the device that it runs on."""

_PAGE = 4096


@dataclass(kw_only=True, eq=False)
class _Rest:
    """What is known of a layer while it is at rest: how to read it, and its parameters without values."""

    op: Op
    read: Callable[[], Values]
    empty: Mapping[str, nn.Parameter]
    # Blocks and forwards under way that need the values; forwards may be in several threads.
    users: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    # The values, where they are read ahead.
    coming: Future[Values] | None = None


class Offload:
    """Keeps layers at rest.

    Attributes:
        reads: how often a layer was read, by what it is made of.
        in_memory: how many layers are in memory now; `most`: how many were at once, at most.
    """

    def __init__(self, device: torch.device) -> None:
        self.reads: Counter[Op] = Counter()
        self.in_memory = self.most = 0
        self._device = device
        self._known: WeakKeyDictionary[nn.Module, _Rest] = WeakKeyDictionary()
        # Always in the thread: what is made under `inference_mode` could take no part in a gradient.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="intarsia-read")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()

    def put(self, module: nn.Module, op: Op, read: Callable[[], Values]) -> None:
        """Take a layer, whose parameters have no values, into keeping; `read` gives them."""
        self._known[module] = _Rest(op=op, read=read, empty=dict(module.named_parameters()))
        module.register_forward_pre_hook(lambda module, args: self._wake(module))
        module.register_forward_hook(lambda module, args, output: self._sleep(module), always_call=True)

    @contextmanager
    def awake(self, module: nn.Module) -> Iterator[nn.Module]:
        """The layer, with its values while the block runs."""
        self._wake(module)
        try:
            yield module
        finally:
            self._sleep(module)

    def walk(self, modules: Iterable[nn.Module], *, ahead: bool = True) -> Iterator[nn.Module]:
        """One layer after the other, each with its values until the next is asked for.

        Args:
            ahead: read the next one meanwhile; not where work on a layer takes long, and its memory.
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
                with suppress(Exception):  # nobody asks for it any more
                    following.coming.result()
                    self._count(-1)
                following.coming = None

    def _wake(self, module: nn.Module) -> None:
        rest = self._known.get(module)
        if rest is None:  # it has values of its own
            return
        with rest.lock:
            if not rest.users:
                coming, rest.coming = rest.coming or self._thread.submit(self._read, rest), None
                for name, value in coming.result().items():
                    if value.is_cuda:  # made on another stream: not to be reused before this one is done with it
                        value.record_stream(torch.cuda.current_stream(value.device))
                    set_parameter(module, name, value)
            rest.users += 1

    def _sleep(self, module: nn.Module) -> None:
        rest = self._known.get(module)
        if rest is None:
            return
        with rest.lock:
            if not rest.users:  # it could not be read
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
    """Read every page of a mapped tensor now, in this thread, so that whoever computes with it need not wait."""
    flat = value.detach().reshape(-1).view(torch.uint8) if value.is_contiguous() and value.numel() else None
    if flat is not None:
        flat[::_PAGE].max()


_SHARE_OF_FREE = 0.8  # the rest is for hidden states and logits


def place_layers(layers: Sequence[nn.Module], outside: int, devices: Sequence[torch.device]) -> None:
    """Lay a model's layers over devices, in blocks as their free memory allows.

    Args:
        outside: bytes of the rest of the model, which the first device is still to have.
    """
    sizes = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers]
    free = [free_bytes(device) * _SHARE_OF_FREE for device in devices]
    free[0] -= outside
    for layer, block in zip(layers, blocks(sizes, free), strict=True):
        nn.Module.to(layer, devices[block])


def blocks(sizes: Sequence[int], free: Sequence[float]) -> list[int]:
    """Which block each layer belongs to: in order, each block's share of the bytes that of its free memory."""
    room = [max(share, 0.0) for share in free]
    room = room if any(room) else [1.0] * len(free)
    ends = [sum(sizes) * end / sum(room) for end in accumulate(room)]
    middles = (end - size / 2 for size, end in zip(sizes, accumulate(sizes), strict=True))
    return [next((index for index, end in enumerate(ends) if middle <= end), len(ends) - 1) for middle in middles]


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else psutil.virtual_memory().available


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter, without gradient; a parameter stays the same object."""
    owner, _, attribute = name.rpartition(".")
    parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    setattr(module.get_submodule(owner), attribute, parameter)
