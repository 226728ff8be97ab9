"""A recipe's model in memory, sharing every layer that does not change.

The original model is loaded once. A selected layer is the original module itself; a concatenated or merged one is a
new module whose tensors come from the same function that builds to disk, read from the checkpoint's files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from intarsia.building.layer import layer_tensors
from intarsia.checkpoint.reader import Checkpoint
from intarsia.recipe.ops import LayerRef, Op, Select


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The checkpoint as a transformers model in evaluation mode, on `device`.

    Args:
        dtype: defaults to the dtype of the embedding in the file (nothing is converted).
    """
    stored = checkpoint.headers[f"{checkpoint.anatomy.family.embedding_module}.weight"].dtype
    with _no_bars():
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype or stored, trust_remote_code=False)
    for name in () if checkpoint.adapter is None else checkpoint.adapter.updates:
        model.get_parameter(name).data.copy_(checkpoint.tensor(name))
    model.requires_grad_(False)
    nn.Module.to(model, device)
    return model.eval()


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers shows bars of its own, also in pipes and where the user asked for quiet."""
    from transformers.utils import logging as module

    logging: Any = module  # it has no annotations
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Resident:
    """The original model and the modules of other layers made from it.

    Attributes:
        model: the original transformers model, complete.
        layers: its layer modules, in order.
        others: checkpoints of the same shapes from which recipes may take layers too, by the variants' names.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        others: Mapping[str, Checkpoint] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.others = dict(others or {})
        self.anatomy = checkpoint.anatomy
        self.device = device
        self.model = load_model(checkpoint, device=device, dtype=dtype)
        layers = self.model.get_submodule(self.anatomy.family.layers_module)
        assert isinstance(layers, nn.ModuleList)
        self.layers: list[nn.Module] = list(layers)

    def module(self, op: Op, fitted: Mapping[str, npt.NDArray[np.float32]] | None = None) -> nn.Module:
        """The layer module for an op: the original one for a plain `Select`, else a new one.

        Args:
            fitted: tensors that replace the op's own, by name inside the layer.
        """
        if isinstance(op, Select) and not fitted and op.source.variant not in self.others:
            return self.layers[op.source.layer]
        tensors = layer_tensors(op, self.anatomy, self._read)
        tensors |= {name: torch.from_numpy(array) for name, array in (fitted or {}).items()}
        return self.fresh(op.sources[0].layer, tensors)

    def fresh(self, donor: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A new layer module like original layer `donor`, with these tensors in the model's dtype."""
        original = self.layers[donor]
        module = twin(original)
        state = {
            name: tensors[name].to(device=self.device, dtype=parameter.dtype)
            for name, parameter in original.named_parameters()
        }
        for name, tensor in state.items():
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor.clone(), requires_grad=False))
        return module

    def _read(self, ref: LayerRef, local: str) -> Tensor:
        return self.others.get(ref.variant, self.checkpoint).layer_tensor(ref.layer, local)


def twin(module: nn.Module) -> nn.Module:
    """Another module of the same kind on the same parameters; replacing one of its parameters leaves the first alone.

    Hooks stay behind: those that transformers hangs on a model's layers mean nothing outside it, and cannot be pickled.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    copied = copy.deepcopy(module, memo=shared)
    for part in copied.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return copied
