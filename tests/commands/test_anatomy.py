"""`architecture list` and `architecture check`: right descriptions pass, wrong ones fail where they are wrong."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from intarsia.architecture.families import known_families
from intarsia.commands.anatomy import FamilyCheck, check_family
from intarsia.commands.anatomy import families as listed
from intarsia.errors import UserError
from tests import families
from tests.command import invoke

# Families that have no tiny model in `tests.families`: their class's own config.
MORE = (
    "gemma",
    "glm",
    "glm4",
    "ernie4_5",
    "helium",
    "seed_oss",
    "arcee",
    "starcoder2",
    "olmo",
    "nemotron",
    "ministral",
    "cwm",
    "exaone4",
)
FOLDER = files("intarsia.architecture") / "families"


def config_file(config: dict[str, Any], folder: Path) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def failures(result: FamilyCheck) -> list[str]:
    assert result.passed is not any(row.result == "failed" for row in result.checks)
    return [row.check for row in result.checks if row.result == "failed"]


def results(result: FamilyCheck) -> dict[str, str]:
    return {row.check: row.result for row in result.checks}


@pytest.mark.parametrize("model_type", MORE)
def test_families_as_their_classes_have_them(model_type: str, tmp_path: Path) -> None:
    result = check_family(str(config_file(AutoConfig.for_model(model_type).to_dict(), tmp_path)))
    assert failures(result) == []
    declared = model_type in ("glm4", "exaone4")
    assert bool(result.approximations) is declared
    assert set(results(result)) == {
        "tensors",
        "parity",
        "pieces",
        "ratio [1, 0]",
        "merge, attention",
        "merge, mlp",
        "build and load",
        "generation",
        "config",
    }
    if not declared:
        assert set(results(result).values()) == {"ok"}
        assert all(row.error is None or row.error < 1e-4 for row in result.checks)


@pytest.mark.parametrize("family", ["gemma3", "stablelm"])
def test_families_of_the_tests(family: str, tmp_path: Path) -> None:
    result = check_family(str(config_file(families.make_model(family).config.to_dict(), tmp_path)))
    assert failures(result) == []
    # QK-norm weights are averaged, and this shows; norm biases are folded, even where no linear layer has one.
    assert results(result)["merge, attention"] == ("approximated" if family == "gemma3" else "ok")
    assert results(result)["merge, mlp"] == "ok"
    if family == "gemma3":
        assert result.kinds_of_layers == "sliding_attention, full_attention"
        assert sum(row.check == "pieces" for row in result.checks) == 2


WRONG = {
    "offset": ("gemma", "offset = 1.0", "offset = 0.0", {"merge, attention", "merge, mlp"}),
    "segments": ("phi3", '["q", "kv", "kv"]', '["kv", "q", "kv"]', {"pieces", "merge, attention"}),
    "unsaid": ("qwen3", '    "QK-norm weights act', '    # "QK-norm weights act', {"merge, attention"}),
    "tensor": ("gemma2", 'module = "post_feedforward_layernorm"', 'module = "post_mlp_layernorm"', {"tensors"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_descriptions_fail_where_they_are_wrong(case: str, tmp_path: Path) -> None:
    name, right, wrong, expected = WRONG[case]
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert right in text
    file = tmp_path / "mine.toml"
    file.write_text(text.replace(right, wrong), encoding="utf-8")
    made = families.make_model(name) if name in families.FAMILIES else None
    config = AutoConfig.for_model(name) if made is None else made.config
    source = str(config_file(config.to_dict(), tmp_path))
    result = check_family(source, family_file=file)
    assert set(failures(result)) == expected
    assert failures(check_family(source)) == []


def test_on_the_command_line(tmp_path: Path) -> None:
    config = families.make_model("llama").config.to_dict()
    source = str(config_file(config, tmp_path))
    found = invoke("anatomy", "check", source, "--json")
    data = json.loads(found.stdout)
    assert found.exit_code == 0 and data["passed"] is True
    assert [row["check"] for row in data["checks"]][:3] == ["tensors", "parity", "pieces"]
    assert all(row["result"] == "ok" for row in data["checks"])
    wrong = tmp_path / "mine.toml"
    wrong.write_text((FOLDER / "llama.toml").read_text(encoding="utf-8").replace('["kv"]', '["q"]'), encoding="utf-8")
    found = invoke("anatomy", "check", source, "--family-file", str(wrong))
    assert found.exit_code == 1 and "failed" in found.stdout and "k_proj" in found.stdout
    source = str(config_file({**config, "model_type": "unheard-of"}, tmp_path))
    found = invoke("anatomy", "check", source)
    assert found.exit_code == 2 and "has no model type 'unheard-of'" in found.stderr
    found = invoke("anatomy", "check", source, "--family-file", str(tmp_path / "none.toml"))
    assert found.exit_code == 2 and "a family file in TOML" in found.stderr
    found = invoke("anatomy", "check", str(tmp_path / "nothing-here"))
    assert found.exit_code == 2 and "Traceback" not in found.stderr


def test_a_model_type_that_transformers_has_not(tmp_path: Path) -> None:
    source = str(config_file({**families.make_model("llama").config.to_dict(), "model_type": "unheard-of"}, tmp_path))
    file = tmp_path / "mine.toml"
    text = (FOLDER / "llama.toml").read_text(encoding="utf-8")
    file.write_text(re.sub(r"model_types = \[[^]]*\]", 'model_types = ["unheard-of"]', text), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        check_family(source, family_file=file)
    (problem,) = caught.value.problems
    assert "unheard-of" in problem.message and "transformers" in problem.message
    # Not what helps where fields of a known type do not fit together.
    assert "version of transformers" in problem.hint and "[tiny]" not in problem.hint


def test_a_list_that_the_description_does_not_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    text = (FOLDER / "gemma3.toml").read_text(encoding="utf-8")
    file.write_text(text.replace('field = "layer_types"', 'field = "types"'), encoding="utf-8")
    source = str(config_file(families.make_model("gemma3").config.to_dict(), tmp_path))
    with pytest.raises(UserError, match="layer_types"):
        check_family(source, family_file=file)


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_no_config(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"expected a config\.json"):
        check_family(str(file))


def test_the_text_part_of_a_wrapper_is_checked(tmp_path: Path) -> None:
    inner = families.make_model("llama").config.to_dict()
    wrapper = {"model_type": "llava", "text_config": inner, "vision_config": {}}
    result = check_family(str(config_file(wrapper, tmp_path)))
    assert result.model_type == "llama" and failures(result) == []


def test_every_family_is_listed(tmp_path: Path) -> None:
    data = listed().to_dict()["families"]
    assert [row["title"] for row in data] == [family.title for _, family in sorted(known_families().items())]
    rows = {row["model_types"][0]: row for row in data}
    assert rows["llama"]["exact"] is True and rows["llama"]["approximated"] == ""
    assert rows["gemma3_text"]["exact"] is False and "norms after" in rows["gemma3_text"]["approximated"]
    assert {kind for kind, row in rows.items() if row["never_merged"]} >= {"gemma2", "olmo3", "smollm3", "cohere2"}
    found = invoke("anatomy", "list")
    assert found.exit_code == 0 and "Gemma 3 (text)" in found.stdout
