"""A checkpoint as a `transformers` model, and a recipe's layers, which share every unchanged layer with it.

The original model is loaded once. A selected layer is the original module itself; a concatenated or merged one is a
new module whose tensors come from the same function that builds to disk, read from the checkpoint's files.

In a streamed model, layers are at rest (`intarsia.building.offload`): embedding, final norm and head stay in memory,
and a layer has values only while it is awake. Code that works with layers wakes them, one at a time.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from intarsia.building.layer import layer_tensors, to_parameters
from intarsia.building.offload import Offload, place_layers, set_parameter
from intarsia.checkpoint import files
from intarsia.checkpoint.files import give_back
from intarsia.checkpoint.reader import Checkpoint
from intarsia.disk import let_go
from intarsia.errors import Problem, Problems, UserError, in_words
from intarsia.progress import quiet_transformers
from intarsia.recipe.recipe import Fitted, LayerRef, Op, Recipe, Select


@contextmanager
def refusals_named(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn errors of transformers about a config or weights into a user error.

    Raises:
        UserError: with the reason.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the type of error differs between classes
        if type(error).__name__ == "OutOfMemoryError" or getattr(error, "errno", None) is not None:
            raise
        raise UserError(
            f"transformers {version('transformers')} cannot load {checkpoint.folder}: {in_words(error)}.",
            "Correct its config.json, or use the version of transformers it was made for.",
        ) from error


def check_config(checkpoint: Checkpoint) -> None:
    """Check that transformers accepts the configs and finds all tensors outside the layers, without loading weights.

    Raises:
        UserError: it does not; see `refusals_named`.
    """
    with refusals_named(checkpoint), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(stock_config(checkpoint), trust_remote_code=False)
        if (checkpoint.folder / "generation_config.json").is_file():
            generation: Any = GenerationConfig.from_pretrained(checkpoint.folder)
            generation.validate()
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                ids = getattr(generation, name, None)
                if any(type(each) is not int for each in (ids if isinstance(ids, list) else [ids]) if each is not None):
                    raise ValueError(f"{name} of generation_config.json is {ids!r}")
    held = {checkpoint.architecture.in_memory(name) for name in checkpoint.outside_names()}
    _check(checkpoint, (name for name, _ in model.named_parameters() if name not in held))


def stock_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The config object of the checkpoint's model."""
    with refusals_named(checkpoint):
        if checkpoint.as_stored:
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        else:
            config = CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(dict(checkpoint.config))
    assert isinstance(config, PreTrainedConfig)
    return config


def skeleton(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model in evaluation mode on `device`, except its layers, whose parameters are on the meta device."""
    from accelerate import init_empty_weights

    with refusals_named(checkpoint), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(stock_config(checkpoint), dtype=dtype, trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    architecture = checkpoint.architecture
    for stored in checkpoint.outside_names():
        name = architecture.in_memory(stored)
        if name in parameters:
            value = checkpoint.tensor(stored).to(device=device, dtype=dtype)
            set_parameter(model, name, value)
        elif name in buffers:
            buffers[name].copy_(checkpoint.tensor(stored))
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer.to(device)
    model.tie_weights()
    _check(checkpoint, (name for name, parameter in model.named_parameters() if parameter.is_meta))
    for name in (architecture.embedding_in_memory, architecture.family.head_in_memory):
        model.get_submodule(name).register_forward_hook(_let_go)
    model.requires_grad_(False)
    return model.eval()


def _let_go(module: nn.Module, args: Any, output: Any) -> None:
    for parameter in module.parameters(recurse=False):
        files.let_go(parameter)


def _check(checkpoint: Checkpoint, absent: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks one of the parameters outside the layers."""
    layers = f"{checkpoint.architecture.layers_in_memory}."
    Problems(
        Problem(f"{checkpoint.folder} has no tensor {name}, which the model needs.", "Download it again.")
        for name in absent
        if not name.startswith(layers)
    ).raise_any(most=5)


_ALIGNED = 64  # bytes


def default_device() -> torch.device:
    """CUDA if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The checkpoint as a transformers model in evaluation mode, on `device`.

    A text model inside a multimodal one, or 8-bit weights, are loaded tensor by tensor.

    Args:
        dtype: default is `default_dtype`.
    """
    dtype = dtype or default_dtype(checkpoint, device)
    with quiet_transformers(), refusals_named(checkpoint):
        if checkpoint.as_stored:
            model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype, trust_remote_code=False)
        else:
            config, classes = stock_config(checkpoint), cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING)
            tensors = {name: checkpoint.tensor(name) for name in checkpoint.headers}
            model = classes[type(config)].from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
            if (checkpoint.folder / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    assert isinstance(model, PreTrainedModel)
    model.requires_grad_(False)
    nn.Module.to(model, device)
    return model.eval()


def default_dtype(checkpoint: Checkpoint, device: torch.device, *, stream: bool = False) -> torch.dtype:
    """The dtype to compute in: the stored one; float32 where products of it are slow and the memory has room.

    Room is a quarter of the memory, for all weights in float32; with `stream` for one layer and the weights outside of
    layers.
    """
    architecture = checkpoint.architecture
    if fast_products(checkpoint.dtype, device):
        return checkpoint.dtype
    held = checkpoint.parameters - (architecture.n_layers - 1) * architecture.layer_parameters * stream
    return torch.float32 if 4 * held <= psutil.virtual_memory().total / 4 else checkpoint.dtype


def fast_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products in this dtype are about as fast as in float32.

    On x86 without AVX-512, torch multiplies 16-bit matrices at a ninth of the speed (dev/LOG.md, 2026-11-30).
    """
    if device.type != "cpu":
        return True
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


class LoadedModel:
    """The original model, and modules of other layers made from it.

    Attributes:
        model: the original transformers model; if it is streamed, its layers are at rest.
        layers: its layer modules, in order.
        others: checkpoints of the same shapes for recipes, by the variants' names.
        offload: keeps layers while they are not in use; None if the model is in memory.
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
            stream: read layers from their files when they are needed.
            devices: place the layers on these in blocks; `device`, the first of them, has the rest of the model.
        """
        assert not (stream and len(devices) > 1), "layers that are streamed run on one device"
        self.checkpoint = checkpoint
        self.others = dict(others or {})
        self.architecture = checkpoint.architecture
        self.device = device
        self.offload = Offload(device) if stream else None
        if stream:
            self.model = skeleton(
                checkpoint, device=device, dtype=dtype or default_dtype(checkpoint, device, stream=True)
            )
        else:
            start = torch.device("cpu") if len(devices) > 1 else device
            self.model = load_model(checkpoint, device=start, dtype=dtype)
        layers = self.model.get_submodule(self.architecture.layers_in_memory)
        assert isinstance(layers, nn.ModuleList)
        self.layers: list[nn.Module] = list(layers)
        if len(devices) > 1:
            self.model.set_submodule(self.architecture.layers_in_memory, nn.ModuleList())
            # Before the rest is moved, which is reserved on the first device.
            place_layers(self.layers, sum(parameter.nbytes for parameter in self.model.parameters()), devices)
            nn.Module.to(self.model, device)
            self.model.set_submodule(self.architecture.layers_in_memory, layers)
        if self.offload is not None:
            for index, layer in enumerate(self.layers):
                op = Select(source=LayerRef(variant="", layer=index))
                self.offload.put(layer, op, partial(self._original_values, index))

    @property
    def streams(self) -> bool:
        """Whether layers are read when they are needed."""
        return self.offload is not None

    def awake(self, module: nn.Module) -> AbstractContextManager[nn.Module]:
        """A context in which a layer module has its values."""
        return nullcontext(module) if self.offload is None else self.offload.awake(module)

    def walk(self, modules: Iterable[nn.Module], *, ahead: bool = True) -> Iterator[nn.Module]:
        """Layer modules one at a time, each with its values until the next is requested.

        Args:
            ahead: prefetch the next one, if the model is streamed.
        """
        return iter(list(modules)) if self.offload is None else self.offload.walk(modules, ahead=ahead)

    def module(self, op: Op, fitted: Mapping[str, npt.NDArray[np.float32]] | None = None) -> nn.Module:
        """The layer module for an op: the original module for a plain `Select`, else a new one.

        Args:
            fitted: tensors that replace the op's own, by name inside the layer.
        """
        if isinstance(op, Select) and not fitted and op.source.variant not in self.others:
            return self.layers[op.source.layer]
        if self.offload is not None:
            module = twin(self.layers[op.sources[0].layer])
            # A weak reference, so that an unused offloaded layer is freed.
            dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
            self.offload.put(module, op, partial(self._values, op, fitted or {}, dtypes))
            return module
        return self.fresh(op.sources[0].layer, self._made(op, fitted or {}))

    def fresh(self, donor: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A new layer module of the type of original layer `donor`, with these parameters in the model's dtype."""
        original = self.layers[donor]
        module = twin(original)
        for name, parameter in original.named_parameters():
            device = self.device if parameter.is_meta else parameter.device
            set_parameter(module, name, tensors[name].to(device=device, dtype=parameter.dtype).clone())
        return module

    def _made(self, op: Op, fitted: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, Tensor]:
        """A layer's parameters as in a built folder: fitted tensors are rounded to the dtype of the files."""

        def read(ref: LayerRef, local: str) -> Tensor:
            return self.others.get(ref.variant, self.checkpoint).layer_tensor(ref.layer, local)

        tensors = layer_tensors(op, self.architecture, read)
        tensors |= {name: torch.from_numpy(array).to(tensors[name].dtype) for name, array in fitted.items()}
        return to_parameters(tensors, self.architecture)

    def _original_values(self, layer: int) -> dict[str, Tensor]:
        """An original layer's values, mapped from the files as in `transformers`."""
        stored = {name: self.checkpoint.layer_tensor(layer, name) for name in self.architecture.layer_shapes(layer)}
        found = to_parameters(stored, self.architecture)
        return {name: found[name].to(parameter.dtype) for name, parameter in self.layers[layer].named_parameters()}

    def _values(
        self, op: Op, fitted: Mapping[str, npt.NDArray[np.float32]], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        """The values of a made layer in the model's dtype; its tensors are freed one by one."""
        tensors = self._made(op, fitted)
        values = {name: _own(tensors.pop(name).to(dtype)) for name, dtype in dtypes.items()}
        for array in fitted.values():
            let_go(array)
        give_back()  # release temporary memory
        return values


def _own(tensor: Tensor) -> Tensor:
    """A tensor in torch's own alignment; kernels may give other last bits without it."""
    return tensor if tensor.data_ptr() % _ALIGNED == 0 and tensor.is_contiguous() else tensor.clone()


def twin(module: nn.Module) -> nn.Module:
    """A copy of a module on the same parameters; replacing one of its parameters does not affect the original.

    Hooks are not copied: those of transformers have no meaning outside the model, and cannot be pickled.
    """
    shared: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            shared[id(hooks)] = OrderedDict()
    return copy.deepcopy(module, memo=shared)


Tensors: TypeAlias = Mapping[str, npt.NDArray[np.float32]]
"""The fitted tensors of a layer, by name inside it."""

Layer: TypeAlias = tuple[Op, Tensors | None]


class Placed(NamedTuple):
    """A layer's module, and the original layer whose other arguments (masks, positions) it takes."""

    module: nn.Module
    source: int


class RecipeLayers:
    """The current layers of a model, which can be exchanged.

    Attributes:
        ops: the op of each layer.
        fitted: the tensors that replace each layer's own, or None.
        modules: the layers' modules.
    """

    def __init__(self, resident: LoadedModel, ops: Sequence[Op], fitted: Fitted | None = None) -> None:
        self.resident = resident
        self.architecture = resident.architecture
        self.become(ops, fitted)

    @classmethod
    def of(cls, recipe: Recipe, resident: LoadedModel) -> RecipeLayers:
        return RecipeLayers(resident, recipe.layers, recipe.fitted)

    @property
    def depth(self) -> int:
        return len(self.ops)

    def placed(self, start: int = 0, stop: int | None = None) -> list[Placed]:
        """Layers `start` .. `stop - 1` (default: to the last), ready to run."""
        layers = zip(self.modules[start:stop], self.ops[start:stop], strict=True)
        return [Placed(module, op.sources[0].layer) for module, op in layers]

    def become(self, ops: Sequence[Op], fitted: Fitted | None = None) -> None:
        """Replace all layers."""
        self.ops = list(ops)
        self.fitted: list[Tensors | None] = [(fitted or {}).get(index) or None for index in range(len(ops))]
        self.modules = [self.resident.module(op, own) for op, own in zip(self.ops, self.fitted, strict=True)]

    def exchange(self, start: int, count: int, ops: Sequence[Op]) -> None:
        """Replace `count` layers by `ops`."""
        self.ops[start : start + count] = ops
        self.fitted[start : start + count] = [None] * len(ops)
        self.modules[start : start + count] = [self.resident.module(op) for op in ops]

    def fit(self, index: int, fitted: Tensors | None, module: nn.Module | None = None) -> None:
        """Set the fitted tensors of a layer, or None (`module` has them, if given)."""
        if fitted is not self.fitted[index]:
            self.fitted[index] = fitted
            # Unlike one with values, an offloaded module takes no memory.
            keep = module if not self.resident.streams else None
            self.modules[index] = keep or self.resident.module(self.ops[index], fitted)


def is_whole(layers: Sequence[Layer], n_layers: int) -> bool:
    """Whether these are all original layers, in order and unchanged."""
    return len(layers) == n_layers and all(
        isinstance(op, Select) and op.source.layer == index and fitted is None
        for index, (op, fitted) in enumerate(layers)
    )
