"""What is built keeps the contract in every family, and each check finds what it is there for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from intarsia.building.materialize import RECIPE_FILE, materialize
from intarsia.checkpoint.hashing import SUMS_FILE, write_sums
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.verify import VerifyResult, verify
from intarsia.errors import UserError
from tests import families, wrappers
from tests.conftest import Folder
from tests.recipes_by_hand import recipe_of, select, shared

CHECKS = [
    "architecture",
    "config",
    "index and shards",
    "tensors",
    "dtype",
    "finite",
    "sha256",
    "tokenizer",
    "generation config",
    "loads",
    "generates",
]
SHARD = 30_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "cache"))


def built(source: Path, out: Path, *, most: int = 10**9) -> Path:
    checkpoint = Checkpoint.open(source, model=str(source))
    depth = checkpoint.architecture.n_layers
    layers = [shared(checkpoint.architecture, (0, 1)), *(select(layer) for layer in range(2, depth))]
    if checkpoint.architecture.layer_types is not None:
        layers = [select(layer) for layer in range(1, depth)]
    materialize(recipe_of(str(source), layers, depth=depth), {"base": checkpoint}, out, max_shard_bytes=most)
    return out


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_keeps_it(family: str, model_folder: Folder, tmp_path: Path) -> None:
    out = built(model_folder(family), tmp_path / "out", most=SHARD)
    result = verify(out, shard_size=str(SHARD))
    assert [(check.check, check.outcome, check.found) for check in result.checks if check.outcome != "ok"] == []
    assert [check.check for check in result.checks] == CHECKS
    assert result.kept
    found = {check.check: check.found for check in result.checks}
    assert found["config"].startswith(f"{families.DEPTH - 1} layers")
    assert found["dtype"] == "float32"
    assert "the same as those of" in found["tokenizer"]


@pytest.mark.parametrize("kind", wrappers.WRAPPERS)
def test_wrappers_keep_it(kind: str, tmp_path: Path) -> None:
    out = built(wrappers.save(wrappers.make_wrapper(kind), tmp_path / "model"), tmp_path / "out")
    result = verify(out)
    assert [(check.check, check.outcome, check.found) for check in result.checks if check.outcome != "ok"] == []


def test_foreign_folder(model_folder: Folder) -> None:
    """Nothing is known about its source, and it has no sums: that is no failure."""
    result = verify(model_folder("llama"), load=False)
    assert result.kept
    outcomes = {check.check: check.outcome for check in result.checks}
    assert [name for name, outcome in outcomes.items() if outcome != "ok"] == ["sha256"]
    assert "loads" not in outcomes


@pytest.fixture
def folder(model_folder: Folder, tmp_path: Path) -> Path:
    return built(model_folder("qwen2"), tmp_path / "out", most=SHARD)


def set_config(folder: Path, name: str = "config.json", **changes: Any) -> None:
    values = {**json.loads((folder / name).read_text()), **changes}
    (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    resum(folder)


def resum(folder: Path) -> None:
    """New sums, so that only the check in question fails."""
    write_sums(folder)


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    resum(folder)


def failed(folder: Path, *, load: bool = False, most: int = SHARD) -> dict[str, str]:
    result: VerifyResult = verify(folder, shard_size=str(most), load=load)
    found = {check.check: check.found for check in result.checks if check.outcome == "failed"}
    assert result.kept == (not found)
    assert all(check.remedy for check in result.checks if check.outcome == "failed")
    return found


UP = "model.layers.1.mlp.up_proj.weight"


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = float("nan")
    return tensor


def test_code_and_foreign_classes(folder: Path) -> None:
    assert failed(folder) == {}
    set_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert "auto_map" in failed(folder)["architecture"]
    set_config(folder, auto_map=..., architectures=["LlamaForCausalLM"])
    assert "expected ['Qwen2ForCausalLM']" in failed(folder)["architecture"]
    set_config(folder, architectures=["Qwen2ForCausalLM"])
    (folder / "modeling_x.py").write_text("")
    assert "modeling_x.py" in failed(folder)["architecture"]


def test_per_layer_lists(folder: Path) -> None:
    set_config(folder, layer_types=["full_attention"] * families.DEPTH)
    found = failed(folder)
    assert "layer_types" in found["config"]
    assert {"config", "tensors"} <= set(found)


def test_depth_that_is_not_the_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    types = config.get("layer_types")
    more = {} if types is None else {"layer_types": [*types, types[-1]]}
    set_config(folder, num_hidden_layers=families.DEPTH, **more)
    found = failed(folder, load=True)
    assert "num_hidden_layers is 6 in the config, but the files hold 5 layers" in found["tensors"]
    assert "missing: model.layers.5.input_layernorm.weight" in found["loads"]


def test_index(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    before = file.read_text()
    index = json.loads(before)
    index["metadata"]["total_size"] += 1
    file.write_text(json.dumps(index))
    resum(folder)
    assert "total_size" in failed(folder)["index and shards"]
    file.write_text(json.dumps({**index, "metadata": None}))
    resum(folder)
    assert "total_size" in failed(folder)["index and shards"]
    index = json.loads(before)
    del index["weight_map"][UP]
    file.write_text(json.dumps(index))
    resum(folder)
    assert f"found {UP}" in failed(folder)["index and shards"]
    file.write_text(before)
    shutil.copyfile(folder / index["weight_map"]["model.norm.weight"], folder / "stray.safetensors")
    resum(folder)
    expected = "expected only files in model.safetensors.index.json; found stray.safetensors"
    assert failed(folder) == {"index and shards": f"{folder}: {expected}"}


def test_shards_that_are_too_large(folder: Path) -> None:
    assert "expected at most 20,000 bytes" in failed(folder, most=20_000)["index and shards"]


def test_a_tensor_may_be_larger_than_a_shard(model_folder: Folder, tmp_path: Path) -> None:
    out = built(model_folder("qwen2"), tmp_path / "out", most=1)
    assert failed(out, most=1) == {}


def test_dtype(folder: Path) -> None:
    edit_tensor(folder, UP, lambda tensor: tensor.double())
    assert "dtype" not in failed(folder)  # transformers loads all of them in the config's
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert "dtype: expected float32, the embedding's; found float16" in failed(folder)["dtype"]


def test_nan(folder: Path) -> None:
    edit_tensor(folder, UP, with_nan)
    found = failed(folder, load=True)
    assert found.keys() == {"finite", "generates"}
    assert "NaN or infinity in 1 of" in found["finite"]


def test_sums(folder: Path) -> None:
    (folder / "README.md").write_text("edited, and not listed")
    assert failed(folder) == {}
    text = (folder / "generation_config.json").read_text()
    (folder / "generation_config.json").write_text(text + "\n")
    assert "generation_config.json has sha256" in failed(folder)["sha256"]
    (folder / "generation_config.json").unlink()
    assert "is missing" in failed(folder)["sha256"]
    (folder / "generation_config.json").write_text(text)
    (folder / SUMS_FILE).write_text("0" * 64 + "  ../elsewhere\n")
    assert "line 1: " in failed(folder)["sha256"]
    (folder / SUMS_FILE).unlink()
    assert "expected a SHA256SUMS; found none" in failed(folder)["sha256"]


def test_sums_are_those_of_the_files(folder: Path) -> None:
    import hashlib

    lines = dict(reversed(line.split("  ")) for line in (folder / SUMS_FILE).read_text().splitlines())
    assert {str(RECIPE_FILE), "config.json", "tokenizer.json", "model.safetensors.index.json"} <= set(lines)
    assert len([name for name in lines if name.startswith("model-")]) > 2
    for name, digest in lines.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("</s>", "</t>"))
    resum(folder)
    assert "tokenizer.json: expected the file of the source; found another one" in failed(folder)["tokenizer"]
    (folder / "tokenizer.json").unlink()
    resum(folder)
    assert "found no such file" in failed(folder)["tokenizer"]
    (folder / "tokenizer.json").write_text(text)
    set_config(folder, eos_token_id=7)
    assert "config.json: eos_token_id: expected 0, as in the source; found 7" in failed(folder)["tokenizer"]


def test_more_tokens_than_the_embedding_has_rows(tmp_path: Path) -> None:
    folder = families.save(families.make_model("llama", vocab_size=319), tmp_path / "model")
    assert "expected ids below 319, the embedding's rows; found 319" in failed(folder, most=10**9)["tokenizer"]


def test_tokenizer_that_is_no_tokenizer(model_folder: Folder, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model_folder("qwen2"), tmp_path / "model"))
    (source / "tokenizer.json").write_text("{}")
    out = built(source, tmp_path / "out")
    assert "expected a tokenizer that transformers can read" in failed(out)["tokenizer"]


def test_generation_config(folder: Path) -> None:
    set_config(folder, "generation_config.json", eos_token_id=[0, 99999])
    assert "expected tokens below 320; found eos_token_id 99999" in failed(folder)["generation config"]
    set_config(folder, "generation_config.json", eos_token_id=0, early_stopping="perhaps")
    assert "early_stopping" in failed(folder)["generation config"]


def test_tensors_that_no_parameter_takes(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["model.norm.weight"]
    tensors = load_file(folder / shard)
    tensors["model.extra.weight"] = torch.ones(3)
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    index["weight_map"]["model.extra.weight"] = shard
    index["metadata"]["total_size"] += 12
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    resum(folder)
    assert failed(folder, load=True) == {
        "loads": f"{folder}: expected exactly the tensors of the model; found unexpected: model.extra.weight"
    }


def test_cache_that_changes_what_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder of a stock class should do this; here the class is made to."""
    from transformers import Qwen2ForCausalLM

    original = Qwen2ForCausalLM.forward

    def forgetful(self: Any, *args: Any, past_key_values: Any = None, **options: Any) -> Any:
        found = original(self, *args, past_key_values=past_key_values, **options)
        if past_key_values is not None and past_key_values.get_seq_length() > 20:
            found.logits = found.logits.roll(1, dims=-1)
        return found

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", forgetful)
    assert "expected the tokens generated without a cache" in failed(folder, load=True)["generates"]


def test_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        verify(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config.json: expected a file with one JSON object"):
        verify(tmp_path)
