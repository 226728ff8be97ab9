"""The calibration text of a run: what is recorded of it, and whether another name means the very same text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from intarsia.data.corpus import Corpus
from intarsia.disk import damage_named
from intarsia.pruning.run_folder import RunFolder
from intarsia.stages.source import Source

_PINNED = "calibration"


def facts_of(corpus: Corpus) -> dict[str, Any]:
    """What is recorded of a calibration text; `sha256` is that of its tokens."""
    return {"text": corpus.description, "sha256": corpus.sha256, "tokens": corpus.tokens}


def pin_text(run: RunFolder, corpus: Corpus) -> None:
    """Record the text that a run works on; a continued run must find the same tokens, from wherever.

    Raises:
        UserError: the text is not the one of the run.
    """
    if _pinned_sha256(run.path) != corpus.sha256:
        run.pin(_PINNED, facts_of(corpus))


def calibration_of(run: Path, source: Source) -> str:
    """The calibration text of a plan as its settings name it: as the run was begun, where it is the same text.

    Raises:
        UserError: the text cannot be used, or the run folder is damaged.
    """
    found = _pinned_sha256(run)
    begun_with = None if found is None else RunFolder.existing(run).settings().get("calibration")
    return calibration_as_begun(source, begun_with, found)


def calibration_as_begun(source: Source, begun_with: str | None, sha256: str | None) -> str:
    """How settings name the calibration text: as when the work was begun, where its tokens are the same.

    Args:
        begun_with, sha256: what is recorded of the text, if anything is.

    Raises:
        UserError: the text cannot be used.
    """
    given = source.calibration if isinstance(source.calibration, str) else ",".join(source.calibration)
    if begun_with is None or sha256 is None or begun_with == given:
        return given
    # A text that the model writes is known by nothing else, and to write one in order to refuse it takes minutes.
    if any("self" in spec.split(",") for spec in (begun_with, given)):
        return given
    return begun_with if source.corpus.sha256 == sha256 else given


def _pinned_sha256(run: Path) -> str | None:
    path = run / f"{_PINNED}.json"
    if not path.exists():
        return None
    remedy = "The run folder is damaged; delete it and plan again."
    with damage_named(path, expected="what was recorded of the calibration text", remedy=remedy):
        return str(json.loads(path.read_text(encoding="utf-8"))["sha256"])
