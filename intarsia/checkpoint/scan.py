"""One pass over every weight of a model: are they finite, and what is their hash?

The hash is over name, dtype, shape and bytes of every tensor in the order of names, so a model keeps its hash when
it is sharded differently. That of a model read through an adapter is over its base's hash and the adapter's tensors
as they are stored, for their product may differ in its last bit from one machine to the next. The result is kept for
files of the same path, size and time of change, and the same way of reading them; only models that were found finite
are remembered.

The config is no part of the hash, which recipes and runs of earlier versions hold too. What of it changes the numbers,
`acting_config` tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from intarsia.checkpoint.adapter import Adapter
from intarsia.checkpoint.cache import cache_folder
from intarsia.checkpoint.header import TensorHeader
from intarsia.checkpoint.mapped import map_tensor
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.remembered import fingerprint, recall, remember
from intarsia.errors import Problem, UserError
from intarsia.progress import Progress, Silent, Task

_CHUNK = 2**22  # entries looked at together: small enough for the copies that a check makes
_MOST_NAMED = 5
_VERSION = 1  # of the hash; part of the key under which it is kept

# Of a config: who made it, how text is cut and told apart, and what acts in training or on speed alone. How weights are
# stored (`quantization_config`, dtypes) shows in the hash of what is read.
_IDLE = {
    "architectures",
    "auto_map",
    "cache_implementation",
    "dtype",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "problem_type",
    "quantization_config",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_IDLE_ENDINGS = ("_token_id", "_dropout", "name_or_path", "_attn_implementation", "_pdrop")


def scan(checkpoint: Checkpoint, progress: Progress | None = None) -> str:
    """The sha256 (hex) of a model's weights, all of which are finite.

    Raises:
        UserError: naming the first tensors that hold NaN or infinity.
    """
    if checkpoint.adapter is not None:
        return _scan_adapter(checkpoint.adapter, scan(replace(checkpoint, adapter=None), progress))
    kept = cache_folder() / "scan" / f"{_fingerprint(checkpoint)}.json"
    known = recall(kept)
    if known is not None:
        return known
    total = hashlib.sha256()
    problems: list[Problem] = []
    with (progress or Silent()).task("Checking the weights", checkpoint.nbytes) as task:
        for name in [*sorted(checkpoint.headers), *sorted(checkpoint.kept)]:
            outside = name not in checkpoint.headers
            tensor = checkpoint.kept_tensor(name) if outside else checkpoint.tensor(name)
            label = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            total.update(json.dumps(label).encode() + b"\n")
            bad = _read_through(tensor, total, task)
            if bad:
                problems.append(_not_finite_in((checkpoint.kept if outside else checkpoint.headers)[name], bad))
            if len(problems) == _MOST_NAMED:
                break
    if problems:
        raise UserError(problems)
    remember(kept, total.hexdigest())
    return total.hexdigest()


def _scan_adapter(adapter: Adapter, base_sha256: str) -> str:
    """The hash of a base with an adapter; adapters are small, so nothing is remembered."""
    total = hashlib.sha256(json.dumps(["lora", base_sha256]).encode() + b"\n")
    problems: list[Problem] = []
    for name, update in sorted(adapter.updates.items()):
        total.update(json.dumps([name, update.scale]).encode() + b"\n")
        for header in (update.b_OR, update.a_RI):
            tensor = map_tensor(header)
            label = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            total.update(json.dumps(label).encode() + b"\n")
            bad = _read_through(tensor, total, None)
            if bad:
                problems.append(_not_finite_in(header, bad))
    if problems:
        raise UserError(problems[:_MOST_NAMED])
    return total.hexdigest()


def _not_finite_in(header: TensorHeader, bad: int) -> Problem:
    return Problem(
        where=f"{header.file}: {header.name}",
        expected="finite numbers",
        found=f"NaN or infinity in {bad:,} of {header.numel:,} entries",
        remedy="The checkpoint is damaged, or comes from a training run that diverged; get it again.",
    )


def _read_through(tensor: torch.Tensor, total: hashlib._Hash, task: Task | None) -> int:
    """Adds a tensor's bytes to the hash; returns how many entries are not finite."""
    bad = 0
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        raw = chunk.view(torch.uint8)
        total.update(raw.numpy().data)
        bad += _not_finite(chunk)
        if task is not None:
            task.advance(raw.numel())
    return bad


def _not_finite(chunk: torch.Tensor) -> int:
    if not chunk.is_floating_point():
        return 0
    # One NaN or infinity makes the sum NaN or infinite. The converse does not hold, so only a finite sum decides.
    wide = torch.float64 if chunk.dtype == torch.float64 else torch.float32
    if chunk.dtype.itemsize == 1:  # torch adds up no floats of 8 bits
        chunk = chunk.float()
    if bool(torch.isfinite(chunk.sum(dtype=wide))):
        return 0
    return int(chunk.numel() - torch.isfinite(chunk).sum())


def acting_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config changes what the model computes from its weights: anything that is not known not to."""
    return {key: value for key, value in sorted(config.items()) if key not in _IDLE and not key.endswith(_IDLE_ENDINGS)}


def _fingerprint(checkpoint: Checkpoint) -> str:
    headers = [*checkpoint.headers.values(), *checkpoint.kept.values()]
    files = {header.file for header in headers} | set(checkpoint.folder.glob("*.safetensors.index.json"))
    found = fingerprint(files, _VERSION)
    if not checkpoint.scaled:
        return found
    # Weights of 8 bits are read as the config says: in which dtype, and how many share a scale.
    read = [(name, scaled.block, str(scaled.dtype)) for name, scaled in sorted(checkpoint.scaled.items())]
    return hashlib.sha256(json.dumps([found, read]).encode()).hexdigest()
