"""A LoRA adapter laid over the tensors of its base as they are read: W + scale * B A, never a second model.

Source: LoRA, arXiv 2106.09685. The product and the sum are in float32 (float64 for float64 weights) and rounded once,
to the base's dtype. In float32 this is bit for bit what peft's `merge_and_unload` gives; in 16 bits peft rounds the
product before it is added, so that entries may differ by one step of the result's and the product's rounding.

Shape suffixes: `O` rows of a weight (outputs), `I` columns (inputs), `R` the adapter's rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from intarsia.checkpoint.adapter_config import CONFIG_FILE, AdapterConfig, read_adapter_config
from intarsia.checkpoint.header import TensorHeader, read_headers
from intarsia.checkpoint.mapped import map_tensor
from intarsia.errors import Problem, UserError

WEIGHTS_FILE = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What is added to one weight: `scale` times `b_OR` times `a_RI`."""

    a_RI: TensorHeader
    b_OR: TensorHeader
    scale: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """An adapter that fits its base. `updates` are by the name of the base's tensor; `base_model` is what it names."""

    folder: Path
    base_model: str | None
    updates: Mapping[str, LowRank]

    def applied(self, name: str, weight_OI: Tensor) -> Tensor:
        """The weight with the adapter; the same tensor where the adapter does not touch it."""
        update = self.updates.get(name)
        if update is None:
            return weight_OI
        dtype = torch.promote_types(weight_OI.dtype, torch.float32)
        a_RI, b_OR = map_tensor(update.a_RI).to(dtype), map_tensor(update.b_OR).to(dtype)
        return (weight_OI.to(dtype) + (b_OR @ a_RI) * update.scale).to(weight_OI.dtype)

    def headers(self) -> Iterator[TensorHeader]:
        """The adapter's own tensors."""
        for update in self.updates.values():
            yield from (update.a_RI, update.b_OR)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").exists()


def open_adapter(folder: Path, base: Mapping[str, TensorHeader], *, base_name: str) -> Adapter:
    """Read an adapter's config and headers, and hold them against its base's tensors; no weight is read.

    Args:
        base: the base's tensors, by name.
        base_name: what the base is called in messages.

    Raises:
        UserError: the adapter is of a kind that is not applied on reading, damaged, or for another base.
    """
    config = read_adapter_config(folder)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise UserError.of(
            where=str(folder),
            expected=WEIGHTS_FILE,
            found="pickled weights" if (folder / "adapter_model.bin").exists() else "no weights",
            remedy="If you trust the adapter, load it with peft once and save it with save_pretrained().",
        )
    pairs: dict[str, dict[str, TensorHeader]] = {}
    problems: list[Problem] = []
    for header in read_headers(file):
        match = _NAME.fullmatch(header.name)
        if match is None:
            problems.append(_problem(file, header.name, "lora_A and lora_B of linear layers only", "another tensor"))
        else:
            pairs.setdefault(match["module"], {})[match["side"]] = header
    if not pairs and not problems:
        problems.append(_problem(file, "tensors", "lora_A and lora_B of linear layers", "none"))
    updates: dict[str, LowRank] = {}
    for module, found in pairs.items():
        name = f"{module}.weight"
        wrong = list(_misfits(module, found, base.get(name), config, base_name))
        problems += [_problem(file, module, expected, what) for expected, what in wrong]
        if not wrong:
            updates[name] = LowRank(a_RI=found["A"], b_OR=found["B"], scale=config.scale_of(module))
    if problems:
        rest = len(problems) - _MOST_NAMED
        if rest > 0:
            problems[_MOST_NAMED:] = [_problem(file, "adapter", "no more of these", f"{rest} more problems")]
        raise UserError(problems)
    return Adapter(folder=folder, base_model=config.base_model, updates=updates)


def _problem(file: Path, what: str, expected: str, found: str) -> Problem:
    remedy = "Use an adapter that was trained on this base, or merge it with peft (merge_and_unload) first."
    return Problem(where=f"{file}: {what}", expected=expected, found=found, remedy=remedy)


def _misfits(
    module: str, found: Mapping[str, TensorHeader], weight: TensorHeader | None, config: AdapterConfig, base_name: str
) -> Iterator[tuple[str, str]]:
    if set(found) != {"A", "B"}:
        yield "both lora_A and lora_B", f"only lora_{next(iter(found))}"
        return
    if weight is None or len(weight.shape) != 2:
        yield f"a linear layer of {base_name}", "no such weight in it"
        return
    rank, (rows, columns) = config.rank_of(module), weight.shape
    for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
        if found[side].shape != shape:
            yield f"lora_{side} of shape {list(shape)} (rank {rank}, for {base_name})", str(list(found[side].shape))
        if not found[side].dtype.is_floating_point:
            yield f"lora_{side} in a floating-point dtype", str(found[side].dtype)
