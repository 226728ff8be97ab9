"""Writing model folders: weights as a stream of tensors, a shallower model's config, and side files.

One tensor is in memory at a time, and the folder is published whole or not at all.

Names, dtypes and shapes are known before the first tensor is made, so headers and shards are laid out at once. Inside a
shard, tensors of wider dtypes come first, as in safetensors' own writer, which keeps every tensor aligned; with one
dtype, the usual case, the layout is the order of the plan.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from intarsia.architecture.per_layer import for_layers
from intarsia.checkpoint.files import DTYPES, INDEX_FILE, SINGLE_FILE, TensorPlan
from intarsia.checkpoint.hashing import write_sums
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.stored_forms import NESTED, is_wrapped
from intarsia.disk import staged_folder
from intarsia.inspection.own_code import CODE, code_files, is_own, trusts
from intarsia.progress import current

TEMPLATES = "additional_chat_templates"
"""The folder of a tokenizer's additional chat templates."""
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
)
_SIDE_FILES = (
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
# A name such as `tokenizer_ablation.safetensors` must not copy weights.
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """One file: its header, with the length first, and the start of each tensor."""

    file: str
    header: bytes
    starts: dict[str, int]


@contextmanager
def checkpoint_writer(
    out: Path,
    tensors: Sequence[TensorPlan],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    inputs: Collection[Path] = (),
) -> Iterator[CheckpointWriter]:
    """Write a model folder: if the block succeeds, add an index and the sums of all files, and publish it as `out`;
    otherwise remove it."""
    writer = CheckpointWriter(tensors, max_shard_bytes)
    with staged_folder(out, overwrite=overwrite, nbytes=writer.nbytes, inputs=inputs) as writer.folder:
        try:
            yield writer
            writer.finish()
        finally:
            writer.close()


class CheckpointWriter:
    """Writes the weight files of a model folder. `folder` also takes config, tokenizer and other side files."""

    folder: Path

    def __init__(self, tensors: Sequence[TensorPlan], max_shard_bytes: int) -> None:
        assert tensors, "a model has weights"
        assert len({plan.name for plan in tensors}) == len(tensors), "names are unique"
        self._shards = _lay_out(tensors, max_shard_bytes)
        self._nbytes = sum(plan.nbytes for plan in tensors)
        self._parameters = sum(plan.numel for plan in tensors)
        self._places = [(plan, shard) for shard in self._shards for plan in tensors if plan.name in shard.starts]
        self._done = 0
        self._file: FileIO | None = None

    @property
    def nbytes(self) -> int:
        """Total size of the weight files."""
        return self._nbytes + sum(len(shard.header) for shard in self._shards)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor of the plan.

        Raises:
            OSError: the disk is full; the writer's block turns it into a `UserError`.
        """
        assert self._done < len(self._places), f"{name} is not in the plan"
        plan, shard = self._places[self._done]
        assert plan.name == name, f"expected {plan.name}, got {name}"
        assert plan.dtype == tensor.dtype, f"{name}: planned {plan.dtype}, got {tensor.dtype}"
        assert plan.shape == tuple(tensor.shape), f"{name}: planned {plan.shape}, got {tuple(tensor.shape)}"
        if self._done == 0 or self._places[self._done - 1][1] is not shard:
            self.close()
            # Unbuffered, so that the end of the block cannot fail.
            self._file = FileIO(self.folder / shard.file, "w")
            _write_all(self._file, memoryview(shard.header))
        assert self._file is not None
        self._file.seek(shard.starts[name])
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            _write_all(self._file, flat.view(torch.uint8).numpy().data)
        self._done += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Finish the last file."""
        self.close()
        assert self._done == len(self._places), f"{len(self._places) - self._done} planned tensors were not written"
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_parameters": self._parameters, "total_size": self._nbytes},
                "weight_map": {plan.name: shard.file for plan, shard in self._places},
            }
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / INDEX_FILE).write_text(text, encoding="utf-8")
        write_sums(self.folder)


def _write_all(file: FileIO, data: memoryview) -> None:
    # One call writes at most 2 GiB, and less when the disk is nearly full.
    while data:
        data = data[file.write(data) :]


def _groups(tensors: Sequence[TensorPlan], most: int) -> Iterator[list[TensorPlan]]:
    """Runs of tensors that fit into one shard; a tensor larger than a shard gets its own."""
    group: list[TensorPlan] = []
    filled = 0
    for plan in tensors:
        if group and filled + plan.nbytes > most:
            yield group
            group, filled = [], 0
        group.append(plan)
        filled += plan.nbytes
    yield group


def _lay_out(tensors: Sequence[TensorPlan], max_shard_bytes: int) -> list[_Shard]:
    groups = list(_groups(tensors, max_shard_bytes))
    shards: list[_Shard] = []
    for number, group in enumerate(groups, start=1):
        file = SINGLE_FILE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        end = 0
        for plan in sorted(group, key=lambda plan: -plan.dtype.itemsize):
            offsets[plan.name] = end
            end += plan.nbytes
            entries[plan.name] = {
                "dtype": _NAMES[plan.dtype],
                "shape": list(plan.shape),
                "data_offsets": [offsets[plan.name], end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        header = len(text).to_bytes(8, "little") + text
        starts = {name: len(header) + offset for name, offset in offsets.items()}
        shards.append(_Shard(file=file, header=header, starts=starts))
    return shards


def write_config(source: Checkpoint, layer_sources: Sequence[int], out: Path) -> None:
    """Write `out`/config.json for a model with one layer per entry of `layer_sources`: see `shallower_config`.

    It names the class that loads the model, and no code of the model's own if transformers has the class.

    Raises:
        UserError: a per-layer list of the config is not as long as the model is deep.
    """
    config = shallower_config(source, layer_sources)
    if source.wrapper is not None:
        config = source.wrapper.wrapped(source.config, config)
    stated, classes = config.get("architectures"), stock_classes(config)
    if classes and stated != classes:
        config["architectures"] = classes
        if stated:
            current().say(f"architectures is {stated}, but {classes} in the output, by model_type")
    if not is_own(config.get("model_type")):
        for values in (config, config.get(NESTED)):
            if isinstance(values, dict):
                values.pop(CODE, None)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def shallower_config(source: Checkpoint, layer_sources: Sequence[int]) -> dict[str, Any]:
    """The config of a model (inside a wrapper, of its text model) with one layer per entry of `layer_sources`.

    Output layer i takes its per-layer settings from layer `layer_sources[i]` of `source`. All other values are
    unchanged.

    Raises:
        UserError: a per-layer list of the config is not as long as the model is deep.
    """
    where = str(source.folder / "config.json")
    return for_layers(source.architecture, source.config, layer_sources, where)


def stock_classes(config: Mapping[str, Any]) -> list[str]:
    """The class that the auto class would choose; empty if transformers does not know the model."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return []
    own = CONFIG_MAPPING[str(kind)]
    table: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if is_wrapped(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    return [table[own].__name__] if own in table else []


def copy_side_files(source: Path, out: Path) -> None:
    """Copy tokenizer, chat templates, generation config, licence and used trusted code; no weights or card."""
    for name in [*side_files(source), *used_code(source)]:
        (out / name).parent.mkdir(exist_ok=True)
        # Contents only: in the hub's cache these are links, with the cache's modes.
        (out / name).write_bytes(without_code(source / name))


def side_files(folder: Path, patterns: Sequence[str] = _SIDE_FILES) -> list[str]:
    """The names of a folder's files that match these patterns."""
    files = [file for file in folder.iterdir() if file.is_file()]
    files += [file for file in (folder / TEMPLATES).glob("*.jinja") if file.is_file()]
    named = {file.relative_to(folder).as_posix(): file.name for file in files}
    return sorted(
        name
        for name, last in named.items()
        if (name != last or any(fnmatch(last, pattern) for pattern in patterns))
        and not any(fnmatch(last, pattern) for pattern in _WEIGHT_FILES)
    )


def used_code(folder: Path) -> list[str]:
    """The code files that a folder's model or tokenizer needs, if they are trusted."""
    files = [folder / name for name in ("config.json", *side_files(folder, TOKENIZER_FILES))] if trusts() else []
    return code_files(folder) if any(uses_code(file) for file in files) else []


def uses_code(file: Path) -> bool:
    """Whether a JSON file of a model folder names code to run: trusted, for a class that transformers does not have."""
    if not trusts() or file.suffix != ".json" or not file.is_file() or CODE.encode() not in file.read_bytes():
        return False
    if file.name != "config.json":
        return True
    with suppress(ValueError, AttributeError):
        return is_own(json.loads(file.read_bytes()).get("model_type"))
    return False


def without_code(file: Path) -> bytes:
    """The content of a side file to copy; a JSON file loses references to the model's own code, unless trusted."""
    data = file.read_bytes()
    if file.suffix == ".json" and CODE.encode() in data and not uses_code(file):
        with suppress(ValueError):
            values = json.loads(data)
            if isinstance(values, dict) and values.pop(CODE, None) is not None:
                data = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    return data
