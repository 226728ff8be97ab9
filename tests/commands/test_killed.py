"""A plan that is killed, and started again with the same call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from intarsia.pruning.ladder import Ladder
from tests import verbs
from tests.conftest import Folder
from tests.killing import kill_within, needs_proc

PLAN = """
import intarsia
from intarsia.options import Target, TextSpec
model, run, text = sys.argv[1:]
intarsia.plan(model, run, Target(layers=3), text=TextSpec(sources=(text,), tokens=256, seq_len=32))
"""


@needs_proc
def test_killed_and_started_again(
    model_folder: Folder, sizes: dict[str, Any], text_file: Path, cache_here: Path, tmp_path: Path
) -> None:
    model = str(model_folder("llama"))
    # The recipe is there, and half of the second line.
    kill_within("log.jsonl", 2, 100, PLAN, model, tmp_path / "killed", text_file, cache=cache_here)
    assert Ladder.existing(tmp_path / "killed").depths() == [5]
    assert (tmp_path / "killed" / "log.jsonl").read_bytes()[-1:] != b"\n"

    continued = verbs.plan(model, tmp_path / "killed", layers=3, method=None, **sizes)
    undisturbed = verbs.plan(model, tmp_path / "undisturbed", layers=3, method=None, **sizes)
    assert continued.depths == undisturbed.depths == (5, 4, 3)
    assert continued.losses == undisturbed.losses
    one, other = tmp_path / "killed", tmp_path / "undisturbed"
    files = sorted(path.name for path in (one / "ladder").iterdir())
    assert files == sorted(path.name for path in (other / "ladder").iterdir())
    for file in files:
        assert (one / "ladder" / file).read_bytes() == (other / "ladder" / file).read_bytes()
    drop = ("seconds", "layer_forwards")
    logs = [
        [{key: value for key, value in entry.items() if key not in drop} for entry in Ladder(folder).log()]
        for folder in (one, other)
    ]
    assert logs[0] == logs[1]
