"""The layers of a family in memory, each tensor once.

The base is loaded as a model. A layer that a recipe takes whole from a full checkpoint is a module on tensors that are
mapped from its file; one of an adapter shares with the base what the adapter leaves alone. Merged layers, and layers of
an adapter, are made when they are first needed and stay in a cache with a bound in bytes.

A layer's tensors are those of the built folder as it would be loaded: made from the files' tensors, rounded to the
files' dtype, and then in the dtype that the model runs in.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.building.layer import layer_tensors
from intarsia.building.parameters import tensor_names, to_parameters
from intarsia.building.resident import Resident, twin
from intarsia.recipe.ops import LayerRef, Op, Select
from intarsia.tailoring.byte_cache import ByteCache, bytes_of
from intarsia.tailoring.family import Family
from intarsia.tailoring.outcome import TrialFailed
from intarsia.tailoring.prefixes import layer_key

Fitted = Mapping[str, npt.NDArray[np.float32]]


class ResidentFamily:
    """A family's base as a model, and layer modules for any op over the family.

    Attributes:
        resident: the base, which can also make the family's other layers (for the closed form).
        made: how many modules were made so far.
    """

    def __init__(self, family: Family, *, device: torch.device, dtype: torch.dtype | None, memory_bytes: int) -> None:
        checkpoints = family.checkpoints()
        self.base = family.names[0]
        others = {name: checkpoint for name, checkpoint in checkpoints.items() if name != self.base}
        self.resident = Resident(checkpoints[self.base], device=device, dtype=dtype, others=others)
        self.made = 0
        self._modules: ByteCache[str, nn.Module] = ByteCache(memory_bytes)

    def module(self, op: Op, fitted: Fitted | None = None) -> nn.Module:
        """The layer that an op describes.

        Args:
            fitted: tensors that replace the op's own, by name inside the layer.

        Raises:
            TrialFailed: a tensor of it is NaN or infinite.
        """
        if isinstance(op, Select) and op.source.variant == self.base and not fitted:
            return self.resident.layers[op.source.layer]
        key = layer_key(op, fitted)
        module = self._modules.get(key)
        if module is None:
            module, nbytes = self._make(op, fitted or {})
            self._modules.put(key, module, nbytes)
            self.made += 1
        return module

    def clear(self) -> None:
        """Let go of the modules that were made."""
        self._modules.clear()

    def _make(self, op: Op, fitted: Fitted) -> tuple[nn.Module, int]:
        """A new module, and the bytes that it does not share with the base."""
        tensors = layer_tensors(op, self.resident.architecture, self._read)
        tensors |= {name: torch.from_numpy(array).to(tensors[name].dtype) for name, array in fitted.items()}
        architecture = self.resident.architecture
        parameters = to_parameters(tensors, architecture)
        original = self.resident.layers[op.sources[0].layer]
        module, own = twin(original), 0
        for name, parameter in list(original.named_parameters()):
            tensor, stored = parameters[name], tensor_names(name, architecture)
            untouched = not any(part in fitted for part in stored)
            if isinstance(op, Select) and untouched and all(self._is_base(op.source, part) for part in stored):
                continue
            if not bool(tensor.isfinite().all()):
                sources = ", ".join(map(str, op.sources))
                raise TrialFailed(f"{name} of the layer made from {sources} is NaN or infinite")
            tensor = tensor.to(device=self.resident.device, dtype=parameter.dtype)
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
            own += bytes_of(tensor)
        return module.eval(), own

    def _is_base(self, ref: LayerRef, local: str) -> bool:
        """Whether a member's tensor is the base's own."""
        adapter = self.resident.others[ref.variant].adapter if ref.variant in self.resident.others else None
        name = self.resident.architecture.tensor_name(ref.layer, local)
        return ref.variant == self.base or (adapter is not None and name not in adapter.changed)

    def _read(self, ref: LayerRef, local: str) -> Tensor:
        return self.resident.others.get(ref.variant, self.resident.checkpoint).layer_tensor(ref.layer, local)
