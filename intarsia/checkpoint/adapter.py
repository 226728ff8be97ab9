"""A PEFT adapter as a variant: merged into its base by peft once, and kept as an ordinary checkpoint folder.

The folder is in the cache; its key is made of the base's files (path, size, time of change) and the adapter's hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from intarsia.checkpoint.adapter_merge import Merged
from intarsia.checkpoint.hashing import cache_folder, fingerprint, not_finite, not_finite_in, sha256_of
from intarsia.checkpoint.reader import Adapter, Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint, resolve
from intarsia.checkpoint.tensor_file import map_tensor, read_headers
from intarsia.checkpoint.writer import CheckpointWriter, TensorPlan, copy_side_files
from intarsia.disk import read_json
from intarsia.errors import Problem, Problems, UserError
from intarsia.model_name import plain_name
from intarsia.progress import current

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_CHANGED_FILE = "adapter_changed.json"
_VERSION = 1  # of how adapters are merged; part of the key
_MOST_NAMED = 5
_MERGE = "Merge it with peft first: merge_and_unload(), then save_pretrained(), and pass the folder that this makes."
# What of an adapter's config says nothing about the weights.
_IDLE = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"}
# Changes more than tensors of the base, depends on the input, or is called otherwise in the base's files.
_REFUSED = ("layer_replication", "alora_invocation_tokens", "arrow_config", "target_parameters")
# Start from other base weights than those in the base's files.
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").exists()


def open_variant(
    model: str,
    *,
    revision: str | None = None,
    base: Checkpoint | None = None,
) -> Checkpoint:
    """A variant, wherever it is: a folder, a hub id, `demo`, or the folder or hub id of a PEFT adapter.

    Weights of 8 bits are read as ordinary ones: who planned with them has said so.

    Args:
        base: what an adapter is merged into; by default the base that its config names. Where the base is an adapter
            itself, it is that one's base.

    Raises:
        UserError: it cannot be found, is no checkpoint that can be used, or is an adapter for another base.
    """
    model = plain_name(model)
    folder = resolve(model, revision=revision)
    if not is_adapter(folder):
        return Checkpoint.open(folder, model=model, revision=revision, dequantize=True)
    config = read_adapter_config(folder)
    base = base or _named_base(folder, model, config)
    base = base if base.adapter is None else base.adapter.base
    sha256 = _sha256(folder, config)
    merged = _merged_folder(folder, sha256, base)
    changed = read_json(merged / _CHANGED_FILE, expected="names of tensors", remedy=f"Remove {merged}.")["changed"]
    adapter = Adapter(
        folder=folder,
        base_model=config.get("base_model_name_or_path") or None,
        base=base,
        sha256=sha256,
        changed=frozenset(changed),
    )
    return replace(Checkpoint.open(merged, model=model, revision=revision), adapter=adapter)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """A folder's adapter_config.json, of an adapter that can be merged.

    Raises:
        UserError: with everything in it that cannot.
    """
    file = folder / CONFIG_FILE
    config = read_json(file, expected="a JSON object", remedy="Get the adapter again.")
    faults = []
    if config.get("peft_type") != "LORA":
        faults.append(("peft_type", "LORA", config.get("peft_type")))
    faults += [(key, "left out: it cannot be merged here", config[key]) for key in _REFUSED if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        faults.append(("init_lora_weights", "one that leaves the base's weights as they are", start))
    if faults:
        raise UserError(
            Problem(f"{file}: {key} is {repr(found)[:60]}, and should be {expected}.", _MERGE)
            for key, expected, found in faults
        )
    return config


def _named_base(folder: Path, model: str, config: Mapping[str, Any]) -> Checkpoint:
    named = config.get("base_model_name_or_path")
    if not named:
        raise UserError(
            f"{folder / CONFIG_FILE} names no base_model_name_or_path, the model that the adapter is for.",
            "Name its base beside it, as the base of the recipe or family.",
        )
    try:
        return open_checkpoint(str(named))
    except UserError as error:
        raise UserError(
            f"The adapter {model} names {str(named)!r} as its base, which cannot be used: {error.problems[0].message}",
            "Name a base that is there, as the base of the recipe or family.",
        ) from error


def _sha256(folder: Path, config: Mapping[str, Any]) -> str:
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{folder} has no {WEIGHTS_FILE}, "
            f"{'only pickled weights' if (folder / 'adapter_model.bin').exists() else 'and no other weights'}.",
            "If you trust the adapter, load it with peft once and save it with save_pretrained().",
        )
    deciding = {key: value for key, value in sorted(config.items()) if key not in _IDLE and value is not None}
    return hashlib.sha256(json.dumps([deciding, sha256_of(folder / WEIGHTS_FILE)]).encode()).hexdigest()


def _merged_folder(folder: Path, sha256: str, base: Checkpoint) -> Path:
    """The folder of the merged model; made the first time."""
    files = {header.file for header in [*base.headers.values(), *base.kept.values()]} | {base.folder / "config.json"}
    key = hashlib.sha256(json.dumps([fingerprint(files, _VERSION), sha256]).encode()).hexdigest()
    merged = cache_folder() / "merged" / key
    if not (merged / _CHANGED_FILE).exists():
        _check_finite(folder / WEIGHTS_FILE)
        _write(Merged(folder / WEIGHTS_FILE, base), folder, merged)
    return merged


def _check_finite(file: Path) -> None:
    checked = ((header, not_finite(map_tensor(header))) for header in read_headers(file))
    Problems(not_finite_in(header, bad) for header, bad in checked if bad).raise_any(most=_MOST_NAMED)


def _write(model: Merged, adapter: Path, out: Path) -> None:
    base, tensors = model.base, model.plan()
    plans = [TensorPlan(name=base.stored_name(name), dtype=dtype, shape=shape) for name, dtype, shape in tensors]
    kept = [TensorPlan(name=header.name, dtype=header.dtype, shape=header.shape) for header in base.kept.values()]
    changed: list[str] = []
    title = f"Merging {adapter.name}"
    with (
        CheckpointWriter(out, [*plans, *kept], overwrite=True) as writer,
        current().task(title, sum(plan.nbytes for plan in plans)) as task,
    ):
        for plan, (name, _, _) in zip(plans, tensors, strict=True):
            tensor = model.tensor(name)
            if name not in base.headers or not torch.equal(tensor, base.tensor(name)):
                changed.append(name)
            writer.write(plan.name, tensor)
            task.advance(plan.nbytes)
        for plan in kept:
            writer.write(plan.name, base.kept_tensor(plan.name))
        config = model.config()
        if base.wrapper is not None:
            config = base.wrapper.wrapped(base.config, config)
        _write_json(writer.folder / "config.json", config)
        copy_side_files(base.folder, writer.folder)
        if model.resized:
            copy_side_files(adapter, writer.folder)
        _write_json(writer.folder / _CHANGED_FILE, {"changed": sorted(changed)})


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
