"""`plan` with the calibration set given to Dask workers: what goes with that, and the workers for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from intarsia.building.resident import Resident
from intarsia.checkpoint.resolve import lasting
from intarsia.errors import Problem, UserError
from intarsia.healing.cluster import check_scheduler, connect, own_workers, running
from intarsia.healing.settings import ClosedFormSettings
from intarsia.planning.ladder import METHODS, planner_of
from intarsia.planning.run_folder import RunFolder
from intarsia.planning.share import Share
from intarsia.planning.team import Team
from intarsia.stages.source import Source

_DEATHS = 3  # of workers, with the same share


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Those of a scheduler, or `count` processes of our own on this machine; of a scheduler's no more than `count`."""

    scheduler: str | None = None
    count: int | None = None


def check_workers(workers: Workers, method: str, in_loop: ClosedFormSettings | None, devices: int) -> None:
    """Refuse what is not spread over workers, all at once, and a scheduler that is not there.

    Raises:
        UserError: saying which.
    """
    able = [name for name in METHODS if planner_of(name).measures and not name.startswith("taylor")]
    known = (
        (
            workers.count is not None and workers.count < 1,
            "--workers",
            "at least one worker",
            str(workers.count),
            "Leave it out to measure in this process.",
        ),
        (
            method not in able,
            "--workers",
            f"a method whose calibration pass is spread: {', '.join(able)}",
            method,
            "Choose one of them, or leave --workers and --scheduler out.",
        ),
        (
            in_loop is not None,
            "--heal-in-loop",
            "no workers: what is fitted needs all hidden states in one place",
            "both",
            "Leave one of them out; `compress` and `heal` repair afterwards.",
        ),
        (
            devices > 1,
            "--devices",
            "one device for each worker",
            "several",
            "Name one --device; `cuda` gives each worker of this machine one of its own.",
        ),
    )
    problems = [
        Problem(where=where, expected=expected, found=found, remedy=remedy)
        for wrong, where, expected, found, remedy in known
        if wrong
    ]
    if problems:
        raise UserError(problems)
    if workers.scheduler is not None:
        check_scheduler(workers.scheduler)


@contextmanager
def team_of(
    workers: Workers | None, source: Source, folder: RunFolder, *, batch_tokens: int | None, behind_final_norm: bool
) -> Iterator[Team | None]:
    """The workers, each with its share of the calibration set; None where this process does it.

    Raises:
        UserError: dask is not installed, or the scheduler has gone.
    """
    if workers is None:
        yield None
        return
    corpus, where = source.corpus, source.placement
    whole = Share(
        model=lasting(source.model),
        revision=source.revision,
        sha256=source.sha256,
        device=str(source.device),
        dtype=source.dtype,
        stream=where.stream,
        memory_bytes=where.memory_bytes,
        folder=where.room(folder.path).folder,
        batch_tokens=batch_tokens,
        behind_final_norm=behind_final_norm,
        number=0,
        ids_NT=corpus.input_ids,
        mask_NT=corpus.mask,
    )
    count = workers.count or 1
    opened = own_workers(count, deaths=_DEATHS) if workers.scheduler is None else connect(workers.scheduler)
    with opened as cluster:
        found = sorted(running(cluster, workers.scheduler or "this machine"))
        team = Team(cluster, whole, workers=found if workers.count is None else found[:count])
        source.progress.say(f"{team.size} workers, each with a model of its own and a share of the sequences")
        try:
            yield team
        finally:
            team.close()
            source.progress.say(f"a worker needed {team.peak_memory_bytes / 1e9:.2f} GB at most")


def deciding(source: Source) -> Resident:
    """The model for a process that does not run it: layers stay in their files until their weights are looked at."""
    source.release()  # it may have written the calibration text
    return Resident(source.checkpoint, device=torch.device("cpu"), dtype=source.dtype, stream=True)
