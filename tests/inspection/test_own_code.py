"""Models with code of their own: refused, or handled like any other where the code is trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import intarsia
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from intarsia.inspection.own_code import OPTION, trust_remote_code
from tests import own_code
from tests.command import LITTLE, invoke

FILES = ("configuration_mine.py", "modeling_mine.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_code.save(tmp_path_factory.mktemp("own") / "model")


def compress(folder: Path, out: Path, text_file: Path, *more: Any) -> Any:
    small = ["--calibration", text_file, "--tokens", 512, "--seq-len", 64, "--eval-windows", 2, *LITTLE]
    return invoke("compress", folder, "-o", out, "--layers", own_code.DEPTH - 2, *small, *more)


def test_compress(folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = compress(folder, out, text_file, OPTION)
    assert done.exit_code == 0, done.output
    assert [(out / name).read_text() for name in FILES] == [(folder / name).read_text() for name in FILES]
    config = json.loads((out / "config.json").read_text())
    gains = json.loads((folder / "config.json").read_text())["gains"]
    assert config["architectures"] == ["MineForCausalLM"]
    assert len(config["gains"]) == 4 and set(config["gains"]) < set(gains)

    # The folder's own files load it, and it generates the same with and without a cache.
    model: Any = get_class_from_dynamic_module(config["auto_map"]["AutoModelForCausalLM"], str(out))
    loaded = model.from_pretrained(out).eval()
    prompt = torch.arange(3, 20)[None]
    wanted = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (loaded.generate(prompt, use_cache=use, **wanted) for use in (True, False))
    assert torch.equal(cached, plain)

    settings = json.loads((tmp_path / "out.run" / "settings.json").read_text())
    assert len(settings["config"]["own_code"]) == 64
    assert f"compress {folder}" in (page := (out / "report.html").read_text()) and OPTION in page

    # Every other verb, with and without the option.
    for words in (
        ("verify", out),
        ("eval", "perplexity", out, "--text", text_file, "--seq-len", 64, "--windows", 2),
        ("inspect", out),
        ("build", tmp_path / "out.run", "-o", tmp_path / "again", "--layers", 5),
        ("anatomy", "check", folder),
    ):
        done = invoke(*words)
        assert done.exit_code != 0 and OPTION in done.output, words
        done = invoke(*words, OPTION)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "again" / FILES[1]).is_file()


def test_it_is_refused(folder: Path, text_file: Path, tmp_path: Path) -> None:
    done = compress(folder, tmp_path / "out", text_file)
    assert done.exit_code == 2 and not (tmp_path / "out").exists()
    assert "no model type 'mine', which comes with code of its own that is not run" in done.stderr
    assert f"pass {OPTION}" in done.stderr


def test_trust_ends_with_its_block(folder: Path) -> None:
    with intarsia.trust_remote_code():
        assert Checkpoint.open(folder, model="m").architecture.n_layers == own_code.DEPTH
    with pytest.raises(UserError, match="code of its own that is not run"):
        Checkpoint.open(folder, model="m")


def test_one_type_has_one_code(folder: Path, tmp_path: Path) -> None:
    other = own_code.save(tmp_path / "other")
    (other / FILES[1]).write_text(own_code.MODELING + "\n# another\n")
    with trust_remote_code():
        Checkpoint.open(folder, model="m")
        with pytest.raises(UserError, match="come with different code"):
            Checkpoint.open(other, model="other")
    with trust_remote_code():
        Checkpoint.open(other, model="other")


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "no language model": ({"auto_map": {"AutoModel": "modeling_mine.MineModel"}}, "", "names no AutoModelForCausalLM"),
    "no such file": ({"auto_map": {"AutoModelForCausalLM": "elsewhere.Mine"}}, "", "cannot be used"),
    "code that fails": ({}, "raise RuntimeError('an old version')", "cannot be used: RuntimeError: an old version"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_code_that_cannot_be_used(what: str, tmp_path: Path) -> None:
    changes, code, message = FAULTS[what]
    folder = own_code.save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / FILES[1]).write_text(own_code.MODELING + code)
    with trust_remote_code(), pytest.raises(UserError, match=message):
        Checkpoint.open(folder, model="m")


def test_a_class_of_transformers_comes_first(tmp_path: Path) -> None:
    """A model type that transformers knows never runs other code."""
    folder = own_code.save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    (folder / FILES[1]).write_text("raise RuntimeError")
    with trust_remote_code(), pytest.raises(UserError, match="expected"):  # tensors of a Llama
        Checkpoint.open(folder, model="m")
