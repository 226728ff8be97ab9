"""A model's layers laid over several devices, in contiguous blocks.

Embedding, final norm and head stay on the first device; hidden states go from block to block and back. A block's size
follows the memory that is free on its device.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch
from torch import nn

_SHARE_OF_FREE = 0.8  # the rest is for hidden states and logits


def spread(model: nn.Module, layers: Sequence[nn.Module], devices: Sequence[torch.device]) -> list[torch.device]:
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
    room = [max(share, 0.0) for share in free]
    room = room if sum(room) > 0 else [1.0] * len(free)
    ends = [sum(sizes) * sum(room[: index + 1]) / sum(room) for index in range(len(room))]
    found, before = [], 0.0
    for size in sizes:
        middle = before + size / 2
        found.append(next((index for index, end in enumerate(ends) if middle <= end), len(room) - 1))
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
