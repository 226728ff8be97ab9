"""Model folders for reading: everything is checked on opening, and weights are read one tensor at a time.

Each tensor has its own memory map, which is released with the tensor, so that reading a checkpoint larger than memory
holds only the tensors in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from intarsia.architecture.detect import Undescribed, detect, verify
from intarsia.architecture.families import rules
from intarsia.architecture.per_layer import unknown_settings
from intarsia.architecture.spec import Architecture
from intarsia.checkpoint.files import TensorHeader, read_all_headers
from intarsia.checkpoint.stored_forms import (
    NESTED,
    WEIGHT_DTYPES,
    Scaled,
    Wrapper,
    is_wrapped,
    quantization_of,
    refuse,
    unscaled,
    unwrap,
)
from intarsia.disk import read_json
from intarsia.errors import Problem, Problems, UserError
from intarsia.inspection import own_code
from intarsia.model_name import require_folder
from intarsia.progress import current

_MOST_NAMED = 5
_ROWS = 4096  # of a head, compared at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """The adapter that a checkpoint was merged from."""

    # the adapter's folder
    folder: Path
    # the base named in its config
    base_model: str | None
    # the base it was merged into
    base: Checkpoint
    # the hash of its weights and of the relevant config
    sha256: str
    # names of the tensors that it changes
    changed: frozenset[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A model folder whose config, files and tensor shapes were checked against each other.

    Inside a multimodal model, config, headers and names are those of the text model.
    """

    # its folder
    folder: Path
    # its name by the user
    model: str
    revision: str | None
    config: dict[str, Any]
    architecture: Architecture
    # in the order of the files' names, and within a file in the order of the bytes
    headers: Mapping[str, TensorHeader]
    # the adapter merged into `folder`
    adapter: Adapter | None = None
    # the multimodal model around the text model
    wrapper: Wrapper | None = None
    # whether the files hold a head that differs from the embedding that the config ties it to: the head is used
    untied: bool = False

    @classmethod
    def open(cls, folder: Path, *, model: str, revision: str | None = None, dequantize: bool = False) -> Checkpoint:
        """Read the config and the headers of the weight files, but no weights.

        Args:
            dequantize: read 8-bit weights as ordinary ones. It has no effect on a model that is not quantised.

        Raises:
            UserError: the folder is not a complete safetensors checkpoint of a known family, or its parts disagree.
        """
        require_folder(folder)
        problems = Problems()
        with problems:
            config = read_config(folder, quantised=dequantize)
        with problems:
            headers = read_all_headers(folder)
        problems.raise_any()
        wrapper: Wrapper | None = None
        if quantization_of(config) is not None:
            config, headers = unscaled(config, headers, folder)
        if is_wrapped(config):
            config, headers, wrapper = unwrap(config, headers, where=str(folder))
        architecture = architecture_of(config, headers, where=str(folder / "config.json"))
        if wrapper is not None:
            outer = {key: value for key, value in wrapper.config.items() if not isinstance(value, Mapping)}
            file = str(folder / "config.json")
            named = rules().names if architecture.removal_only else ()
            found = unknown_settings(architecture.family, outer, architecture.n_layers, file, named=named)
            Problems(found).raise_any()
        if not architecture.removal_only:  # otherwise it was compared with its class
            verify(architecture, {name: header.shape for name, header in headers.items()}, where=str(folder))
            _check_head(architecture, headers, str(folder))
            _check_dtypes(architecture, headers, str(folder))
        checkpoint = cls(
            folder=folder,
            model=model,
            revision=revision,
            config=config,
            architecture=architecture,
            headers=headers,
            wrapper=wrapper,
        )
        checkpoint = _with_stored_dtype(checkpoint)
        return _untied(checkpoint) if architecture.tied and not _same_head(checkpoint) else checkpoint

    def tensor(self, name: str) -> torch.Tensor:
        """A memory-mapped tensor: pages are read when they are touched, and freed with the tensor.

        Writing to it changes memory only, never the file.
        """
        return self.headers[name].tensor()

    def stored_name(self, name: str) -> str:
        """The name of a tensor in the files."""
        return name if self.wrapper is None else self.wrapper.stored_name(name)

    @property
    def kept(self) -> Mapping[str, TensorHeader]:
        """The wrapper's other tensors, by their names in the files."""
        return {} if self.wrapper is None else self.wrapper.kept

    @property
    def scaled(self) -> list[Scaled]:
        """Weights stored in 8 bits."""
        return [header for header in [*self.headers.values(), *self.kept.values()] if isinstance(header, Scaled)]

    @property
    def as_stored(self) -> bool:
        """Whether a stock loader reads the same model from the folder."""
        return self.wrapper is None and not self.scaled and not self.untied

    def layer_tensor(self, layer: int, local: str) -> torch.Tensor:
        """A layer's tensor by its name inside the layer."""
        return self.tensor(self.architecture.tensor_name(layer, local))

    def outside_names(self) -> list[str]:
        """Names of tensors outside the layers: embeddings, final norm, and the head unless it is the embedding."""
        prefix = f"{self.architecture.family.modules.layers}."
        return [name for name in self.headers if not name.startswith(prefix) and name != self._tied_head]

    def further_names(self, depth: int) -> dict[str, str]:
        """Tensors of layers after the last one, which predict further tokens, with their names for a new `depth`."""
        prefix, found = f"{self.architecture.family.modules.layers}.", {}
        for name in self.headers:
            index, _, local = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and index.isdigit() and int(index) >= self.architecture.n_layers:
                found[name] = f"{prefix}{int(index) - self.architecture.n_layers + depth}.{local}"
        return found

    @property
    def _tied_head(self) -> str | None:
        """A copy of the embedding, if the files hold one."""
        return f"{self.architecture.family.modules.head}.weight" if self.architecture.tied else None

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, without buffers; a tied head counts once."""
        buffers = tuple(f".{name}" for name in self.architecture.family.buffers)
        return sum(
            header.numel
            for name, header in [*self.headers.items(), *self.kept.items()]
            if name != self._tied_head and not name.endswith(("rotary_emb.inv_freq", *buffers))
        )

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype of the embedding, in which transformers loads the model."""
        return self.headers[f"{self.architecture.family.modules.embedding}.weight"].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as read."""
        return sum(header.nbytes for header in [*self.headers.values(), *self.kept.values()])


def read_config(folder: Path, *, quantised: bool = False) -> dict[str, Any]:
    """The folder's config.json.

    Args:
        quantised: also accept that of a quantised model.

    Raises:
        UserError: it is missing or not a JSON object, describes an adapter or a quantised model, or its trusted code
            cannot be run.
    """
    file = folder / "config.json"
    if not file.exists() and (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} is a PEFT adapter, not a whole model.",
            "Use it as a variant beside its base in a recipe, or merge it into its base first with peft: "
            "merge_and_unload(), then save_pretrained().",
        )
    remedy = "Use a model folder with the config.json of its weights."
    config = read_json(file, expected="a file with one JSON object", remedy=remedy)
    found = quantization_of(config)
    if found is not None and not quantised:
        raise refuse(*found, file)
    own_code.admit(folder, config)
    return config


def architecture_of(
    config: Mapping[str, Any], headers: Mapping[str, TensorHeader] | None = None, *, where: str
) -> Architecture:
    """The architecture by a family file, or else from transformers; then layers can only be removed.

    Args:
        headers: of the tensors; None if there are only configs.

    Raises:
        UserError: there is neither, or config, class and tensors do not match.
    """
    try:
        return detect(config, where=where)
    except Undescribed as error:
        # This takes seconds, because it imports modules of transformers.
        from intarsia.inspection.structure import inspected

        shapes = None if headers is None else {name: header.shape for name, header in headers.items()}
        return inspected(config, shapes, where=where, reason=error.reason)


def _check_head(architecture: Architecture, headers: Mapping[str, TensorHeader], where: str) -> None:
    """Refuse a missing head that is not tied; a stock loader would initialise it at random."""
    head = headers.get(f"{architecture.family.modules.head}.weight")
    embedding = headers.get(f"{architecture.family.modules.embedding}.weight")
    if embedding is None or (head is None and architecture.tied) or (head and head.shape == embedding.shape):
        return
    fault = (
        f"has shape {list(head.shape)}, but the embedding {list(embedding.shape)}"
        if head
        else "is missing, but the config does not tie it to the embedding"
    )
    raise UserError(
        f"{where}: {architecture.family.modules.head}.weight {fault}.",
        "Config and weights do not match; download the checkpoint again.",
    )


def _same_head(checkpoint: Checkpoint) -> bool:
    """Whether a head that the config ties to the embedding is a copy of it, or missing."""
    family = checkpoint.architecture.family
    names = [f"{module}.weight" for module in (family.modules.head, family.modules.embedding)]
    if names[0] not in checkpoint.headers:
        return True
    head, embedding = (checkpoint.tensor(name) for name in names)
    if head.shape != embedding.shape:
        return False
    pairs = zip(head.split(_ROWS), embedding.split(_ROWS), strict=True)
    return all(torch.equal(mine.float(), other.float()) for mine, other in pairs)


def _untied(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with an untied head, that of its files.

    Runtimes treat such a head differently if the config ties it, so all outputs untie it.
    """
    architecture = checkpoint.architecture
    field, head = architecture.family.fields["tied"], f"{architecture.family.modules.head}.weight"
    current().say(f"{head} differs from the embedding, so it is used, and {field} is false in the output")
    changed = _with_config(checkpoint, {field: False})
    return replace(changed, architecture=replace(changed.architecture, tied=False), untied=True)


def _with_stored_dtype(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the stored dtype of its embedding in its config, which decides the dtype of loading."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    name = f"{checkpoint.architecture.family.modules.embedding}.weight"
    stored = str(checkpoint.dtype).removeprefix("torch.")
    if named is None or str(named).removeprefix("torch.") == stored:
        return checkpoint
    current().say(f"dtype is {named} in the config, but {name} is stored in {stored}, which is used")
    return _with_config(checkpoint, {"dtype": stored})


def _with_config(checkpoint: Checkpoint, values: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with changed values in its config, and in that of its wrapper."""
    left_out = {"torch_dtype"} if "dtype" in values else set()

    def changed(config: Mapping[str, Any]) -> dict[str, Any]:
        return {**{key: value for key, value in config.items() if key not in left_out}, **values}

    config, wrapper = changed(checkpoint.config), checkpoint.wrapper
    if wrapper is not None:  # classes differ in which of the two they use
        outer = changed(wrapper.config)
        wrapper = replace(wrapper, config={**outer, NESTED: changed(outer[NESTED])})
    architecture = replace(checkpoint.architecture, config=config)
    return replace(checkpoint, config=config, architecture=architecture, wrapper=wrapper)


def _check_dtypes(architecture: Architecture, headers: Mapping[str, TensorHeader], where: str) -> None:
    layers, inside = range(architecture.n_layers), architecture.layer_shapes()
    names = [architecture.tensor_name(layer, local) for layer in layers for local in inside]
    stored = {name: str(headers[name].dtype).removeprefix("torch.") for name in names}
    Problems(
        Problem(
            f"{where}: {name} is stored in {dtype}, which is not a dtype of ordinary weights.",
            "Use a checkpoint that is not quantised.",
        )
        for name, dtype in stored.items()
        if headers[name].dtype not in WEIGHT_DTYPES
    ).raise_any(most=_MOST_NAMED)
