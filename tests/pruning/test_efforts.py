"""Which method an effort means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intarsia.errors import UserError
from intarsia.options import TextSpec
from intarsia.pruning.efforts import EFFORTS, heal_of, method_of, text_of
from tests.command import LITTLE, invoke
from tests.conftest import Folder


def test_an_effort_chooses_what_is_not_named() -> None:
    assert method_of(None, None) == method_of(None, "standard")
    assert method_of("sleb", None).label == "sleb"
    assert len({(each.method, each.heal) for each in EFFORTS.values()}) == 3
    assert [text_of(TextSpec(), effort).tokens for effort in (None, *EFFORTS)] == [65_536, 65_536, 65_536, 262_144]
    assert text_of(TextSpec(tokens=1024), "thorough").tokens == 1024
    assert heal_of(None, None, None) == heal_of(None, None, "standard")
    assert [each.name for each in heal_of(None, None, "standard")] == ["closed-form", "end-to-end"]
    assert [each.label for each in heal_of(None, "sleb", None)] == ["closed-form"]
    assert heal_of("none", None, "thorough") == ()
    page = Path("docs/METHODS.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | `{each.method}` | `{each.heal}` |" in page for name, each in EFFORTS.items())
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
