"""What a call of `tailor` asks for, read before anything heavy, and what it will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from intarsia.data_file import dump_yaml
from intarsia.errors import Problem, UserError
from intarsia.stages.tailor_folder import TailorFolder
from intarsia.tailoring.engines.hyperband import expected_trials
from intarsia.tailoring.family_file import Engine, FamilyFile, absolute, absolute_data, read_family_file
from intarsia.tailoring.space import Space


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to search, where, and how long. `text` is the family file's, with absolute paths."""

    file: FamilyFile
    text: str
    out: Path
    trials: int
    workers: int | None
    device: str | None
    dtype: str | None


def read_job(
    source: Path,
    out: Path | None,
    *,
    engine: str | None,
    trials: int | None,
    more_trials: int | None,
    resume: bool,
    workers: int | None,
    device: str | None,
    dtype: str | None,
    configs: Path | None,
    dry_run: bool,
) -> Job:
    """The job that arguments describe. Of a search that goes on, device, dtype and engine are as it was begun.

    Raises:
        UserError: arguments that do not fit each other, or a family file that cannot be read.
    """
    going_on = source.is_dir()
    problems = [
        Problem(where=where, expected=expected, found=found, remedy=remedy)
        for wrong, where, expected, found, remedy in (
            (going_on and out is not None, "-o", "none: the search goes on in its folder", str(out), "Leave it out."),
            (
                not going_on and out is None and not dry_run,
                "-o",
                "a folder for the search",
                "none",
                "Give one: -o RUN.",
            ),
            (
                not going_on and more_trials is not None,
                "--more-trials",
                "the folder of a search",
                f"the family file {source}",
                "Use --trials.",
            ),
            (
                trials is not None and more_trials is not None,
                "--trials, --more-trials",
                "one of them",
                "both",
                "Leave one out.",
            ),
            (
                resume and not dry_run and not going_on and out is not None and not TailorFolder(out).is_one(),
                "--resume",
                "a search to go on with",
                f"none in {out}",
                "Leave --resume out to begin one.",
            ),
            *_least("--trials", trials),
            *_least("--more-trials", more_trials),
            *_least("--workers", workers),
            (
                configs is not None and not dry_run,
                "--configs",
                "a dry run",
                "a search",
                "Add --dry-run, or leave it out.",
            ),
            (
                configs is not None and not configs.is_dir(),
                "--configs",
                "a folder of config files",
                str(configs),
                "Check the path.",
            ),
            (
                engine is not None and engine not in get_args(Engine),
                "--engine",
                f"one of {', '.join(get_args(Engine))}",
                repr(engine),
                "Choose one of them.",
            ),
        )
        if wrong
    ]
    if problems:
        raise UserError(problems)
    if not going_on:
        file = read_family_file(source)
        wanted = trials or max(file.search.trials, _wanted(out))
        path = source
    else:
        folder = TailorFolder.existing(source)
        out, path = source, folder.family
        settings = folder.settings()
        file = read_family_file(path)
        # A search whose trials are not all made yet goes on to where it was meant to, so that a call that was killed
        # may simply be made again.
        made, wanted = len(folder.history().made), folder.wanted() or file.search.trials
        wanted = trials or (wanted if made < wanted else wanted + (more_trials or 0))
        engine = engine or settings["engine"]
        device, dtype = device or settings["device"], dtype or settings["dtype"]
    if engine is not None:
        found: Engine = next(known for known in get_args(Engine) if known == engine)
        file = replace(file, search=replace(file.search, engine=found))
    file = absolute(file)
    return Job(
        file=file,
        text=path.read_text(encoding="utf-8") if going_on else _kept_text(path),
        out=out or Path(),
        trials=wanted,
        workers=workers,
        device=device,
        dtype=dtype,
    )


def _kept_text(path: Path) -> str:
    """What a run folder keeps of a family file."""
    head = f"# {path.name}, its paths made absolute.\n"
    return head + dump_yaml(absolute_data(path))


def _wanted(out: Path | None) -> int:
    """How many trials were asked for in this folder before."""
    folder = None if out is None else TailorFolder(out)
    return folder.wanted() if folder is not None and folder.is_one() else 0


def _least(name: str, value: int | None) -> list[tuple[bool, str, str, str, str]]:
    return [(value is not None and value < 1, name, "at least 1", str(value), "Give a larger number.")]


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a search is, before it starts.

    Attributes:
        kind: cut, fusion or stack; from `layers` to `target`.
        candidates: how many there are, as a power of ten.
        stages: for each budget about how many trials, and the examples of all objectives that they are scored on.
        layer_passes: examples times layers run on each, if nothing is shared between trials.
    """

    kind: str
    layers: int
    target: int
    log10_size: float
    engine: str
    trials: int
    objectives: tuple[str, ...]
    stages: tuple[dict[str, int], ...]
    layer_passes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "space": f"{self.kind}: {self.layers} to {self.target} layers, about 10^{self.log10_size:.1f} candidates",
            "log10_size": self.log10_size,
            "engine": self.engine,
            "trials": self.trials,
            "objectives": list(self.objectives),
            "budgets": [dict(stage) for stage in self.stages],
            "layer_passes": self.layer_passes,
        }

    def words(self) -> str:
        """In a line."""
        budgets = ", ".join(f"{stage['trials']} at {stage['budget']}" for stage in self.stages)
        return (
            f"{self.layers} to {self.target} layers: about 10^{self.log10_size:.1f} candidates; "
            f"{self.trials} trials by {self.engine}, about {budgets} examples"
        )


def predict(file: FamilyFile, space: Space, budgets: Sequence[int], trials: int) -> Predicted:
    """Space, budgets and cost of a search."""
    counts = expected_trials(budgets, trials, file.search.eta)
    objectives = len(file.objectives)
    return Predicted(
        kind=space.kind,
        layers=space.depth,
        target=space.target,
        log10_size=space.log10_size,
        engine=file.search.engine,
        trials=trials,
        objectives=tuple(objective.name for objective in file.objectives),
        stages=tuple(
            {"budget": budget, "trials": count, "examples": budget * count * objectives}
            for budget, count in counts.items()
        ),
        layer_passes=sum(budget * count for budget, count in counts.items()) * objectives * space.target,
    )
