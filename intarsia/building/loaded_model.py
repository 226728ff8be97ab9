"""A recipe's model in memory, sharing every layer that does not change.

The original model is loaded once. A selected layer is the original module itself; a concatenated or merged one is a
new module whose tensors come from the same function that builds to disk, read from the checkpoint's files.

A model that is streamed is the same with layers at rest (`intarsia.building.offload`): embedding, final norm and head
stay in memory, and a layer has values only while it is awake. Whoever works with layers wakes them, one at a time; for
a model that is in memory as a whole that does nothing.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.building.layer import layer_tensors, to_parameters
from intarsia.building.loading import as_transformers, set_parameter, skeleton
from intarsia.building.offload import Offload, place_layers
from intarsia.checkpoint.files import give_back
from intarsia.checkpoint.reader import Checkpoint
from intarsia.progress import quiet_transformers
from intarsia.recipe.recipe import LayerRef, Op, Select
from intarsia.recipe.schema import let_go

_ALIGNED = 64  # bytes


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The checkpoint as a transformers model in evaluation mode, on `device`.

    Args:
        dtype: defaults to the dtype of the embedding in the file (nothing is converted).
    """
    stored = checkpoint.headers[f"{checkpoint.architecture.family.embedding_module}.weight"].dtype
    with quiet_transformers():
        model = as_transformers(checkpoint, dtype or stored)
    model.requires_grad_(False)
    nn.Module.to(model, device)
    return model.eval()


class LoadedModel:
    """The original model and the modules of other layers made from it.

    Attributes:
        model: the original transformers model, complete; where it is streamed its layers are at rest.
        layers: its layer modules, in order.
        others: checkpoints of the same shapes from which recipes may take layers too, by the variants' names.
        offload: where layers are kept while they are not run; None where the model is in memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        others: Mapping[str, Checkpoint] | None = None,
        stream: bool = False,
        devices: Sequence[torch.device] = (),
    ) -> None:
        """
        Args:
            stream: leave the layers in their files until they are needed.
            devices: lay the layers over these, in blocks; `device`, the first of them, has the rest of the model.
        """
        assert not (stream and len(devices) > 1), "layers that are streamed run on one device"
        self.checkpoint = checkpoint
        self.others = dict(others or {})
        self.architecture = checkpoint.architecture
        self.device = device
        self.offload = Offload(device) if stream else None
        if stream:
            stored = checkpoint.headers[f"{self.architecture.family.embedding_module}.weight"].dtype
            self.model = skeleton(checkpoint, device=device, dtype=dtype or stored)
        else:
            start = torch.device("cpu") if len(devices) > 1 else device
            self.model = load_model(checkpoint, device=start, dtype=dtype)
        layers = self.model.get_submodule(self.architecture.layers_in_memory)
        assert isinstance(layers, nn.ModuleList)
        self.layers: list[nn.Module] = list(layers)
        if len(devices) > 1:
            place_layers(self.model, self.layers, devices)
        if self.offload is not None:
            for index, layer in enumerate(self.layers):
                op = Select(source=LayerRef(variant="", layer=index))
                self.offload.put(layer, op, partial(self._original_values, index))

    @property
    def streams(self) -> bool:
        """Whether layers are read when they are needed."""
        return self.offload is not None

    def awake(self, module: nn.Module) -> AbstractContextManager[nn.Module]:
        """A layer module, with its values while the block runs."""
        return nullcontext(module) if self.offload is None else self.offload.awake(module)

    def walk(self, modules: Iterable[nn.Module], *, ahead: bool = True) -> Iterator[nn.Module]:
        """One layer module after the other, each with its values until the next is asked for.

        Args:
            ahead: read the next one meanwhile, where the model is streamed.
        """
        return iter(list(modules)) if self.offload is None else self.offload.walk(modules, ahead=ahead)

    def module(self, op: Op, fitted: Mapping[str, npt.NDArray[np.float32]] | None = None) -> nn.Module:
        """The layer module for an op: the original one for a plain `Select`, else a new one.

        Args:
            fitted: tensors that replace the op's own, by name inside the layer.
        """
        if isinstance(op, Select) and not fitted and op.source.variant not in self.others:
            return self.layers[op.source.layer]
        if self.offload is not None:
            module = twin(self.layers[op.sources[0].layer])
            # Not the module itself: an offloaded layer is freed when nothing else refers to it.
            dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
            self.offload.put(module, op, partial(self._values, op, fitted or {}, dtypes))
            return module
        return self.fresh(op.sources[0].layer, self._made(op, fitted or {}))

    def fresh(self, donor: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A new layer module like original layer `donor`, with these parameters in the model's dtype."""
        original = self.layers[donor]
        module = twin(original)
        for name, parameter in original.named_parameters():
            device = self.device if parameter.is_meta else parameter.device
            set_parameter(module, name, tensors[name].to(device=device, dtype=parameter.dtype).clone())
        return module

    def _made(self, op: Op, fitted: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, Tensor]:
        """A layer's parameters as in a built folder: what is fitted is rounded to the dtype of the files."""
        tensors = layer_tensors(op, self.architecture, self._read)
        tensors |= {name: torch.from_numpy(array).to(tensors[name].dtype) for name, array in fitted.items()}
        return to_parameters(tensors, self.architecture)

    def _original_values(self, layer: int) -> dict[str, Tensor]:
        """An original layer's values: mapped from the files, as `transformers` itself has them."""
        stored = {name: self.checkpoint.layer_tensor(layer, name) for name in self.architecture.layer_shapes(layer)}
        found = to_parameters(stored, self.architecture)
        return {name: found[name].to(parameter.dtype) for name, parameter in self.layers[layer].named_parameters()}

    def _values(
        self, op: Op, fitted: Mapping[str, npt.NDArray[np.float32]], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        """The values of a layer that is made, in the model's dtype; its tensors are freed one by one."""
        tensors = self._made(op, fitted)
        values = {name: _own(tensors.pop(name).to(dtype)) for name, dtype in dtypes.items()}
        for array in fitted.values():
            let_go(array)
        give_back()  # what making it took on the way
        return values

    def _read(self, ref: LayerRef, local: str) -> Tensor:
        return self.others.get(ref.variant, self.checkpoint).layer_tensor(ref.layer, local)


def _own(tensor: Tensor) -> Tensor:
    """A tensor that lies as torch allocates it: kernels may give other last bits where it does not."""
    return tensor if tensor.data_ptr() % _ALIGNED == 0 and tensor.is_contiguous() else tensor.clone()


def twin(module: nn.Module) -> nn.Module:
    """Another module of the same kind on the same parameters; replacing one of its parameters leaves the first alone.

    Hooks are left out: what transformers hangs on a model's layers means nothing outside it, and cannot be pickled.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            shared[id(hooks)] = OrderedDict()
    return copy.deepcopy(module, memo=shared)
