"""What RegMean and Fisher averaging need to know of each member, measured once on the same text.

- RegMean: of every layer the uncentred second moments of what its linear modules read, `E[x x^T]` over real tokens. The
  modules of a part that read the residual stream share an input, so a layer has four of them: `attention.reads`,
  `attention.writes`, `mlp.reads`, `mlp.writes`.
- Fisher: of every tensor of a layer the mean over sequences of the squared gradient of the sequence's loss, the
  diagonal of the empirical Fisher information. The gradient goes backwards layer by layer, one layer at a time in
  memory, as for the planner `taylor`.

One file a layer, so that memory holds one layer's whatever the depth.

Shapes: B sequences, T tokens, N real tokens, D residual width, I inputs of a linear module.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.anatomy.spec import PARTS, Anatomy
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.stats import require_finite
from intarsia.calibration.stream import LayerStream
from intarsia.disk import full_disk_named
from intarsia.errors import UserError
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.taylor import gradients_behind_the_last
from intarsia.tailoring.blend_methods import Statistic


def statistics_file(folder: Path, member: str, kind: Statistic, layer: int) -> Path:
    """Where the statistics of a layer are."""
    return folder / member / f"{kind}-{layer:03d}.safetensors"


def check_anatomy(anatomy: Anatomy, kinds: Sequence[Statistic]) -> None:
    """Refuse families whose layers these statistics are not made for.

    Raises:
        UserError: the family has experts.
    """
    if kinds and any(anatomy.is_mixture(part) for part in PARTS):
        raise UserError.of(
            where="family: merge.methods",
            expected="methods for a family with experts",
            found=", ".join(kinds),
            remedy="Leave them out: their statistics are for layers without experts.",
        )


def write_statistics(model: Intermediate, name: str, kinds: Sequence[Statistic], folder: Path) -> None:
    """Write the statistics of every layer of a member into a folder of its own, which appears whole or not at all.

    Args:
        model: the member, whole and measured.

    Raises:
        UserError: activations or gradients are not finite, or the disk is full.
    """
    staging = f".{name}"
    shutil.rmtree(folder / staging, ignore_errors=True)
    with full_disk_named(folder):
        (folder / staging).mkdir(parents=True)
        for kind in kinds:
            for layer, found in grams(model) if kind == "regmean" else squared_gradients(model):
                _save(found, statistics_file(folder, staging, kind, layer))
        (folder / staging).rename(folder / name)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}, path)


def grams(model: Intermediate) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Of every layer the second moments of what its linear modules read. The model is whole, and measured."""
    for index, module in enumerate(model.modules):
        sums: dict[str, Tensor] = {}
        tokens = 0
        with torch.inference_mode():
            for part, ids_BT, mask_BT in model.batches.over():
                call = model.stream.calls(ids_BT, mask_BT)[index]
                with _inputs(module, model.anatomy) as read:
                    model.stream.run(module, model.hidden_at(index, part), call)
                for name, x in read.items():
                    x_NI = x.reshape(-1, x.shape[-1])
                    x_NI = (x_NI if mask_BT is None else x_NI[mask_BT.reshape(-1).bool()]).float()
                    gram_II = x_NI.T @ x_NI
                    sums[name] = sums[name] + gram_II if name in sums else gram_II
                tokens += ids_BT.numel() if mask_BT is None else int(mask_BT.sum())
        for name, gram_II in sums.items():
            require_finite(gram_II, f"inputs of {name} of layer {index}")
        yield index, {name: gram_II / tokens for name, gram_II in sums.items()}


@contextmanager
def _inputs(module: nn.Module, anatomy: Anatomy) -> Iterator[dict[str, Tensor]]:
    """While open, what the reading and the writing modules of both parts are given."""
    found: dict[str, Tensor] = {}
    handles = []
    for part in PARTS:
        for name, linear in ((f"{part}.reads", anatomy.readers(part)[0]), (f"{part}.writes", anatomy.writer(part))):

            def hook(owner: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                found[name] = args[0]

            handles.append(module.get_submodule(linear.module).register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def squared_gradients(model: Intermediate) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Of every layer, the last first, its tensors' mean squared gradient of a sequence's summed loss.

    The model is whole, and measured.
    """
    # What the model passes to its layers must not come from inference mode, or autograd refuses it.
    stream = LayerStream(model.resident.model, model.anatomy)
    n, t = model.corpus.input_ids.shape
    behind = HiddenStore((n, t, model.anatomy.width), model.resident.model.dtype, room=model.room)
    try:
        with torch.enable_grad():
            gradients_behind_the_last(model, stream, behind)
        for index in reversed(range(model.depth)):
            with torch.enable_grad():
                found = _through(model, stream, behind, index)
            yield index, {name: square / n for name, square in found.items()}
    finally:
        behind.close()


def _through(model: Intermediate, stream: LayerStream, behind: HiddenStore, index: int) -> dict[str, Tensor]:
    """Turn the gradients behind a layer into those before it; the summed squares of its tensors' gradients."""
    module = model.modules[index]
    names, parameters = zip(*module.named_parameters(), strict=True)
    squares = {
        name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in zip(names, parameters, strict=True)
    }
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        for part, ids_BT, mask_BT in model.batches.over():
            h_BTD = model.hidden_at(index, part)
            for row in range(ids_BT.shape[0]):
                rows = slice(row, row + 1)
                mask = None if mask_BT is None else mask_BT[rows]
                h_1TD = h_BTD[rows].clone().requires_grad_()
                out_1TD = stream.run(module, h_1TD, stream.calls(ids_BT[rows], mask)[index])
                at = part.start + row
                grads = torch.autograd.grad(out_1TD, [h_1TD, *parameters], behind.get(0, at, at + 1, h_1TD.device))
                require_finite(grads[0], f"gradient before layer {index}")
                behind.put(0, at, grads[0])
                for name, gradient in zip(names, grads[1:], strict=True):
                    squares[name] += gradient.float().square()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return squares
