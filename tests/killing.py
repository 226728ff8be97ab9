"""A process that kills itself in the middle of writing a line of a log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks up file names in /proc")

_KILLS = """
import os, signal, sys

fsync, lines = os.fsync, []
log, count, cut = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def stops(descriptor):
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if name.endswith(log):
        lines.append(name)
        if len(lines) == count:
            os.truncate(name, os.path.getsize(name) - cut)
            os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = stops
del sys.argv[1:4]
"""


def kill_within(log: str, line: int, cut: int, code: str, *arguments: str | Path, cache: Path | None = None) -> None:
    """Run Python code until it writes that line (from 1) of a file so called, whose last `cut` bytes are then missing.

    Args:
        code: finds its arguments in `sys.argv[1:]`.
        cache: the folder of everything that is kept between runs.
    """
    done = subprocess.run(
        [sys.executable, "-c", _KILLS + code, log, str(line), str(cut), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **({} if cache is None else {"INTARSIA_CACHE": str(cache)})},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
