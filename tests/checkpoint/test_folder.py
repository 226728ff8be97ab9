"""Config and side files of an output folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.writer import copy_side_files, write_config
from intarsia.errors import UserError

Make = Callable[..., Path]


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, model="m")


def test_config_is_trimmed_and_nothing_else_changes(model: Make, tmp_path: Path) -> None:
    folder = model("tied")
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    config["use_sliding_window"] = True
    config["unheard_of"] = {"ünïcode": [0.1, 1e-06, None, True], "max": float("inf")}
    (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    out.mkdir()
    write_config(opened(folder), [1, 2], out)
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert written.pop("num_hidden_layers") == 2
    assert written.pop("layer_types") == ["sliding_attention", "full_attention"]
    changed = ("num_hidden_layers", "layer_types")
    assert list(written) == [key for key in config if key not in changed]
    assert all(written[key] == config[key] for key in written)
    assert AutoConfig.from_pretrained(out).layer_types == ["sliding_attention", "full_attention"]


def test_config_without_lists(saved: dict[str, Path], tmp_path: Path) -> None:
    source = opened(saved["single"])
    assert "layer_types" not in source.config
    write_config(source, [2, 2, 0, 1], tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {**source.config, "num_hidden_layers": 4}
    assert source.config["num_hidden_layers"] == 3


def test_lists_of_the_wrong_length(saved: dict[str, Path], tmp_path: Path) -> None:
    source = opened(saved["single"])
    for wrong in (["full_attention"], 3):
        source.config["layer_types"] = wrong
        with pytest.raises(UserError, match="layer_types: expected a list of 3 names"):
            write_config(source, [0], tmp_path)


def test_side_files(model: Make, tmp_path: Path) -> None:
    folder = model()
    wanted = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "LICENSE",
        "NOTICE.txt",
    ]
    unwanted = ["README.md", "tokenizer.bin", "vocab.safetensors", "modeling_x.py", "recipe.yaml", "trainer_state.json"]
    for name in [*wanted, *unwanted]:
        (folder / name).write_text(name)
    (folder / "tokenizer_folder").mkdir()
    # As on the hub's cache.
    (tmp_path / "blob").write_text("linked")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(tmp_path / "blob")
    out = tmp_path / "out"
    out.mkdir()
    copy_side_files(folder, out)
    assert {entry.name for entry in out.iterdir()} == {*wanted, "generation_config.json"}
    assert (out / "tokenizer.model").read_text() == "tokenizer.model"
    assert (out / "LICENSE").read_text() == "linked"
    assert not (out / "LICENSE").is_symlink()
