"""Hashes: of files, of a model folder (`SHA256SUMS`), and of a model's weights, which are checked to be finite.

`SHA256SUMS` has the format of `sha256sum -c`. It lists everything that decides what the model does, but not the model
card, the picture and the report, which people and later commands edit.

A model's hash covers name, dtype, shape and bytes of every tensor in the order of names, so it does not depend on the
sharding. That of an adapter covers its base's hash and its own files, because the merged tensors may differ in the last
bit between machines. Hashes are cached by path, size and time of change of the files; only finite models are cached.
The config is not part of the hash: `acting_config` has the part that affects results.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch

from intarsia.checkpoint.files import TensorHeader
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import Problem, Problems, UserError
from intarsia.inspection.own_code import code_facts
from intarsia.progress import current

SUMS_FILE = "SHA256SUMS"
_DOCUMENTS = ("README.md", "*.html", "*.svg", "*.png", ".*", SUMS_FILE)
_BLOCK = 2**22  # bytes read, or entries checked, at a time
_MOST_NAMED = 5
_VERSION = 1  # of the hash; part of the cache key

# Config keys without effect on results: origin, special tokens, and those for training or speed. How weights are
# stored (`quantization_config`, dtypes) affects the hash of the weights that are read.
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


def cache_folder() -> Path:
    """`$INTARSIA_CACHE`, or `intarsia` in the platform's cache folder. It need not exist yet."""
    if chosen := os.environ.get("INTARSIA_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "intarsia"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "intarsia" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "intarsia"


def fingerprint(files: Iterable[Path], version: int) -> str:
    """A fingerprint of files by path, size and time of change, without reading them."""
    facts: list[tuple[str, int, int]] = []
    for file in files:
        state = file.stat()
        # In the hub's cache, files are links to blobs named by content.
        facts.append((os.path.realpath(file), state.st_size, state.st_mtime_ns))
    return hashlib.sha256(json.dumps([version, sorted(facts)]).encode()).hexdigest()


def recall(kept: Path) -> str | None:
    """The hash cached in a file; None if there is none."""
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and len(found) == 64 else None


def remember(kept: Path, sha256: str) -> None:
    """Cache a hash in a file; ignore a cache that cannot be written."""
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{token_hex(4)}")
        fresh.write_text(json.dumps({"sha256": sha256}) + "\n", encoding="utf-8")
        os.replace(fresh, kept)


def sha256_of(file: Path, advance: Callable[[int], None] | None = None) -> str:
    """The sha256 (hex) of a file; `advance` is called with the bytes of each read."""
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total.update(block)
            if advance is not None:
                advance(len(block))
    return total.hexdigest()


def listed_files(folder: Path) -> Iterator[Path]:
    """The files of a model folder for its sums, in the order of names."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not any(fnmatch(file.name, pattern) for pattern in _DOCUMENTS):
            yield file


def write_sums(folder: Path) -> None:
    """Write the sums of an otherwise complete folder."""
    lines = [f"{sha256_of(file)}  {file.relative_to(folder).as_posix()}\n" for file in listed_files(folder)]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str] | None:
    """The listed hashes by file name; None if a folder has no list.

    Raises:
        UserError: the list is malformed, or names files outside the folder.
    """
    file = folder / SUMS_FILE
    if not file.is_file():
        return None
    found: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        digest, _, name = line.partition("  ")
        path = Path(name)
        hexadecimal = len(digest) == 64 and not digest.strip("0123456789abcdef")
        if not hexadecimal or not name or path.is_absolute() or ".." in path.parts:
            raise UserError(
                f"{file}, line {number}: {line[:120]!r} is not a sha256, two spaces and a file's name in this folder.",
                f"Download {SUMS_FILE} again.",
            )
        found[name] = digest
    return found


def differing(folder: Path, sums: Mapping[str, str], advance: Callable[[int], None] | None = None) -> list[Problem]:
    """Differences between a folder and its sums: missing or changed files, and unlisted weights."""
    problems = Problems()
    for name, digest in sums.items():
        file = folder / name
        found = sha256_of(file, advance) if file.is_file() else None
        if found != digest:
            fault = "is missing" if found is None else f"has sha256 {found}, not {digest}"
            problems.add(f"{file} {fault}.", "Download or build the folder again.")
    there = {file.relative_to(folder).as_posix() for file in listed_files(folder)}
    problems += [
        Problem(
            f"{folder / name} holds weights, and {SUMS_FILE} does not list it.",
            "Remove the file, or build the folder again.",
        )
        for name in sorted(there - sums.keys())
        if name.endswith(".safetensors")
    ]
    return problems


def scan(checkpoint: Checkpoint) -> str:
    """The sha256 (hex) of a model's weights, which are checked to be finite.

    Raises:
        UserError: with the first tensors that hold NaN or infinity.
    """
    if checkpoint.adapter is not None:
        # It was checked to be finite when it was merged.
        pair = [scan(checkpoint.adapter.base), checkpoint.adapter.sha256]
        return hashlib.sha256(json.dumps(["adapter", *pair]).encode()).hexdigest()
    headers = [*checkpoint.headers.values(), *checkpoint.kept.values()]
    files = {header.file for header in headers} | set(checkpoint.folder.glob("*.safetensors.index.json"))
    key = fingerprint(files, _VERSION)
    if checkpoint.scaled:  # the config gives the dtype, and the blocks that share a scale
        read = sorted((scaled.name, scaled.block, str(scaled.dtype)) for scaled in checkpoint.scaled)
        key = hashlib.sha256(json.dumps([key, read]).encode()).hexdigest()
    kept = cache_folder() / "scan" / f"{key}.json"
    known = recall(kept)
    if known is not None:
        return known
    total = hashlib.sha256()
    problems = Problems()
    with current().task("Checking the weights", checkpoint.nbytes, units=0.0) as task:
        for name, header in [*sorted(checkpoint.headers.items()), *sorted(checkpoint.kept.items())]:
            tensor = header.tensor()
            label = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            total.update(json.dumps(label).encode() + b"\n")
            bad = 0
            for chunk in tensor.reshape(-1).split(_BLOCK):
                raw = chunk.view(torch.uint8)
                total.update(raw.numpy().data)
                bad += not_finite(chunk)
                task.advance(raw.numel())
            if bad:
                problems.append(not_finite_in(header, bad))
            if len(problems) == _MOST_NAMED:
                break
    problems.raise_any()
    remember(kept, total.hexdigest())
    return total.hexdigest()


def not_finite_in(header: TensorHeader, bad: int) -> Problem:
    """The problem of a tensor with `bad` entries that are not finite."""
    return Problem(
        f"{header.file}: {header.name} has NaN or infinity in {bad:,} of {header.numel:,} entries.",
        "The file is damaged, or from a training run that diverged; download it again.",
    )


def not_finite(chunk: torch.Tensor) -> int:
    """The number of entries that are NaN or infinite."""
    if not chunk.is_floating_point():
        return 0
    # One NaN or infinity makes the sum NaN or infinite. The converse does not hold, so only a finite sum decides.
    wide = torch.float64 if chunk.dtype == torch.float64 else torch.float32
    if chunk.dtype.itemsize == 1:  # torch cannot sum 8-bit floats
        chunk = chunk.float()
    if bool(torch.isfinite(chunk.sum(dtype=wide))):
        return 0
    return int(chunk.numel() - torch.isfinite(chunk).sum())


def acting_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that affects the model's outputs: everything not known to be irrelevant, and the hash of
    the model's own code."""
    acts = {k: value for k, value in sorted(config.items()) if k not in _IDLE and not k.endswith(_IDLE_ENDINGS)}
    return acts | code_facts(config)
