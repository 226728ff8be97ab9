"""Hooks at anatomy roles: what goes into the layers that write to the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from intarsia.anatomy.spec import PARTS, Anatomy, Part

Receive = Callable[[Part, Tensor], None]


@contextmanager
def read_outs(layer: nn.Module, anatomy: Anatomy, receive: Receive) -> Iterator[None]:
    """While open, every forward of `layer` hands the inputs of o_proj and down_proj to `receive`.

    The inputs are `[..., C]` with C the query-head channels (attention) or the MLP channels.
    """
    handles = []
    for part in PARTS:

        def hook(module: nn.Module, args: tuple[Any, ...], part: Part = part) -> None:
            receive(part, args[0])

        target = layer.get_submodule(anatomy.writer(part).module)
        handles.append(target.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
