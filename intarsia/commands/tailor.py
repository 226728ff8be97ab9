"""Tailor: search for the best small model that can be made of a family of fine-tunes.

Source: GPTailor, arXiv 2506.20480. A search keeps everything in its run folder (`intarsia.tailoring.run`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from intarsia.disk import write_whole
from intarsia.errors import Problems, UserError, at_least, check
from intarsia.flags import Flag, flag, plain, token_count
from intarsia.inspection.own_code import trusts
from intarsia.options import ModelRef, Runtime, Target, TextSpec
from intarsia.progress import current
from intarsia.registry import Chosen, Engine, engines, loaded_plugins, planners
from intarsia.run_dir import RunDir
from intarsia.tailoring.family_file import BASE, RANDOM_MIDDLE, FamilyFile, ObjectiveSpec, read_family_file
from intarsia.tailoring.run import FAMILY, TailorRun, is_tailor_run

if TYPE_CHECKING:
    from intarsia.commands.job import Job
    from intarsia.recipe.recipe import Recipe
    from intarsia.tailoring.engine import Predicted
    from intarsia.tailoring.evaluator import Evaluator
    from intarsia.tailoring.family import Family
    from intarsia.tailoring.recipes import Translator
    from intarsia.tailoring.run import Front
    from intarsia.tailoring.warm_start import WarmStart

_LEAST_TOKENS, _SEQ_LEN = 128, 512
"""The text for planners and sensitivities: fewest tokens, and tokens in a sequence."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Search: its length, and where trials run."""

    # Number of trials (default: the family file's).
    trials: int | None = flag(None, metavar="N")
    # Trials to add to a finished search; an unfinished one is finished first.
    more_trials: int | None = flag(None, metavar="N")
    # Text for planners and channel scores (default: the objectives' search examples).
    calibration: tuple[str, ...] = flag((), metavar="SPEC")
    # Most tokens of that text.
    tokens: int = flag(8192, metavar="N", parse=token_count)
    # Parallel trials, each in a separate process (default: 1, in this process).
    workers: int | None = flag(None, metavar="N")
    # Run trials on the workers of a Dask scheduler, such as tcp://host:8786.
    scheduler: str | None = flag(None, metavar="ADDRESS")
    # For a dry run: folder with config files of hub models, as DIR/ORGANISATION/NAME/config.json.
    configs: Path | None = flag(None, metavar="DIR")
    # Print the size of the search space, the budgets and the cost; read only config files.
    dry_run: bool = False

    def __post_init__(self) -> None:
        both = self.trials is not None and self.more_trials is not None
        missing = self.configs is not None and not Path(self.configs).is_dir()
        check(
            *at_least(1, trials=self.trials, more_trials=self.more_trials, workers=self.workers),
            *at_least(16, tokens=self.tokens),
            (not both, "--trials and --more-trials are both given.", "Give one of them."),
            (self.configs is None or self.dry_run, "--configs is given without --dry-run.", "Add --dry-run."),
            (not missing, f"--configs {self.configs} is not a folder.", "Check the path."),
        )


@dataclass(frozen=True, kw_only=True)
class FinalOptions:
    """Result: how to use the result of the search."""

    # Build the incumbent into RUN/best.
    build: bool = True
    # Score the incumbent on unseen examples.
    score: bool = True
    # Most unseen examples per objective.
    score_examples: int = flag(1000, metavar="N")

    def __post_init__(self) -> None:
        check(*at_least(1, score_examples=self.score_examples))


def tailor(
    source: Annotated[
        Path,
        Flag(positional=True, metavar="FAMILY.yaml|RUN", help="A family file, or the run folder of a search."),
    ],
    out: Annotated[Path | None, Flag(names=("--out", "-o"), metavar="DIR", help="Run folder of the search.")] = None,
    *,
    engine: Engine = None,
    search: SearchOptions = SearchOptions(),
    runtime: Runtime = Runtime(),
    final: FinalOptions = FinalOptions(),
) -> TailorResult:
    """Search a family of models for the best smaller one: remove, select, merge and join layers.

    If it is interrupted, the same command resumes.
    `intarsia build RUN --best NAME` (or --knee, --trial N) builds any trial.

    Raises:
        UserError: the input cannot be used, or the first trials all fail.
    """
    from intarsia.checkpoint.hashing import acting_config
    from intarsia.commands.job import Placement, versions
    from intarsia.disk import check_no_input
    from intarsia.evaluation.speed import peak_memory_bytes
    from intarsia.reporting.page import write_report
    from intarsia.tailoring.engine import Task, budget_ladder, predict
    from intarsia.tailoring.evaluator import Evaluator
    from intarsia.tailoring.family import open_family
    from intarsia.tailoring.recipes import translator_of
    from intarsia.tailoring.search import OpenScorer, Search, check_scheduler, open_workers
    from intarsia.tailoring.space import space_of

    started = time.perf_counter()
    plan = _read(Path(source), out, engine, search, runtime)
    file, runtime = plan.file, plan.runtime

    # 1. The family, and 2. the space.
    family = open_family(file.members, weights=not search.dry_run, configs=search.configs)
    for note in family.notes:
        current().say(note)
    space = space_of(file, family.architecture, family.parameters)
    budgets = budget_ladder(file.search.min_budget, file.search.max_budget, file.search.eta)
    predicted = predict(file, space, budgets, plan.trials)

    def result(**found: Any) -> TailorResult:
        seconds = time.perf_counter() - started
        return TailorResult(predicted=predicted, seconds=seconds, peak_memory_bytes=peak_memory_bytes(), **found)

    if search.dry_run:
        return result(run=None)
    Placement.of(runtime)
    if search.scheduler is not None:
        check_scheduler(search.scheduler)
    current().say(predicted.words())

    # 3. The run folder: checked before the base is loaded.
    assert plan.out is not None
    run = TailorRun(plan.out)
    check_no_input(run.path, family.folders())
    facts = run.describe(file, family, space, engine=plan.engine.name)
    facts |= {"budgets": list(budgets), "device": runtime.device, "dtype": runtime.dtype, "versions": versions()}
    facts["config"] = acting_config(family.checkpoints()[BASE].config)
    run.check(run.pins(file, facts, examples=...))

    # 4. The evaluator.
    resumed = is_tailor_run(run.path)
    evaluator = Evaluator(family, file, runtime, probe=not resumed, fits=run.fits)
    with run.opened(run.pins(file, facts, examples=evaluator.data)):
        if not resumed:
            run.start(file, facts, evaluator)
        run.want(plan.trials)

        # 5. Warm starts.
        warm = SearchStart(file, search, runtime, run)
        scores = warm.sensitivities(family) if space.shares else {}
        translator = translator_of(file, family.architecture, run.settings, scores)
        start = warm.start(translator)

        # 6. The search.
        history = run.history
        stopped = None
        if len(history.made) < plan.trials:
            task = Task(
                space=space,
                budgets=budgets,
                objectives=evaluator.objectives,
                eta=file.search.eta,
                seed=file.search.seed,
                starts=start.starts,
            )
            history.take_over(start.earlier)
            if file.heal != "none":
                run.fits.mkdir(exist_ok=True)

            opener = OpenScorer(
                file=file, runtime=runtime, fits=run.fits, plugins=loaded_plugins(), trust_remote_code=trusts()
            )
            with open_workers(opener, evaluator, scheduler=search.scheduler, count=search.workers) as workers:
                stopped = Search(
                    engine=plan.engine.create(task),
                    task=task,
                    history=history,
                    workers=workers,
                    trials=plan.trials,
                    name=plan.engine.name,
                    recipe_of=translator.recipe,
                    on_front=run.write_front,
                    on_trial=run.keep_fits,
                ).run()
        if stopped is not None:
            current().say(f"stopped after {len(history.made)} trials: {stopped}")

        # 7. The front with its recipes and the incumbent's model, and 8. its final scores.
        found = _finish(run.path, plan, family, evaluator, final)
        write_report([run.path], run.report)
    made = history.made
    return result(
        run=run.path,
        report=run.report,
        trials=len(made),
        failed=sum(trial.status == "failed" for trial in made),
        stopped=stopped,
        layer_forwards=sum(trial.layer_forwards for trial in made),
        trial_seconds=sum(trial.seconds for trial in made),
        **found,
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The checked options of a search."""

    file: FamilyFile
    engine: Chosen
    # The run folder; None for a dry run without one.
    out: Path | None
    trials: int
    # With the device and dtype of a resumed search as defaults.
    runtime: Runtime


def _read(source: Path, out: Path | None, engine: Any, search: SearchOptions, runtime: Runtime) -> _Plan:
    """Read and check the options and the family file, without opening models."""
    from intarsia.checkpoint.resolve import inputs_of
    from intarsia.disk import check_no_input

    resumes = source.is_dir()
    more = search.more_trials
    problems = Problems()
    with problems:
        check(
            (not resumes or out is None, "--out is given with the folder of a search.", "Leave it out."),
            (resumes or out is not None or search.dry_run, "There is no folder for the search.", "Give one with -o."),
            (resumes or more is None, "--more-trials is given with a family file.", "Use --trials, or give the run."),
            (not runtime.devices, "A search does not support --devices.", "Leave it out."),
            (not runtime.stream, "A search does not support --stream.", "Leave it out."),
        )
    with problems:
        engine = None if engine is None else engines.choose(engine)
    problems.raise_any()
    run = TailorRun.existing(source) if resumes else None if out is None else TailorRun(out)
    file = read_family_file(source / FAMILY if resumes else source)
    if run is not None:
        starts = [name for name in file.search.warm_start if name not in (RANDOM_MIDDLE, *planners.names)]
        inputs = inputs_of(
            models=[member.model for member in file.members.values()],
            texts=[*search.calibration, *(objective.source for objective in file.objectives)],
            files=[*([] if resumes else [source]), *starts],
        )
        check_no_input(run.path, inputs)
    known = run.wanted if run is not None and is_tailor_run(run.path) else 0
    if resumes:
        assert run is not None
        # An unfinished search continues to its earlier goal, so that a killed command can be repeated.
        wanted = known or file.search.trials
        trials = search.trials or wanted + (more or 0) * (len(run.history.made) >= wanted)
        facts = run.settings
        runtime = replace(runtime, device=runtime.device or facts["device"], dtype=runtime.dtype or facts["dtype"])
    else:
        trials = search.trials or max(file.search.trials, known)
    chosen = file.engine if engine is None else engine
    getattr(chosen.entry.object, "check", lambda: None)()
    named = file.search.model_copy(update={"engine": chosen.label})
    file = file.model_copy(update={"search": named}).absolute()
    return _Plan(file=file, engine=chosen, out=None if run is None else run.path, trials=trials, runtime=runtime)


class SearchStart:
    """The inputs of a search: sensitivities of pieces, and warm starts. Each is computed once and kept.

    Planners and sensitivities use the same text, by default the objectives' search examples.
    """

    def __init__(self, file: FamilyFile, search: SearchOptions, runtime: Runtime, run: TailorRun) -> None:
        self.file, self.search, self.runtime, self.run = file, search, runtime, run

    def sensitivities(self, family: Family) -> dict[Any, Any]:
        """The sensitivities of all members' pieces."""
        from intarsia.tailoring.recipes import SENSITIVITIES, load_scores, measure_scores, save_scores

        path = self.run.path / SENSITIVITIES
        if not path.exists():
            corpus = self.job.text.calibration
            self.job.release()
            found = measure_scores(family.checkpoints(), corpus, device=self.job.device, dtype=self.job.dtype)
            save_scores(found, path)
        return load_scores(path)

    def start(self, translator: Translator) -> WarmStart:
        """The first candidates, and trials of earlier searches."""
        from intarsia.tailoring.warm_start import WarmStart

        path = self.run.path / "warm_start.json"
        if not path.exists():
            parts = []
            for name in self.file.search.warm_start:
                found = self._one(name, translator)
                if not found.starts and not found.earlier:
                    current().say(f"warm start {name}: no candidate fits this space")
                parts.append(found)
            if "job" in self.__dict__:
                self.job.release()
            WarmStart.joined(parts).save(path)
        return WarmStart.load(path)

    def _one(self, name: str, translator: Translator) -> WarmStart:
        from intarsia.commands.planning import Planning
        from intarsia.pruning.ladder import Ladder
        from intarsia.tailoring.warm_start import WarmStart, from_recipe, from_search, random_middles

        space = translator.space
        path = Path(name)
        if name == RANDOM_MIDDLE:
            return WarmStart(starts=tuple(random_middles(space, self.file.search.seed)))
        if name not in planners and is_tailor_run(path):
            earlier = TailorRun(name)
            same = _measured(earlier) == _measured(self.run)
            return from_search(earlier.trials, earlier.front, translator, name, same=same)
        if name in planners:
            if space.kind != "prune":
                return WarmStart()
            path = self.run.path / "plans" / name
            planning = Planning(self.job, Target(layers=space.target), planners.choose(name))
            with planning.opened(RunDir(path)) as ladder:
                planning.work(ladder)
        ladder = Ladder.existing(path)
        if space.target not in ladder.depths():
            return WarmStart()
        return WarmStart(starts=tuple(from_recipe(ladder.recipe(space.target), space, name)))

    @cached_property
    def job(self) -> Job:
        """The base with its calibration text: all available tokens, in shorter sequences if they are few."""
        from intarsia.checkpoint.resolve import open_checkpoint
        from intarsia.commands.job import Job

        sources = self.search.calibration or tuple(self._shown()) or ("self",)
        base = self.file.base
        tokens = self.search.tokens
        checkpoint = open_checkpoint(ModelRef(model=base.model, revision=base.revision, dequantize=True))
        positions = checkpoint.architecture.config.get("max_position_embeddings")
        most = min(_SEQ_LEN, positions) if isinstance(positions, int) else _SEQ_LEN
        while True:
            seq_len = min(most, max(tokens // (4 * len(sources)), 16))
            text = TextSpec(sources=sources, tokens=tokens, seq_len=seq_len, seed=self.file.search.seed)
            job = Job(checkpoint, text, self.runtime)
            try:
                _ = job.text.calibration
            except UserError:
                tokens //= 2
                if tokens < _LEAST_TOKENS:
                    raise
            else:
                return job

    def _shown(self) -> Iterator[str]:
        """The objectives' search examples, as text specs; items of tasks are written to a file in the run folder."""
        from intarsia.tailoring.objective import part_of

        lines: list[str] = []
        for objective in self.file.objectives:
            texts = _items(objective)
            if texts is None and objective.kind != "task":
                yield part_of(objective)
            lines += [json.dumps({"text": text}) for text in texts or ()]
        if lines:
            path = self.run.artifact("calibration.jsonl")
            write_whole(path, "\n".join(lines) + "\n")
            yield str(path)


def _measured(run: TailorRun) -> list[object]:
    """The facts that two searches must share for comparable costs."""
    facts = run.settings
    objectives = [[entry[key] for key in ("name", "kind", "metric", "sha256")] for entry in facts["objectives"]]
    hashes = {name: member["sha256"] for name, member in facts["members"].items()}
    return [objectives, hashes, facts["config"], facts["heal"], facts["dtype"]]


def _items(objective: ObjectiveSpec) -> list[str] | None:
    """The search items of an objective as text; None if its source is not a file of items."""
    from intarsia.evaluation.task_file import Question, Target, names_a_file, read_items
    from intarsia.tailoring.objective import part_of

    if not names_a_file(objective.source):
        return None
    part = part_of(objective)
    if objective.kind == "task":
        return [f"{question.query} {question.choices[question.gold]}" for question in read_items(part, Question)[1]]
    try:
        return [f"{target.query} {target.target}" for target in read_items(part, Target)[1]]
    except UserError:
        return None  # a file of text, which is read directly


def _finish(path: Path, plan: _Plan, family: Family, evaluator: Evaluator, final: FinalOptions) -> dict[str, Any]:
    """Write the front with its recipes, build its knee into `best/`, and score it on unseen examples.

    Work that was done for the same incumbent before is not repeated.
    """
    from intarsia.commands.build import build_recipe
    from intarsia.recipe.schema import content_hash
    from intarsia.tailoring.evaluator import final_scores
    from intarsia.tailoring.recipes import keep_front, trial_recipe

    run = TailorRun(path)
    front = run.front
    if front is None:
        return {}
    keep_front(run, front, evaluator)
    shutil.rmtree(run.fits, ignore_errors=True)
    recipe = trial_recipe(run, front.knee, evaluator)
    sha256 = content_hash(recipe)
    asked = final.score_examples if final.score else None
    evaluated = run.final
    if evaluated is not None and (evaluated["recipe"], evaluated["asked"]) != (sha256, asked):
        evaluated = None
    run.write_front(front, evaluated)
    if final.build and not run.has_built(sha256):
        build_recipe(recipe, run.best, overwrite=True)
    if evaluated is None and asked is not None:
        evaluator.close()
        models: dict[str, Recipe] = {"incumbent": recipe}
        if plan.file.heals(front.knee.budget):
            models = {"incumbent as pruned": trial_recipe(run, front.knee, healed=False), **models}
        found = final_scores(plan.file, family, models, plan.runtime, examples=asked)
        if found is not None:
            evaluated = {"recipe": sha256, "trial": front.knee.number, "asked": asked, **found}
            run.write_front(front, evaluated)
    return {"front": front, "evaluated": evaluated, "best": run.best if final.build else None}


@dataclass(frozen=True, kw_only=True)
class TailorResult:
    """The result of a search."""

    # Its folder; None for a dry run.
    run: Path | None
    predicted: Predicted
    # Number of trials, and of failed ones.
    trials: int = 0
    failed: int = 0
    front: Front | None = None
    # Final scores of the incumbent and the base on unseen examples; None if they were not measured.
    evaluated: Mapping[str, Any] | None = None
    # The folder of the built incumbent.
    best: Path | None = None
    report: Path | None = None
    # Why the search stopped before its last trial, or None.
    stopped: str | None = None
    layer_forwards: float = 0.0
    trial_seconds: float = 0.0
    seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        if self.run is None:
            return {**self.predicted.to_dict(), "seconds": self.seconds}
        front = self.front
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "predicted"}
        found["front"] = [] if front is None else front.rows()
        found |= {"budget": front and front.budget, "knee": front and front.knee.number}
        return dict(plain(found))
