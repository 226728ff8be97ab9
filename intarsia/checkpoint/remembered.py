"""Hashes that took long to compute, kept for files that have not changed since."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from secrets import token_hex


def fingerprint(files: Iterable[Path], version: int) -> str:
    """Stands for the files as they are now (path, size, time of change), without reading them."""
    facts: list[tuple[str, int, int]] = []
    for file in files:
        state = file.stat()
        # On the hub's cache the files are links to blobs that are named by content.
        facts.append((os.path.realpath(file), state.st_size, state.st_mtime_ns))
    return hashlib.sha256(json.dumps([version, sorted(facts)]).encode()).hexdigest()


def recall(kept: Path) -> str | None:
    """The hash that is kept in a file; None where there is none."""
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and len(found) == 64 else None


def remember(kept: Path, sha256: str) -> None:
    """Keep a hash in a file. A cache that cannot be written costs time, not the work."""
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{token_hex(4)}")
        fresh.write_text(json.dumps({"sha256": sha256}) + "\n", encoding="utf-8")
        os.replace(fresh, kept)
