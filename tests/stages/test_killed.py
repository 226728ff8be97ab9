"""A plan that is killed, and started again with the same call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import intarsia
from intarsia.planning.run_folder import RunFolder
from tests.conftest import Folder

ROOT = Path(__file__).resolve().parents[2]

# Kills itself in the middle of writing the second line of the log: the recipe is there, half of its line too.
KILLED = """
import os, signal, sys
import intarsia
from intarsia.planning import run_folder

fsync, lines = os.fsync, []

def stops(descriptor):
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if name.endswith("log.jsonl"):
        lines.append(name)
        if len(lines) == 2:
            os.truncate(name, os.path.getsize(name) - 100)
            os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = stops
model, run, text = sys.argv[1:]
intarsia.plan(model, run, layers=3, calibration=text, tokens=256, seq_len=32)
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks up file names in /proc")
def test_killed_and_started_again(
    model_folder: Folder, sizes: dict[str, Any], text_file: Path, cache_here: Path, tmp_path: Path
) -> None:
    model = str(model_folder("llama"))
    environment = {**os.environ, "INTARSIA_CACHE": str(cache_here), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, model, str(tmp_path / "killed"), str(text_file)],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert RunFolder.existing(tmp_path / "killed").depths() == [5]
    assert (tmp_path / "killed" / "log.jsonl").read_bytes()[-1:] != b"\n"

    continued = intarsia.plan(model, tmp_path / "killed", layers=3, **sizes)
    undisturbed = intarsia.plan(model, tmp_path / "undisturbed", layers=3, **sizes)
    assert continued.depths == undisturbed.depths == (5, 4, 3)
    assert continued.losses == undisturbed.losses
    one, other = tmp_path / "killed", tmp_path / "undisturbed"
    files = sorted(path.name for path in (one / "ladder").iterdir())
    assert files == sorted(path.name for path in (other / "ladder").iterdir())
    for file in files:
        assert (one / "ladder" / file).read_bytes() == (other / "ladder" / file).read_bytes()
    drop = ("seconds", "layer_forwards")
    logs = [
        [{key: value for key, value in entry.items() if key not in drop} for entry in RunFolder(folder).log()]
        for folder in (one, other)
    ]
    assert logs[0] == logs[1]
