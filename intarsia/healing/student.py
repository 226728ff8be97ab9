"""The student of end-to-end distillation: a recipe's model, its trained parameters and losses, and the recipe
afterwards.

Only layers are trained. Embedding, final norm and head stay the base's, so that a recipe with fitted tensors still
describes the whole model.

`Distiller` is the student with its losses as one module: a batch and the teacher's lesson in, losses out. So any
wrapper of Accelerate sees a single forward and no large outputs. Logits exist for a few rows
at a time, the teacher's as well as the student's.

Shape suffixes: `B` sequences, `T` tokens, `N` = B * T, `D` residual width, `V` vocabulary, `K` kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.activations.loss import Likeliest
from intarsia.architecture.spec import Architecture
from intarsia.building.layer import to_tensors
from intarsia.building.loaded_model import load_model
from intarsia.building.materialize import materialize
from intarsia.checkpoint.reader import Checkpoint
from intarsia.healing.losses import cross_entropy, hidden_mse, logit_kl, over_rows
from intarsia.healing.stages.end_to_end import EndToEndSettings
from intarsia.progress import current
from intarsia.recipe.recipe import Recipe

_ADAPTER = "default"
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop")


def build_student(recipe: Recipe, variants: Mapping[str, Checkpoint], folder: Path) -> None:
    """Build the recipe's model into a folder, unless it exists."""
    if not folder.exists():
        materialize(recipe, variants, folder)


def load_student(
    folder: Path, settings: EndToEndSettings, device: torch.device
) -> tuple[PreTrainedModel, Architecture]:
    """The student, with gradients for the trained parameters: all layers in float32, or low-rank changes to them."""
    checkpoint = Checkpoint.open(folder, model=str(folder))
    rank, layers = settings.lora, checkpoint.architecture.layers_in_memory
    model = load_model(checkpoint, device=device, dtype=torch.float32 if rank is None else None)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    # Experts and their router are no linear modules in memory.
    targets = [name for name in linear if name.startswith(f"{layers}.")]
    if rank is not None and targets:
        _add_lora(model, targets, rank)
    else:
        if rank is not None:
            current().say("the layers have no linear modules for low-rank changes: all of their parameters are trained")
        model.float().get_submodule(layers).requires_grad_(True)
    if settings.checkpointing:
        # transformers recomputes activations in training mode only; a student that copies a teacher wants no dropout.
        _without_dropout(model)
        # The first is the newer name, within transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()
    return model, checkpoint.architecture


def with_trained(recipe: Recipe, architecture: Architecture, base: Checkpoint, trained: Mapping[str, Tensor]) -> Recipe:
    """The recipe with the trained parameters.

    Args:
        base: the student before training, on disk.
        trained: trained parameters of the student by full name; low-rank ones are merged.
    """
    fitted: dict[int, dict[str, npt.NDArray[np.float32]]] = {
        index: dict(tensors) for index, tensors in recipe.fitted.items()
    }
    for index in range(len(recipe.layers)):
        prefix = f"{architecture.layers_in_memory}.{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in trained.items() if name.startswith(prefix)}
        own = to_tensors({name: tensor for name, tensor in own.items() if ".lora_" not in name}, architecture)
        for local in architecture.layer_shapes(index):
            name = architecture.tensor_name(index, local)
            module = prefix + local.removesuffix(".weight")
            if local in own:
                tensor = own[local]
            elif f"{module}.lora_A.{_ADAPTER}.weight" in trained:
                a, b = (trained[f"{module}.lora_{side}.{_ADAPTER}.weight"].float() for side in "AB")
                tensor = base.tensor(name).float() + _SCALE * (b @ a)
            else:
                continue
            fitted.setdefault(index, {})[local] = np.ascontiguousarray(tensor.float().cpu().numpy())
    return replace(recipe, fitted=fitted)


_SCALE = 2.0  # lora_alpha / r, whatever the rank


def _add_lora(model: PreTrainedModel, targets: list[str], rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=int(_SCALE * rank), lora_dropout=0.0, bias="none", target_modules=targets)
    torch.manual_seed(0)  # A starts random, B as zeros
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            value: Any = getattr(module, name, None)
            if isinstance(value, float):
                setattr(module, name, 0.0)


@torch.no_grad()
def _makes_the_logits(head: nn.Module, model: PreTrainedModel) -> bool:
    """Whether a model's logits are its head's output and nothing else, found on a few tokens."""
    ids_BT = torch.arange(4, device=next(model.parameters()).device)[None]
    own, whole = head(model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state), model(input_ids=ids_BT)
    return bool(torch.allclose(own.float(), whole.logits.float(), rtol=1e-2, atol=1e-2))


class SplitModel:
    """A causal language model split into trunk and head, so that losses can go through the head a few rows at a time.

    If a model changes the logits after its head (a scale, a soft cap), the trunk gives the logits and the head is the
    identity: slower, but right. The model is held without owning it, so that no wrapper sees its parameters twice.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self.model = model
        head = model.get_submodule(architecture.family.head_in_memory)
        self._head = head if _makes_the_logits(head, model) else None

    def trunk(
        self, ids_BT: Tensor, mask_BT: Tensor | None, *, hidden: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The input of `head`, `[B, T, ...]`, and on request the hidden states after the embedding and every layer.

        The last hidden state is after the final norm.
        """
        given: dict[str, Any] = {
            "input_ids": ids_BT,
            "attention_mask": None if mask_BT is None else mask_BT.long(),
            "use_cache": False,
            "output_hidden_states": hidden,
        }
        if self._head is None:
            out = self.model(**given)
            return out.logits, tuple(out.hidden_states) if hidden else ()
        out = self.model.base_model(**given)
        return out.last_hidden_state, tuple(out.hidden_states) if hidden else ()

    def head(self, rows: Tensor) -> Tensor:
        """Logits `[N, V]` of rows of the trunk's output."""
        return rows if self._head is None else self._head(rows)


PARTS = ("loss", "logits", "hidden", "text")
"""The outputs of a forward: the total, and its unweighted parts."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """The teacher's targets for a batch. Neither `rows` nor `top_k` is set if no loss uses logits."""

    # The input of its head, `[N, D]`.
    rows: Tensor | None = None
    # Its likeliest tokens, `[N, K]`.
    top_k: Likeliest | None = None
    # Its hidden states after each span, `[B, T, D]` each.
    hidden: tuple[Tensor, ...] = ()
    # Tokens on which losses count; None for all real tokens.
    counted_BT: Tensor | None = None


class Distiller(nn.Module):
    """The student with its losses."""

    def __init__(
        self,
        student: PreTrainedModel,
        architecture: Architecture,
        settings: EndToEndSettings,
        *,
        layers: Sequence[int],
        teacher_head: Callable[[Tensor], Tensor] | None,
        autocast: bool,
    ) -> None:
        """`layers`: the output layers after which hidden states are compared."""
        super().__init__()
        self.student = student
        # Layer classes that FSDP may wrap on their own.
        self._no_split_modules = getattr(student, "_no_split_modules", None)
        self.settings = settings
        self.layers = tuple(layers)
        self.autocast = autocast
        self.split = SplitModel(student, architecture)
        self.teacher_head = teacher_head

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None, lesson: Lesson) -> Tensor:
        """The losses of `PARTS`, `[4]`, means over real tokens, or over those that the lesson counts."""
        with self._precision(ids_BT.device):
            rows, hidden = self.split.trunk(ids_BT, mask_BT, hidden=bool(lesson.hidden))
        through_head, logits, text = self._through_head(rows, ids_BT, mask_BT, lesson)
        between = torch.zeros((), device=ids_BT.device)
        if lesson.hidden:
            here_BT = mask_BT if lesson.counted_BT is None else lesson.counted_BT
            pairs = zip(self.layers, lesson.hidden, strict=True)
            found = [hidden_mse(theirs, hidden[index + 1], here_BT) for index, theirs in pairs]
            between = torch.stack(found).mean()
        total = through_head + self.settings.hidden * between
        return torch.stack([total, logits, between.detach(), text])

    def _through_head(
        self, rows: Tensor, ids_BT: Tensor, mask_BT: Tensor | None, lesson: Lesson
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss on the logits, and its two parts: KL to the teacher, and cross-entropy of the text."""
        settings, temperature = self.settings, self.settings.temperature
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT
        # Position t predicts token t + 1; both must be real.
        next_BT = torch.cat([real_BT[:, :-1] & real_BT[:, 1:], torch.zeros_like(real_BT[:, :1])], dim=1)
        if lesson.counted_BT is not None:
            real_BT = next_BT = lesson.counted_BT
        target_N = torch.cat([ids_BT[:, 1:], ids_BT[:, :1]], dim=1).reshape(-1)
        real_N = real_BT.reshape(-1).float() / real_BT.sum().clamp_min(1)
        next_N = next_BT.reshape(-1).float() / next_BT.sum().clamp_min(1)
        sums = torch.zeros(2, device=rows.device)
        taught = lesson.rows is not None or lesson.top_k is not None

        def losses(logits_NV: Tensor, part: slice) -> Tensor:
            total = torch.zeros(logits_NV.shape[0], device=logits_NV.device)
            if taught:
                if lesson.top_k is not None:
                    kl_N = temperature**2 * lesson.top_k.rows(part).divergence(logits_NV, temperature)
                else:
                    assert lesson.rows is not None and self.teacher_head is not None
                    with torch.no_grad():
                        theirs = self.teacher_head(lesson.rows[part])
                    kl_N = logit_kl(theirs, logits_NV, temperature)
                kl_N = torch.where(real_N[part] > 0, kl_N, 0.0) * real_N[part]
                sums[0] += kl_N.detach().sum()
                total = total + settings.logits * kl_N
            if settings.cross_entropy:
                text_N = cross_entropy(logits_NV, target_N[part])
                text_N = torch.where(next_N[part] > 0, text_N, 0.0) * next_N[part]
                sums[1] += text_N.detach().sum()
                total = total + settings.cross_entropy * text_N
            return total

        def head(block: Tensor) -> Tensor:
            with self._precision(block.device):
                logits_NV: Tensor = self.split.head(block)
            return logits_NV

        rows_ND = rows.reshape(-1, rows.shape[-1])
        if not taught and not settings.cross_entropy:
            total = torch.zeros((), device=rows.device)
        else:
            total = over_rows(rows_ND, head, losses, torch.ones(len(rows_ND), device=rows.device))
        return total, sums[0], sums[1]

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype=torch.bfloat16) if self.autocast else nullcontext()
