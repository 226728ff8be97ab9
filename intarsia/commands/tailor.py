"""Tailor: search for the best small model that can be made of a family of fine-tunes.

Source: GPTailor, arXiv 2506.20480. All of a search is in its run folder (`intarsia.tailoring.run`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from intarsia.errors import Problems, UserError, check
from intarsia.flags import Flag, flag, token_count
from intarsia.options import Runtime
from intarsia.progress import current
from intarsia.registry import Chosen, Engine, engines, loaded_plugins
from intarsia.tailoring.family_file import BASE, FamilyFile, read_family_file
from intarsia.tailoring.run import FACTS, FAMILY, TailorRun, is_tailor_run

if TYPE_CHECKING:
    from intarsia.recipe.recipe import Recipe
    from intarsia.tailoring.evaluator import Evaluator
    from intarsia.tailoring.family import Family
    from intarsia.tailoring.history import Trial
    from intarsia.tailoring.pareto import Front
    from intarsia.tailoring.space import Space
    from intarsia.tailoring.workers import Workers


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Search: how long, and where trials run."""

    # Trials to make (default: what the family file says).
    trials: int | None = flag(None, metavar="N")
    # Of a finished search: this many more trials. One that is not finished continues to its end first.
    more_trials: int | None = flag(None, metavar="N")
    # Text for planners and for concatenation (default: what the objectives show the search).
    calibration: tuple[str, ...] = flag((), metavar="SPEC")
    # Tokens of that text, at most.
    tokens: int = flag(8192, metavar="N", parse=token_count)
    # Trials at once, each in a process of its own (default: 1, in this one).
    workers: int | None = flag(None, metavar="N")
    # Run trials on the workers of a Dask scheduler, such as tcp://host:8786.
    scheduler: str | None = flag(None, metavar="ADDRESS")
    # For a dry run: where config files of models on the hub are, as DIR/ORGANISATION/NAME/config.json.
    configs: Path | None = flag(None, metavar="DIR")
    # Print the size of the space, the budgets and the cost; only config files are read.
    dry_run: bool = False

    def __post_init__(self) -> None:
        numbers = {"--trials": self.trials, "--more-trials": self.more_trials, "--workers": self.workers}
        small = "Give a larger number."
        check(
            *((n is None or n >= 1, f"{name} is {n}; it is at least 1.", small) for name, n in numbers.items()),
            (self.tokens >= 16, f"--tokens is {self.tokens}; it is at least 16.", small),
            (
                self.trials is None or self.more_trials is None,
                "--trials and --more-trials are both given.",
                "Give one of them.",
            ),
            (self.configs is None or self.dry_run, "--configs is given without --dry-run.", "Add --dry-run."),
            (
                self.configs is None or Path(self.configs).is_dir(),
                f"--configs {self.configs} is no folder.",
                "Check the path.",
            ),
        )


@dataclass(frozen=True, kw_only=True)
class FinalOptions:
    """Result: what is made of what the search finds."""

    # Build the incumbent into RUN/best.
    build: bool = True
    # Score the incumbent on what the search never saw.
    judge: bool = True
    # Unseen items of each objective to score it on, at most.
    judge_examples: int = flag(1000, metavar="N")

    def __post_init__(self) -> None:
        n = self.judge_examples
        check((n >= 1, f"--judge-examples is {n}; it is at least 1.", "Give a larger number."))


def tailor(
    source: Annotated[
        Path,
        Flag(positional=True, metavar="FAMILY.yaml|RUN", help="A family file, or the folder of a search to resume."),
    ],
    out: Annotated[Path | None, Flag(names=("--out", "-o"), metavar="RUN", help="Folder of the search.")] = None,
    *,
    engine: Engine = None,
    search: SearchOptions = SearchOptions(),
    runtime: Runtime = Runtime(),
    final: FinalOptions = FinalOptions(),
) -> TailorResult:
    """Search for the best small model that can be made of a family: remove, select, merge and join layers.

    Stopped at any point, the same command continues; with one worker the log is then that of an undisturbed search.
    `intarsia build RUN --best NAME` (or --knee, --trial N) builds any trial.

    Raises:
        UserError: something about the input cannot be used, or the first trials all fail.
    """
    started = time.perf_counter()
    plan = _read(Path(source), out, engine, search, runtime)
    from intarsia.checkpoint.hashing import acting_config
    from intarsia.commands.job import Placement
    from intarsia.commands.tailor_start import SearchStart
    from intarsia.evaluation.speed import peak_memory_bytes
    from intarsia.reporting.page import write_report
    from intarsia.tailoring.engine import Task, budget_ladder
    from intarsia.tailoring.evaluator import OpenScorer, open_evaluator
    from intarsia.tailoring.family import open_family
    from intarsia.tailoring.search import Goal
    from intarsia.tailoring.search import search as run_search
    from intarsia.tailoring.space import space_of
    from intarsia.tailoring.trial_heal import KeptFits
    from intarsia.tailoring.trials import translator_of
    from intarsia.tailoring.workers import check_scheduler

    # 1. The family, and 2. the space.
    file, runtime = plan.file, plan.runtime
    family = open_family(file.members, weights=not search.dry_run, configs=search.configs)
    for note in family.notes:
        current().say(note)
    space = space_of(file, family.architecture, family.parameters)
    budgets = budget_ladder(file.search.min_budget, file.search.max_budget, file.search.eta)
    predicted = predict(file, space, budgets, plan.trials)

    def result(run: Path | None = None, **found: Any) -> TailorResult:
        seconds = time.perf_counter() - started
        return TailorResult(
            run=run, predicted=predicted, seconds=seconds, peak_memory_bytes=peak_memory_bytes(), **found
        )

    if search.dry_run:
        return result()
    Placement.of(runtime)
    if search.scheduler is not None:
        check_scheduler(search.scheduler)
    current().say(predicted.words())

    # 3. The run folder: compared with what is known already, before the models are loaded.
    assert plan.out is not None
    run = TailorRun(plan.out)
    facts = _facts(plan, family, space, budgets)
    facts["config"] = acting_config(family.checkpoints()[BASE].config)
    run.check(_pinned(file, facts, examples=...))

    # 4. The evaluator.
    resumed = is_tailor_run(run.path)
    fits = KeptFits(run.fits)
    evaluator = open_evaluator(family, file, runtime, probe=not resumed, fits=fits)
    with run.opened(_pinned(file, facts, examples=evaluator.data)):
        if not resumed:
            _start(run, plan, facts, evaluator)
        run.want(plan.trials)

        # 5. What the search starts with.
        warm = SearchStart(file, search, runtime, run)
        scores = warm.sensitivities(family) if space.shares else {}
        translator = translator_of(file, family.architecture, run.settings, scores)
        start = warm.start(translator)

        # 6. The search.
        history, stopped = run.history, None
        if len(history.made) < plan.trials:
            task = Task(
                space=space,
                budgets=budgets,
                objectives=evaluator.objectives,
                eta=file.search.eta,
                seed=file.search.seed,
                starts=start.starts,
            )
            goal = Goal(
                trials=plan.trials,
                objectives=evaluator.objectives,
                max_budget=budgets[-1],
                seed=file.search.seed,
                engine=plan.engine.name,
            )
            if file.heal != "none":
                fits.start()
            opener = OpenScorer(file=file, runtime=runtime, fits=run.fits, plugins=loaded_plugins())
            with _workers(search, opener, evaluator, file) as workers:
                stopped = run_search(
                    plan.engine.create(task),
                    history,
                    workers,
                    goal,
                    recipe_of=translator.recipe,
                    earlier=start.earlier,
                    on_front=run.write_front,
                    on_trial=lambda wanted: fits.drop({trial.recipe for trial in history.trials} - wanted),
                )
        if stopped is not None:
            current().say(f"stopped after {len(history.made)} trials: {stopped}")

        # 7. The front with its recipes and the incumbent's model, and 8. its final scores.
        found = _finish(run.path, plan, family, evaluator, final)
        write_report([run.path], run.report)
    made = history.made
    return result(
        run.path,
        report=run.report,
        trials=len(made),
        failed=sum(trial.status == "failed" for trial in made),
        stopped=stopped,
        layer_forwards=sum(trial.layer_forwards for trial in made),
        trial_seconds=sum(trial.seconds for trial in made),
        **found,
    )


# Reading what is asked for


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What to search, where, and how long."""

    file: FamilyFile
    engine: Chosen
    # The run folder; None for a dry run without one.
    out: Path | None
    trials: int
    search: SearchOptions
    # A resumed search's device and dtype, where none are given.
    runtime: Runtime


def _read(source: Path, out: Path | None, engine: Any, search: SearchOptions, runtime: Runtime) -> _Plan:
    resumes = source.is_dir()
    problems = Problems()
    with problems:
        check(
            (not resumes or out is None, "--out is given with the folder of a search.", "Leave it out."),
            (resumes or out is not None or search.dry_run, "There is no folder for the search.", "Give one with -o."),
            (
                resumes or search.more_trials is None,
                "--more-trials is given with a family file.",
                "Use --trials, or give the folder of a search.",
            ),
            *(
                (not getattr(runtime, name.replace("-", "_")), f"--{name} is not for a search.", "Leave it out.")
                for name in ("devices", "stream")
            ),
        )
    with problems:
        engine = None if engine is None else engines.choose(engine)
    problems.raise_any()
    run = TailorRun.existing(source) if resumes else None if out is None else TailorRun(out)
    file = read_family_file(source / FAMILY if resumes else source)
    known = run.wanted if run is not None and is_tailor_run(run.path) else 0
    if resumes:
        assert run is not None
        # One whose trials are not all made yet continues to where it was meant to, so that a call that was killed may
        # simply be made again.
        wanted = known or file.search.trials
        more = search.more_trials if len(run.history.made) >= wanted else None
        trials = search.trials or wanted + (more or 0)
        facts = run.settings
        runtime = replace(runtime, device=runtime.device or facts["device"], dtype=runtime.dtype or facts["dtype"])
    else:
        trials = search.trials or max(file.search.trials, known)
    chosen = file.engine if engine is None else engine
    getattr(chosen.entry.object, "check", lambda: None)()
    named = file.search.model_copy(update={"engine": chosen.label})
    return _Plan(
        file=file.model_copy(update={"search": named}).absolute(),
        engine=chosen,
        out=None if run is None else run.path,
        trials=trials,
        search=search,
        runtime=runtime,
    )


# The run folder


def _facts(plan: _Plan, family: Family, space: Space, budgets: Sequence[int]) -> dict[str, Any]:
    """What is recorded of a search."""
    from intarsia.commands.job import versions

    return {
        "kind": "tailor",
        "members": {
            variant.name: {"model": variant.model, "revision": variant.revision, "sha256": variant.sha256}
            for variant in family.variants()
        },
        "space": {
            "kind": space.kind,
            "depth": space.depth,
            "target": space.target,
            "log10_size": round(space.log10_size, 3),
        },
        "budgets": list(budgets),
        "engine": plan.engine.name,
        "seed": plan.file.search.seed,
        "heal": plan.file.heal,
        "device": plan.runtime.device,
        "dtype": plan.runtime.dtype,
        "versions": versions(),
    }


def _pinned(file: FamilyFile, facts: Mapping[str, Any], *, examples: Any) -> dict[str, Any]:
    """What must be the same when a search is resumed; how many trials it makes may differ."""
    family = file.model_dump(exclude={"search": {"trials"}})
    family["objectives"] = {entry["name"]: entry for entry in family["objectives"]}
    return {
        "family": family,
        "weights": {name: member["sha256"] for name, member in facts["members"].items()},
        "config": facts["config"],
        "examples": examples,
    }


def _start(run: TailorRun, plan: _Plan, facts: dict[str, Any], evaluator: Evaluator) -> None:
    """Record what is known of a new search."""
    from intarsia.disk import write_whole

    base, data = evaluator.base, evaluator.data
    facts["base"] = dict(zip(evaluator.objectives, base.costs, strict=True)) if base else None
    facts["objectives"] = [
        {
            "name": objective.name,
            "kind": objective.kind,
            "source": objective.source,
            "metric": objective.metric if objective.kind == "task" else None,
            "split": list(objective.split),
            "sha256": data.get(objective.name),
        }
        for objective in plan.file.objectives
    ]
    write_whole(run.artifact(FAMILY), "# The family file, its paths made absolute.\n" + plan.file.to_yaml())
    run.write_json(FACTS, facts)


# The search and its end


@contextmanager
def _workers(search: SearchOptions, opener: Any, evaluator: Evaluator, file: FamilyFile) -> Iterator[Workers]:
    """One worker is this process, which has its evaluator already."""
    from intarsia.tailoring.evaluator import TrialScorer
    from intarsia.tailoring.workers import InProcess, dask_workers

    if search.scheduler is None and (search.workers or 1) == 1:
        yield InProcess(TrialScorer(evaluator, file))
        return
    evaluator.close()  # the workers have their own
    with dask_workers(opener, scheduler=search.scheduler, count=search.workers) as workers:
        yield workers


def _finish(path: Path, plan: _Plan, family: Family, evaluator: Evaluator, final: FinalOptions) -> dict[str, Any]:
    """Write the front with its recipes, build its knee into `best/`, score it on unseen items.

    What was done for the same incumbent before is not done again.

    Raises:
        UserError: a folder `best` that is not of the search stands in the way, or a disk is full.
    """
    from intarsia.commands.recipes import build_recipe
    from intarsia.recipe.schema import content_hash
    from intarsia.tailoring.final import final_scores
    from intarsia.tailoring.trial_heal import KeptFits
    from intarsia.tailoring.trials import keep_front, trial_recipe

    run = TailorRun(path)
    front = run.front
    if front is None:
        return {}
    keep_front(run, front, evaluator)
    KeptFits(run.fits).end()
    recipe = trial_recipe(run, front.knee, evaluator)
    sha256 = content_hash(recipe)
    asked = final.judge_examples if final.judge else None
    judged = run.final
    if judged is not None and (judged["recipe"], judged["asked"]) != (sha256, asked):
        judged = None
    run.write_front(front, judged)
    if final.build and not _is_built(run.best, sha256):
        build_recipe(recipe, run.best, overwrite=True, progress=current())
    if judged is None and asked is not None:
        evaluator.close()
        models: dict[str, Recipe] = {"incumbent": recipe}
        if plan.file.heals(front.knee.budget):
            models = {"incumbent as cut": trial_recipe(run, front.knee, healed=False), **models}
        found = final_scores(plan.file, family, models, plan.runtime, examples=asked)
        if found is not None:
            judged = {"recipe": sha256, "trial": front.knee.number, "asked": asked, **found}
            run.write_front(front, judged)
    return {"front": front, "judged": judged, "best": run.best if final.build else None}


def _is_built(folder: Path, sha256: str) -> bool:
    """Whether a folder holds the model of a recipe."""
    from intarsia.building.materialize import RECIPE_FILE
    from intarsia.recipe import schema

    kept = folder / RECIPE_FILE
    if not kept.is_file():
        return False
    try:
        return schema.content_hash(schema.load(kept)) == sha256
    except UserError:
        return False


# The result


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a search is, before it starts."""

    # cut, fusion or stack; from `layers` to `target`.
    kind: str
    layers: int
    target: int
    # How many candidates there are, as a power of ten.
    log10_size: float
    engine: str
    trials: int
    objectives: tuple[str, ...]
    # For each budget about how many trials, and the examples of all objectives that they are scored on.
    stages: tuple[dict[str, int], ...]
    # Examples times layers run on each, if nothing is shared between trials.
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
    from intarsia.tailoring.engine import expected_trials

    counts = expected_trials(budgets, trials, file.search.eta)
    objectives = len(file.objectives)
    return Predicted(
        kind=space.kind,
        layers=space.depth,
        target=space.target,
        log10_size=space.log10_size,
        engine=file.engine.name,
        trials=trials,
        objectives=tuple(objective.name for objective in file.objectives),
        stages=tuple(
            {"budget": budget, "trials": count, "examples": budget * count * objectives}
            for budget, count in counts.items()
        ),
        layer_passes=sum(budget * count for budget, count in counts.items()) * objectives * space.target,
    )


@dataclass(frozen=True, kw_only=True)
class TailorResult:
    """What a search has found."""

    # Its folder; None for a dry run.
    run: Path | None
    predicted: Predicted
    # Trials that were made, and those of them that failed.
    trials: int = 0
    failed: int = 0
    front: Front | None = None
    # The incumbent and the base on what the search never saw; None where they were not scored.
    judged: Mapping[str, Any] | None = None
    # The folder of the built incumbent.
    best: Path | None = None
    report: Path | None = None
    # Why the search ended before it had made as many trials as were asked for, or None.
    stopped: str | None = None
    layer_forwards: float = 0.0
    trial_seconds: float = 0.0
    seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        if self.run is None:
            return {**self.predicted.to_dict(), "seconds": self.seconds}
        front = self.front
        return {
            "run": str(self.run),
            "front": [] if front is None else [_row(front, trial) for trial in front.points],
            "budget": None if front is None else front.budget,
            "knee": None if front is None else front.knee.number,
            "judged": self.judged,
            "trials": self.trials,
            "failed": self.failed,
            "stopped": self.stopped,
            "best": None if self.best is None else str(self.best),
            "report": None if self.report is None else str(self.report),
            "layer_forwards": self.layer_forwards,
            "trial_seconds": self.trial_seconds,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def _row(front: Front, trial: Trial) -> dict[str, Any]:
    marks = [name for name in front.objectives if front.best(name) is trial] + ["knee"] * (front.knee is trial)
    costs = dict(zip(front.objectives, trial.costs or (), strict=True))
    return {"trial": trial.number, **costs, "best": ", ".join(marks), "engine": trial.engine, "origin": trial.origin}
