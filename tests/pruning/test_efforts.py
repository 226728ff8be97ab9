"""Which method an effort means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intarsia.errors import UserError
from intarsia.pruning.efforts import METHODS, method_of
from tests.command import LITTLE, invoke
from tests.conftest import Folder


def test_an_effort_chooses_the_method_where_none_is_named() -> None:
    assert method_of(None, None) == method_of(None, "standard")
    assert method_of("sleb", None).label == "sleb"
    labels = {effort: method_of(None, effort).label for effort in METHODS}
    assert len(set(labels.values())) == 3
    page = Path("docs/METHODS.md").read_text(encoding="utf-8")
    assert all(f"| `{effort}` | `{method}` |" in page for effort, method in METHODS.items())
    with pytest.raises(UserError, match="--method and --effort are both given"):
        method_of("come", "quick")


def test_it_does_on_the_command_line(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    words = ["compress", model_folder("llama"), "-o", tmp_path / "out", "--layers", 4, "--calibration", text_file]
    words += ["--tokens", 1024, "--seq-len", 32, *LITTLE, "--json"]
    done = invoke(*words, "--effort", "quick")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["method"] == "shortgpt" and found["after"]["layers"] == 4
    assert set(found["seconds_by_part"]) == {"text", "planning", "healing", "building", "evaluation"}
    assert sum(found["seconds_by_part"].values()) <= found["seconds"]
    assert "start" in found["healed"]  # one of several
    refused = invoke(*words, "--overwrite", "--effort", "quick", "--method", "come")
    assert refused.exit_code == 2 and "--method and --effort" in refused.output
    unknown = invoke(*words, "--overwrite", "--effort", "most")
    assert unknown.exit_code == 2 and "quick, standard, thorough" in unknown.output
