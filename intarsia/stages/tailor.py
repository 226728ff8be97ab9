"""Tailor: search for the best small model that can be made of a family of fine-tunes.

Source: GPTailor, arXiv 2506.20480. All of a search is in its folder (`intarsia.stages.tailor_folder`), which is also
what a report reads: `tailor.json`, `trials.jsonl` and `front.json`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.checkpoint.hashing import acting_config
from intarsia.evaluation.speed import peak_memory_bytes
from intarsia.progress import Progress, Silent
from intarsia.reporting.page import write_report
from intarsia.stages.setup import device_of, dtype_of
from intarsia.stages.tailor_begin import TOKENS, Beginning
from intarsia.stages.tailor_finish import finish
from intarsia.stages.tailor_folder import TailorFolder
from intarsia.stages.tailor_input import Job, predict, read_job
from intarsia.stages.tailor_judge import EXAMPLES
from intarsia.stages.tailor_recipe import translator_of
from intarsia.stages.tailor_result import TailorResult
from intarsia.stages.tailor_scorer import Opener, TrialScorer, evaluator_of
from intarsia.stages.tailor_settings import settings_of
from intarsia.tailoring.engines.hyperband import budget_ladder
from intarsia.tailoring.family import open_family
from intarsia.tailoring.family_file import BASE
from intarsia.tailoring.make_engine import check_engine, make_engine
from intarsia.tailoring.search import Goal, search
from intarsia.tailoring.space import space_of
from intarsia.tailoring.trial_heal import KeptFits
from intarsia.tailoring.workers import InProcess, Workers, check_scheduler, dask_workers

if TYPE_CHECKING:
    from intarsia.tailoring.evaluator import Evaluator


def tailor(
    source: str | Path,
    out: str | Path | None = None,
    *,
    engine: str | None = None,
    trials: int | None = None,
    more_trials: int | None = None,
    resume: bool = False,
    scheduler: str | None = None,
    workers: int | None = None,
    calibration: str | Sequence[str] = (),
    tokens: int = TOKENS,
    judge: bool = True,
    judge_examples: int = EXAMPLES,
    build: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    memory_bytes: int | None = None,
    configs: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> TailorResult:
    """Search, build what is found and judge it.

    A search that was stopped continues with the same call; one that is finished is only read. With one worker the log
    is then that of an undisturbed search.

    Args:
        source: a family file, or the folder of a search to go on with.
        out: the folder of the search; not with a folder as source.
        engine: `smac`, `evolve` or `random`; what the family file says by default.
        trials: how many; what the family file says by default.
        more_trials: so many more than were asked for before, once those are made.
        resume: refuse to begin a new search.
        scheduler: the address of a Dask scheduler.
        workers: how many trials at once; with several, each is a process of its own.
        calibration: text for planners and sensitivities (see `TextSpec`); what the objectives show by default.
        tokens: of that text, at most.
        judge: judge the incumbent on up to `judge_examples` unseen items of each objective; for that it is built too.
        build: build the incumbent into the folder's `best/`.
        memory_bytes: what all caches of trials may take together.
        configs: for a dry run, a folder with config files of models on the hub, `ORGANISATION/NAME/config.json`.
        dry_run: tell the size of the space, the budgets and the cost; only config files are read.

    Raises:
        UserError: something about the input cannot be used, or the first trials all fail.
    """
    begun = time.perf_counter()
    progress = progress or Silent()
    configs = None if configs is None else Path(configs)
    job = read_job(
        Path(source),
        None if out is None else Path(out),
        engine=engine,
        trials=trials,
        more_trials=more_trials,
        resume=resume,
        workers=workers,
        device=device,
        dtype=dtype,
        configs=configs,
        dry_run=dry_run,
    )
    file = job.file
    family = open_family(file.base, file.variants, weights=not dry_run, configs=configs, progress=progress)
    for note in family.notes:
        progress.say(note)
    space = space_of(file, family.architecture)
    budgets = budget_ladder(file.search.min_budget, file.search.max_budget, file.search.eta)
    predicted = predict(file, space, budgets, job.trials)

    def result(run: Path | None = None, **found: Any) -> TailorResult:
        return TailorResult(
            run=run,
            predicted=predicted,
            seconds=time.perf_counter() - begun,
            peak_memory_bytes=peak_memory_bytes(),
            **found,
        )

    if dry_run:
        return result()
    check_engine(file.search.engine)
    device_of(job.device), dtype_of(job.dtype)
    if scheduler is not None:
        check_scheduler(scheduler)
    variants = family.variants(progress)
    folder = TailorFolder(job.out)
    config = acting_config(family.checkpoints()[BASE].config)
    folder = TailorFolder.offer(job.out, settings_of(job, variants, config, space, budgets))
    progress.say(predicted.words())
    evaluator = evaluator_of(
        family,
        file,
        device=job.device,
        dtype=job.dtype,
        memory_bytes=memory_bytes,
        probe=not folder.is_one(),  # a search that goes on has kept what the base costs
        fits=folder.fits,
        progress=progress,
    )
    settings = settings_of(job, variants, config, space, budgets, evaluator)
    folder = TailorFolder.offer(job.out, settings)
    folder.start(settings, job.text)
    folder.want(job.trials)
    beginning = Beginning(
        file,
        folder,
        calibration=[calibration] if isinstance(calibration, str) else calibration,
        tokens=tokens,
        device=job.device,
        dtype=job.dtype,
        progress=progress,
    )
    scores = beginning.measured(family.checkpoints()) if space.shares else {}
    translator = translator_of(file, family.architecture, settings["members"], scores)
    warm = beginning.warm_start(translator)
    goal = Goal(trials=job.trials, objectives=evaluator.objectives, max_budget=budgets[-1], seed=file.search.seed)
    history = folder.history()
    stopped = None
    if len(history.made) < goal.trials:
        asked = make_engine(file.search, space, budgets, evaluator.objectives, warm.starts)
        fits = KeptFits(folder.fits)
        if file.heal != "none":
            fits.begin()
        opener = Opener(file=file, device=job.device, dtype=job.dtype, memory_bytes=memory_bytes, fits=folder.fits)
        with _workers(job, opener, evaluator, scheduler) as hands:
            stopped = search(
                asked,
                history,
                hands,
                goal,
                recipe_of=translator.recipe,
                earlier=warm.earlier,
                progress=progress,
                on_front=folder.write_front,
                on_trial=lambda wanted: fits.drop({trial.recipe for trial in history.trials} - wanted),
            )
    if stopped is not None:
        progress.say(f"stopped after {len(history.made)} trials: {stopped}")
    finished = finish(
        folder,
        file,
        family,
        evaluator,
        build=build,
        judge_examples=judge_examples if judge else None,
        device=job.device,
        dtype=job.dtype,
        memory_bytes=memory_bytes,
        progress=progress,
    )
    write_report([folder.path], folder.report)
    made = history.made
    return result(
        folder.path,
        report=folder.report,
        trials=len(made),
        failed=sum(trial.status == "failed" for trial in made),
        front=finished.front,
        judged=finished.judged,
        best=finished.best,
        stopped=stopped,
        layer_forwards=sum(trial.layer_forwards for trial in made),
        trial_seconds=sum(trial.seconds for trial in made),
    )


@contextmanager
def _workers(job: Job, opener: Opener, evaluator: Evaluator, scheduler: str | None) -> Iterator[Workers]:
    """One worker is this process, which has its evaluator already."""
    if scheduler is None and (job.workers or 1) == 1:
        yield InProcess(TrialScorer(evaluator, job.file))
        return
    evaluator.close()  # the workers have their own
    with dask_workers(opener, scheduler=scheduler, count=job.workers) as hands:
        yield hands
