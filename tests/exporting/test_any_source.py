"""From every kind of source to a folder that keeps the contract, by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from intarsia.recipe import schema
from tests import families, wrappers
from tests.checkpoint.test_stored_forms import quantise
from tests.command import LITTLE, invoke


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "cache"))


def run(*words: Any) -> dict[str, Any]:
    done = invoke(*words, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compressed(model: Path, out: Path, text: Path, *options: str) -> dict[str, Any]:
    small = ("--calibration", text, "--tokens", 1024, "--seq-len", 64, "--layers", 4, "--eval-windows", 4, *LITTLE)
    found = run("compress", model, "-o", out, *small, "--eval-text", text, "--max-shard-size", "40KB", *options)
    assert found["after"]["layers"] == 4
    checks = run("verify", out, "--max-shard-size", "40KB")["checks"]
    assert [check for check in checks if check["outcome"] == "failed"] == []
    # Built anew from the recipe alone, which must name its source in a way that works from anywhere.
    again = out.with_name("again")
    run("build", out.with_name(f"{out.name}.run"), "-o", again)
    assert (
        schema.load(out / "recipe" / "recipe.yaml").variants == schema.load(again / "recipe" / "recipe.yaml").variants
    )
    return found


def test_wrapper(tmp_path: Path, text_file: Path) -> None:
    model = wrappers.save(wrappers.make_wrapper("llava"), tmp_path / "model")
    compressed(model, tmp_path / "out", text_file)
    built = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert built.config.get_text_config().num_hidden_layers == 4
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_8_bits(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.save(families.make_model("llama"), tmp_path / "model")
    quantise(model, "block")
    refused = invoke("compress", str(model), "-o", str(tmp_path / "out"), "--layers", "4")
    assert refused.exit_code == 2 and "--dequantize" in refused.stderr
    monkeypatch.chdir(tmp_path)
    compressed(Path("model"), tmp_path / "out", text_file, "--dequantize")
    recipe = schema.load(tmp_path / "out" / "recipe" / "recipe.yaml")
    assert recipe.variants[0].model == str(model)
    more = ("--data", text_file, "--tokens", 1024, "--seq-len", 64, "--max-shard-size", "40KB")
    run("heal", tmp_path / "out", "-o", tmp_path / "healed", *more)
    assert run("verify", tmp_path / "healed", "--max-shard-size", "40KB")["kept"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("source", ["wrapper", "8 bits"])
def test_streamed_plans_are_the_same(source: str, tmp_path: Path, text_file: Path) -> None:
    if source == "wrapper":
        model = wrappers.save(wrappers.make_wrapper("gemma3"), tmp_path / "model")
    else:
        model = families.save(families.make_model("llama"), tmp_path / "model")
        quantise(model, "row", torch.float32)
    common = (
        "--calibration",
        text_file,
        "--tokens",
        512,
        "--seq-len",
        64,
        "--layers",
        4,
        "--dequantize",
        "--method",
        "shortgpt",
    )
    for place, how in ((tmp_path / "one", ()), (tmp_path / "other", ("--stream",))):
        run("plan", model, "--run", place, *common, *how)
        run("build", place, "-o", tmp_path / f"{place.name}-model")
    one, other = ((tmp_path / f"{name}-model" / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


def test_gguf_file(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("transformers", minversion="5.18", reason="earlier transformers read tokenizers of GGUF wrong")
    pytest.importorskip("accelerate")
    model = families.save(families.make_model("llama"), tmp_path / "model")
    assert run("export", model, "-o", tmp_path / "files" / "m.gguf", "--gguf", "F32")["context"] == families.POSITIONS
    monkeypatch.chdir(tmp_path / "files")
    compressed(Path("."), tmp_path / "out", text_file, "--gguf-file", "m.gguf")
    recipe = schema.load(tmp_path / "out" / "recipe" / "recipe.yaml")
    assert recipe.variants[0].model == str(tmp_path / "files" / "m.gguf")


def test_exit_codes_of_verify(tmp_path: Path) -> None:
    model = families.save(families.make_model("llama"), tmp_path / "model")
    assert invoke("verify", str(model), "--no-load").exit_code == 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "x.X"}}))
    failed = invoke("verify", str(model), "--no-load")
    assert failed.exit_code == 1
    assert "auto_map" in failed.stdout and "Remove auto_map." in failed.stdout
    assert invoke("verify", str(tmp_path)).exit_code == 2


def test_files_that_are_there_are_not_overwritten(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = families.save(families.make_model("llama"), tmp_path / "model")
    (tmp_path / "m.gguf").write_text("thesis")
    command = ["export", str(model), "-o", str(tmp_path / "m.gguf")]
    refused = invoke(*command)
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr
    assert (tmp_path / "m.gguf").read_text() == "thesis"
    assert invoke(*command, "--overwrite").exit_code == 0
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"
    assert invoke("export", str(model), "-o", str(model)).exit_code == 2
