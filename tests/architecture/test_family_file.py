"""Families as files, the package's and a user's."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from intarsia.architecture.detect import detect
from intarsia.architecture.families import known_families, with_family_file
from intarsia.errors import UserError

LLAMA = (files("intarsia.architecture") / "families" / "llama.toml").read_text(encoding="utf-8")


def written(text: str, folder: Path) -> Path:
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_every_packaged_file_is_a_good_one(tmp_path: Path) -> None:
    folder = files("intarsia.architecture") / "families"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    assert [f"{name}.toml" for name in known_families()] == names
    for name in names:
        with with_family_file(written((folder / name).read_text(encoding="utf-8"), tmp_path)):
            assert "mine" in known_families()


def test_a_file_is_known_while_it_is_tried(tmp_path: Path) -> None:
    file = written(LLAMA.replace('["llama"]', '["llama", "newcomer"]').replace("Llama 3", "Newcomer"), tmp_path)
    config = {
        "model_type": "newcomer",
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "vocab_size": 50,
        "intermediate_size": 20,
    }
    with with_family_file(file):
        assert detect(config).family.name == "mine"
        assert detect({**config, "model_type": "llama"}).family.name == "mine"  # it stands before the package's
        assert "Newcomer" in known_families()["mine"].title
    with pytest.raises(UserError, match="'newcomer'"):
        detect(config)
    with with_family_file(None):
        assert "mine" not in known_families()


def test_everything_wrong_with_a_file_at_once(tmp_path: Path) -> None:
    text = (
        LLAMA.replace('title = "', 'name = "')
        .replace('head = "lm_head"', "head = 3")
        .replace('width = "hidden_size"\n', "")
        .replace('place = "before"', 'place = "above"', 1)
        .replace('segments = ["kv"]', 'segments = "kv"', 1)
    )
    with pytest.raises(UserError) as caught, with_family_file(written(text, tmp_path)):
        raise AssertionError("a bad file was taken")
    where = {problem.message.split(": ")[1] for problem in caught.value.problems}
    assert where == {"title", "name", "modules.head", "fields.width", "norm[0].place", "linear[1].segments"}
    assert "See docs/ADD_A_FAMILY.md." in {problem.hint for problem in caught.value.problems}


def test_each_part_has_one_linear_layer_that_writes(tmp_path: Path) -> None:
    text = LLAMA.replace('side = "writes"', 'side = "reads"', 1)
    with (
        pytest.raises(UserError, match="linear: expected one that writes for the part 'attention'; found none"),
        with_family_file(written(text, tmp_path)),
    ):
        raise AssertionError("a bad file was taken")


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ("[[per_layer]]\nfield = 'a'\nevry = 2", "per_layer[0].evry"),
        ("[[per_layer]]\nevery = 2", "per_layer[0].field"),
        ("[[approximation]]\ntext = 'x'", "approximation[0].when"),
        ("[[refuse]]\nfeature = 'x'", "refuse[0].remedy"),
        ("[[stacked]]\nparameter = 'x'", "stacked[0].tensors"),
        ("[constants]\nkv_heads = '2'", "constants.kv_heads"),
        ("[aliases]\nx = 3", "aliases.x"),
        ("[[norm]]\nmodule = 'x'\npart = 'mlp'\nplace = 'inside'\nrows = 'channel'", "norm[2].rows"),
        ("[[norm]]\nmodule = 'x'\npart = 'mlp'\nplace = 'before'\noffset = '1'", "norm[2].offset"),
        ("[[linear]]\nmodule = 'x'\npart = 'mlp'\nside = 'reads'\nsegments = ['rows']", "linear[7].segments[0]"),
        ("[[linear]]\nmodule = 'x'\npart = 'mlp'\nside = 'reads'\nsegments = []\nwhole = 0", "linear[7].whole"),
    ],
)
def test_a_key_that_is_wrong_is_named(more: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, with_family_file(written(f"{LLAMA}\n{more}\n", tmp_path)):
        raise AssertionError("a bad file was taken")
    assert [problem.message.split(": ")[1] for problem in caught.value.problems] == [place]


@pytest.mark.parametrize("text", ["title = ", None, "\x00"])
def test_no_family_file(text: str | None, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml" if text is None else written(text, tmp_path)
    with pytest.raises(UserError, match=r"mine\.toml: expected a family file in TOML"), with_family_file(file):
        raise AssertionError("it was taken")


def test_an_approximation_may_depend_on_the_config(tmp_path: Path) -> None:
    text = LLAMA + '\n[[approximation]]\nwhen = { attention_bias = true }\ntext = "something"\n'
    config = {
        "model_type": "llama",
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "vocab_size": 50,
        "intermediate_size": 20,
    }
    with with_family_file(written(text, tmp_path)):
        assert detect(config).approximations == ()
        assert detect({**config, "attention_bias": True}).approximations == ("something",)
        assert known_families()["mine"].approximations == ("something (where attention_bias is true)",)
