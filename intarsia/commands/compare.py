"""`intarsia compare`: several methods on one model, at every depth, pruned and healed, in one table.

One pass over the whole model serves all methods: it is kept, so a method that changes the model leaves the next one the
original's hidden states and measures. A recipe's model is measured in memory; it shares every layer that it does not
change with the original, and gives the numbers of the folder that `intarsia build` would write.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from intarsia import progress
from intarsia.commands.result import Result
from intarsia.errors import Problems, UserError, check
from intarsia.flags import Flag, flag, plain
from intarsia.options import AnswerSpec, ModelRef, Runtime, Target, TextSpec
from intarsia.registry import Chosen, heal_stages, planners, words_of
from intarsia.run_dir import Log, RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from intarsia.checkpoint.reader import Checkpoint
    from intarsia.commands.job import Job
    from intarsia.commands.plan import PlanResult
    from intarsia.commands.planning import Planning
    from intarsia.data.corpus import Corpus
    from intarsia.evaluation.agreement import Asked, Reference
    from intarsia.evaluation.results import TaskResults
    from intarsia.evaluation.tasks import Task, TaskPlan
    from intarsia.healing.teacher import TeacherStates
    from intarsia.pruning.intermediate import Intermediate
    from intarsia.pruning.ladder import Ladder
    from intarsia.pruning.step import Planner
    from intarsia.recipe.recipe import Recipe
    from intarsia.reporting.comparison import Key, Row

PLANS = "plans"


@dataclass(frozen=True, kw_only=True)
class Entrants:
    """Comparison: the methods, depths and heal stages, and models that exist already."""

    # Methods of `intarsia plan`, with their options in brackets: come,come-p[spans=1],come[norm=average].
    methods: tuple[str, ...] = flag((), metavar="NAMES", commas=False)
    # Depths: 27,25,23.
    layers: tuple[int, ...] = flag((), metavar="N,N")
    # How to heal each model: none, closed-form, or several stages in a row, as closed-form+layerwise. Every
    # comma-separated entry is a row of the table.
    heal: tuple[str, ...] = flag(("none",), metavar="NAMES", commas=False)
    # Models with the same tokenizer that exist already, as MODEL or NAME=MODEL: a row each, beside the methods' rows.
    models: tuple[str, ...] = flag((), metavar="MODELS")

    def __post_init__(self) -> None:
        for name in ("methods", "heal"):
            given = getattr(self, name)
            given = [given] if isinstance(given, str) else given
            object.__setattr__(self, name, tuple(word for text in given for word in words_of(text)))
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers), reverse=True)))
        object.__setattr__(self, "models", (self.models,) if isinstance(self.models, str) else tuple(self.models))
        known, planned = ", ".join(planners.names), bool(self.methods)
        check(
            (planned or bool(self.models), "--methods names no method.", f"Name some of {known}; or give --models."),
            (planned or not self.layers, "--layers is given without --methods.", "Give both, or leave it out."),
            (bool(self.layers) or not planned, "--layers names no depth.", "Write them like 27,25,23."),
            (bool(self.heal), "--heal names nothing.", "Write none, or none,closed-form."),
        )

    def heals(self) -> dict[str, tuple[Chosen, ...]]:
        """The heal stages of every kind of row, by its name; rows that are not healed first.

        Raises:
            UserError: there is no such stage.
        """
        problems, found = Problems(), dict[str, tuple[Chosen, ...]]()
        for kind in sorted(self.heal, key=lambda kind: kind != "none"):
            with problems:
                found[kind] = () if kind == "none" else heal_stages.choose_all(kind.split("+"))
        problems.raise_any()
        return found


@dataclass(frozen=True, kw_only=True)
class CompareEval(AnswerSpec):
    """Evaluation: what is measured of each model."""

    # Text for perplexity, as FILE or NAME=FILE.
    text: tuple[str, ...] = flag((), "--eval-text", metavar="FILE")
    # Sequences to use of the evaluation texts: one number, or one for each text.
    windows: tuple[int, ...] = flag((64,), "--eval-windows", metavar="N")
    # Tasks of lm-eval, and task files (.jsonl).
    tasks: tuple[str, ...] = flag((), metavar="NAMES")
    # Depths whose models are scored on tasks (default: all).
    task_layers: tuple[int, ...] | None = flag(None, metavar="N,N")
    # Use only the first N items of each task.
    limit: int | None = flag(None, metavar="N")
    # Folder with lm-eval task definitions of your own.
    include_path: Path | None = flag(None, metavar="DIR")
    # Write the prompts of tasks as conversations, with the model's chat template.
    chat_template: bool = False
    # Measure tokens per second too, each model in turns with the original.
    speed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text", "tasks"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        numbers: Any = self.windows
        windows: tuple[int, ...] = (numbers,) if isinstance(numbers, int) else tuple(numbers)
        object.__setattr__(self, "windows", windows)
        alone = self.task_layers is not None and not self.tasks
        check(
            (bool(self.text or self.tasks), "There is nothing to measure.", "Give --eval-text or --tasks."),
            (all(n >= 1 for n in windows), f"--eval-windows is {_listed(windows)}.", "Give numbers from 1 on."),
            (
                len(windows) in (1, len(self.text)),
                f"--eval-windows has {len(windows)} numbers, and there are {len(self.text)} texts.",
                "Give one number, or one for each --eval-text, in the same order.",
            ),
            (not alone, "--task-layers is given without --tasks.", "Give --tasks, or leave it out."),
            (self.limit is None or self.limit >= 1, f"--limit is {self.limit}.", "Leave it out for all items."),
        )


@dataclass(frozen=True, kw_only=True)
class CompareResult(Result):
    """What a comparison gave."""

    model: str
    out: Path
    # The table, a mapping a model; None for a dry run.
    rows: tuple[Mapping[str, Any], ...] | None = None
    # For each method, the passes over the calibration text that it takes at most, without the one that they share.
    estimate: tuple[Mapping[str, Any], ...] = ()
    # How often the whole model was measured, what that cost, and the cost of all ladders: in this call.
    passes: int = 0
    shared_layer_forwards: float = 0.0
    layer_forwards: float = 0.0
    # What was written beside the rows.
    files: tuple[Path, ...] = ()
    seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data = super().to_dict()
        if self.rows is None:
            return {name: data[name] for name in ("model", "out", "estimate", "seconds")}
        return {name: value for name, value in data.items() if name != "estimate"}


def compare(
    model: ModelRef | str,
    out: Annotated[Path, Flag(names=("--out", "-o"), metavar="DIR", help="Folder of the comparison.")],
    entrants: Entrants,
    evaluation: CompareEval,
    *,
    text: TextSpec = TextSpec(),
    runtime: Runtime = Runtime(),
    dry_run: Annotated[bool, Flag(help="Print an estimate of the cost; write nothing.")] = False,
) -> CompareResult:
    """Compare methods on one model, at several depths, pruned and healed: perplexity, answers, tasks, speed, cost.

    The methods share one pass over the model, and each pruned model is measured in memory, without being built. If it
    is interrupted, the same command resumes; more methods, depths, heals, models and tasks may be added later.
    `intarsia build OUT/plans/METHOD --layers N` builds any of the models.

    Raises:
        UserError: something about the input cannot be used. Nothing has been written then.
    """
    from intarsia.checkpoint.resolve import inputs_of
    from intarsia.checkpoint.staging import check_no_input
    from intarsia.commands.job import Job, pin_text
    from intarsia.evaluation.agreement import Asked
    from intarsia.evaluation.speed import peak_memory_bytes
    from intarsia.evaluation.tasks import plan_tasks
    from intarsia.healing.pipeline import check_stages, check_turns
    from intarsia.reporting.comparison import DENSE, ROWS, SETTINGS, Row, cells, load
    from intarsia.reporting.wording import command

    started, out = time.perf_counter(), Path(out)
    run = RunDir(out, option="-o")

    # Input: everything that can be wrong is found before any work.
    methods = planners.choose_all(",".join(entrants.methods)) if entrants.methods else ()
    heals, given = entrants.heals(), [_named(each) for each in entrants.models]
    for stages in heals.values():
        check_stages(stages, runtime)
    read = [*text.sources, *evaluation.text, *evaluation.tasks, *filter(None, [evaluation.prompts])]
    own = [] if evaluation.include_path is None else [evaluation.include_path]
    check_no_input(out, inputs_of(models=[model, *(source for _, source in given)], texts=read, files=own))
    job = Job(model, text, runtime)
    models = _models(given, job, [DENSE, *(method.label for method in methods)])
    for stages in heals.values():
        check_turns(stages, job.tokenizer)
    check_no_input(out, [each.checkpoint.folder for each in (job, *models.values())])
    whole, depths = job.checkpoint.architecture.n_layers, entrants.layers
    strangers = sorted({*(evaluation.task_layers or ())} - {*depths})
    deep = [depth for depth in depths if not 1 <= depth < whole]
    check(
        (not deep, f"--layers names {_listed(deep)}; the model has {whole} layers.", "Keep fewer, and at least 1."),
        (not strangers, f"--task-layers names {_listed(strangers)}.", "Add them to --layers."),
        (
            not (models and runtime.stream),
            "--models is given with --stream, and these models must be in memory.",
            "Leave one of them out.",
        ),
    )
    texts = _texts(evaluation, job)
    tasks = None
    if evaluation.tasks:
        how: dict[str, Any] = {"include_path": evaluation.include_path, "chat": evaluation.chat_template}
        tasks = plan_tasks(list(evaluation.tasks), limit=evaluation.limit, **how)
        tasks.check_tokens(job.tokenizer)
    configs = [each.checkpoint.architecture.config for each in (job, *models.values())]
    asked = Asked.of(evaluation, job.tokenizer, *configs, stream=runtime.stream)
    estimate = tuple(_estimate(method, job, depths, heals) for method in methods)

    def result(**more: Any) -> CompareResult:
        return CompareResult(
            model=job.model,
            out=out,
            estimate=estimate,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory_bytes(),
            **more,
        )

    if dry_run:
        return result()
    settings = _settings(job, run, texts)
    task_facts = {} if tasks is None else _task_facts(tasks, evaluation)
    run.check(settings)
    if tasks is not None:
        run.check(task_facts, name="tasks")

    rows = Rows(job, run.log(Path(ROWS).stem), texts, tasks, asked, evaluation)
    wanted = [(method.label, depth, heal) for method in methods for depth in depths for heal in heals]
    ladders = Ladders(job, out)
    missing = [key for key in (rows.dense_key, *wanted) if not rows.has(key)]
    unknown = {name: each for name, each in models.items() if not rows.has_model(name, each)}
    if missing or unknown:
        if methods:
            _ = job.text.calibration  # a mistyped text must leave no folder
        with run.opened(settings), progress.current().task("comparing", len(missing) + len(unknown)) as task:
            if methods:
                pin_text(run, job)
            if tasks is not None:
                run.pin("tasks", task_facts)
            wishes: dict[str, Any] = {
                "methods": [method.label for method in methods],
                "layers": depths,
                "heal": list(heals),
            }
            wishes |= {"task_layers": evaluation.task_layers, "speed": evaluation.speed}
            words = [str(settings["model"]), "-o", out.name]
            words += [] if job.revision is None else ["--revision", job.revision]
            again = {"command": command("compare", *words, given=(entrants, evaluation, text))}
            run.write_json(SETTINGS, _report_facts(job, run, texts, evaluation) | {"asked": wishes} | again)
            try:
                # The original first: it also shows whether the tasks can be scored.
                if rows.dense_key in missing:
                    rows.add(rows.dense())
                    task.advance()
                # Those that share a pass over the whole model one after the other.
                for method in sorted(methods, key=lambda method: bool(method.create().after_final_norm)):
                    task.note(method.label)
                    ours = [key for key in missing if key[0] == method.label]
                    for rung in ladders.rungs(method, depths) if ours else ():
                        rows.add_shared(ladders.shared_forwards)
                        for _, layers, heal in (key for key in ours if key[1] == rung.layers):
                            row = Row(method=method.label, layers=layers, heal=heal, note=rung.note)
                            if rung.recipe is not None:
                                row = rows.measured(row, rung, *ladders.healed(rung, heals[heal]))
                            rows.add(row)
                            task.advance()
                for name, each in unknown.items():
                    rows.add(rows.existing(name, each))
                    task.advance()
            finally:
                ladders.close()
    return result(
        files=_write_outputs(out),
        rows=tuple(map(_with_errors, cells(load(out)))),
        passes=ladders.passes,
        shared_layer_forwards=ladders.shared_forwards,
        layer_forwards=ladders.layer_forwards,
    )


def _texts(evaluation: CompareEval, job: Job) -> dict[str, Corpus]:
    """The evaluation texts by name; without a name a text is called after its file.

    Raises:
        UserError: one cannot be used, or two have one name.
    """
    from intarsia.evaluation.perplexity import eval_corpus

    windows = evaluation.windows if len(evaluation.windows) > 1 else evaluation.windows * len(evaluation.text)
    found: dict[str, Corpus] = {}
    for given, count in zip(evaluation.text, windows, strict=True):
        name, source = _named(given)
        check((name not in found, f"Two --eval-text are called {name!r}.", "Give names: --eval-text NAME=FILE."))
        found[name] = eval_corpus(source, job.tokenizer, seq_len=job.spec.seq_len, windows=count)
    return found


def _models(given: Sequence[tuple[str, str]], job: Job, taken: Sequence[str]) -> dict[str, Job]:
    """The models that exist already, by the names of their rows.

    Args:
        taken: names of other rows.

    Raises:
        UserError: one cannot be opened, has another tokenizer, or its name is taken.
    """
    from intarsia.commands.job import Job, check_same_tokenizer

    problems, found = Problems(), dict[str, Job]()
    for name, source in given:
        with problems:
            check((name not in (*found, *taken), f"Two rows are called {name!r}.", "Give names: --models NAME=MODEL."))
            found[name] = Job(source, runtime=job.runtime)
            check_same_tokenizer(job, found[name])
    problems.raise_any()
    return found


def _named(text: str) -> tuple[str, str]:
    """Name and source of an evaluation text, or of a model."""
    name, equals, source = text.partition("=")
    if equals and name and not any(mark in name for mark in "/\\#:") and not Path(text.partition("#")[0]).exists():
        return name, source
    file, _, part = text.partition("#")
    stem = text.split(":")[1] if text.startswith("hub:") and text.count(":") else Path(file).stem
    return (f"{stem} {part}" if part else stem), text


def _settings(job: Job, run: RunDir, texts: Mapping[str, Corpus]) -> dict[str, Any]:
    """What decides every number. A text is the same where its content is, whatever path it has."""
    from intarsia.checkpoint.hashing import acting_config
    from intarsia.checkpoint.resolve import lasting
    from intarsia.commands.job import calibration_of

    return {
        "kind": "compare",
        "model": lasting(job.model),
        "revision": job.revision,
        "base_sha256": job.sha256,
        "config": acting_config(job.checkpoint.config),
        "calibration": calibration_of(run, job),
        "tokens": job.spec.tokens,
        "seq_len": job.spec.seq_len,
        "seed": job.spec.seed,
        "eval_texts": {name: {"sha256": text.sha256, "windows": len(text)} for name, text in texts.items()},
    }


def _task_facts(tasks: TaskPlan, evaluation: CompareEval) -> dict[str, Any]:
    """What is pinned of the tasks: of a local file the questions that are asked. They may be added later."""
    from hashlib import sha256

    def fact(task: Task) -> dict[str, Any]:
        chat = {"chat_template": True} if tasks.chat else {}
        if task.questions:
            return {"limit": tasks.limit, **chat, "sha256": sha256(repr(task.questions).encode()).hexdigest()}
        return {"limit": tasks.limit, **chat, "include_path": plain(evaluation.include_path)}

    return {task.name: fact(task) for task in tasks.tasks}


def _report_facts(job: Job, run: RunDir, texts: Mapping[str, Corpus], evaluation: CompareEval) -> dict[str, Any]:
    """What the report says of how the rows were made."""
    from intarsia.commands.job import versions

    settings = run.pinned()
    nested = ("calibration", "tokens", "seq_len", "seed")
    sources = [_named(given)[1] for given in evaluation.text]
    named_tasks = run.pinned("tasks") if (run.path / "tasks.json").is_file() else {}
    specs = evaluation.tasks or named_tasks
    read = (run.path / "calibration.json").is_file()  # not where there are only models that existed already
    return {
        **{name: value for name, value in settings.items() if name not in nested},
        "settings": {name: settings[name] for name in nested},
        "calibration": {"text": settings["calibration"], **run.pinned("calibration")} if read else None,
        "eval_texts": [
            {"name": name, "spec": source, **settings["eval_texts"][name], "seq_len": text.seq_len}
            for (name, text), source in zip(texts.items(), sources, strict=True)
        ],
        "tasks": [
            {"name": name, "spec": spec, **fact} for spec, (name, fact) in zip(specs, named_tasks.items(), strict=True)
        ],
        "versions": versions(),
    }


def _estimate(
    method: Chosen, job: Job, depths: tuple[int, ...], heals: Mapping[str, tuple[Chosen, ...]]
) -> dict[str, Any]:
    """Passes over the calibration text that a method takes at most, without the one that all methods share."""
    from intarsia.commands.planning import Planning

    planning = Planning(job, Target(layers=min(depths)), method)
    planner, architecture = planning.planner, job.checkpoint.architecture
    shared = architecture.n_layers if planner.measures or planner.progressive else 0
    sequences = max(job.spec.tokens // job.spec.seq_len, 1)
    # Where a step may take several layers, every depth may need a ladder of its own.
    targets = depths if planner.layers_at_once > 2 else [min(depths)]
    forwards = sum(planner.forwards_at_most(architecture, target, sequences) - shared for target in targets)
    return {
        "method": method.label,
        "passes_at_most": forwards / architecture.n_layers,
        "heal_passes_at_most": len(depths) * sum(planning.heal_passes_at_most(stages) for stages in heals.values()),
        "models": len(depths) * len(heals),
    }


def _write_outputs(out: Path) -> tuple[Path, ...]:
    """Write what stands beside the rows: the table as CSV and Markdown, figures, and the report page."""
    from intarsia.commands.report import REPORT
    from intarsia.disk import write_whole
    from intarsia.reporting.comparison import MEAN, as_csv, as_markdown, load
    from intarsia.reporting.comparison_report import figure_file
    from intarsia.reporting.page import write_report

    comparison = load(out)
    files = {"table.csv": as_csv(comparison), "table.md": as_markdown(comparison)}
    # Quality against size, and against speed where it was measured: one figure a text, one for the tasks.
    qualities = [*comparison.texts, *([MEAN] if any(row.tasks for row in comparison.rows) else [])]
    against = {"": "parameters"}
    if any(row.speed is not None for row in comparison.rows):
        against["-speed"] = "decode_tokens_per_s"
    for quality in qualities:
        name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in quality)
        for suffix, kind in against.items():
            files[f"figure-{name}{suffix}.svg"] = figure_file(comparison, against=kind, quality=quality)
    for name, content in files.items():
        write_whole(out / name, content)
    write_report([out], out / REPORT)
    return tuple(out / name for name in (*files, REPORT))


def _with_errors(cells: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table with every number and its standard error as one value."""
    last = " stderr"
    return {
        name: {"value": value, "stderr": cells[f"{name}{last}"]} if cells.get(f"{name}{last}") is not None else value
        for name, value in cells.items()
        if not name.endswith(last)
    }


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A depth of a method's ladder, or why the method does not come to it."""

    layers: int
    # None where there is no such model.
    ladder: Ladder | None = None
    planning: Planning | None = None
    recipe: Recipe | None = None
    # Of all steps down to it, without the shared pass.
    layer_forwards: float = 0.0
    seconds: float = 0.0
    note: str | None = None


class Ladders:
    """Makes ladders one after the other, each in a run folder of its own.

    Attributes:
        passes: how often the whole model was measured; `shared_forwards` is what that cost.
        layer_forwards: cost of all ladders that were made, without that.
    """

    def __init__(self, job: Job, out: Path) -> None:
        self.job, self.out = job, out
        self.passes = 0
        self.shared_forwards = 0.0
        self.layer_forwards = 0.0
        self._current: Intermediate | None = None
        self._is_kept = False
        self._original: TeacherStates | None = None

    def rungs(self, method: Chosen, depths: Sequence[int]) -> Iterator[Rung]:
        """The rungs at these depths, deepest model first.

        Where a step may take several layers, the ladder can pass a depth by; such a depth has a ladder of its own.
        """
        # The folder of `come[norm=average]` is `come-norm-average`.
        least, name = min(depths), re.sub(r"[\[,=]", "-", method.label.rstrip("]"))
        leaps = method.create().layers_at_once > 2
        planned = self._plan(method, f"{name}-to-{least:03d}" if leaps else name, least)
        for depth in sorted(depths, reverse=True):
            found, note = planned, None
            if leaps and depth not in (*planned[2].depths, least):
                found, note = self._plan(method, f"{name}-to-{depth:03d}", depth), "a ladder of its own"
            yield _rung(*found, depth, note)

    def healed(self, rung: Rung, stages: Sequence[Chosen]) -> tuple[Recipe, Path, dict[str, Any]]:
        """The recipe of a rung with these heal stages, its file, and what a row says of the healing.

        Their common teacher is measured once, where there is memory for it.
        """
        from intarsia.commands.planning import heal_recipe

        assert rung.recipe is not None and rung.ladder is not None and rung.planning is not None
        started = time.perf_counter()
        if not stages:
            return rung.recipe, rung.ladder.recipe_path(rung.layers), {}
        with rung.ladder.run.opened():
            found = heal_recipe(rung.planning, rung.ladder, rung.recipe, stages, states=self._states())
        assert found is not None
        results = found.stages[1:]
        kept = None if found.taken else "the fit is no better, so it stays as it was pruned"
        facts = {
            "heal_forwards": sum(result.facts.get("forwards", 0) for result in results) or None,
            "heal_seconds": time.perf_counter() - started if all(result.fresh for result in results) else None,
            "note": "; ".join(filter(None, [rung.note, kept])) or None,
        }
        return found.recipe, found.path, facts

    def close(self) -> None:
        """Free the hidden states."""
        self._close_current()
        if self._original is not None:
            self._original.close()
            self._original = None

    def _plan(self, method: Chosen, name: str, target: int) -> tuple[Planning, Ladder, PlanResult]:
        from intarsia.commands.planning import Planning
        from intarsia.pruning.ladder import Ladder

        planning = Planning(self.job, Target(layers=target), method, whole=self._measured)
        run = RunDir(self.out / PLANS / name)
        before = Ladder(run).log()
        with planning.opened(run) as ladder:
            planned = planning.work(ladder)
        self.layer_forwards += planned.layer_forwards - sum(entry["layer_forwards"] for entry in before)
        return planning, ladder, planned

    def _measured(self, planner: Planner) -> Intermediate:
        """The original; measured where the planner needs that, once for all methods that measure it alike."""
        current = self._model(planner.after_final_norm)
        if self._is_kept:
            current.rewind()
        if self._is_kept or not (planner.progressive or planner.measures or planner.blocks):
            return current
        current.look_at(None)
        if self.passes:
            progress.current().say("another pass over the whole model: this method measures it after the final norm")
        before = current.layer_forwards
        current.refresh()
        current.keep()
        self._is_kept = True
        self.passes += 1
        self.shared_forwards += current.layer_forwards - before
        return current

    def _states(self) -> TeacherStates | None:
        """The original's hidden states: as the ladders measured it, or run once where there is memory for all."""
        from intarsia.activations.batches import Batches
        from intarsia.activations.loop import Loop
        from intarsia.healing.teacher import TeacherStates, fits_in_memory

        corpus, resident = self.job.text.calibration, self.job.resident
        if self._current is not None and self._is_kept and (found := self._current.original()) is not None:
            return found
        if self._original is None:
            placed = self.job.placement
            batches = Batches(corpus, resident.device, batch_tokens=placed.batch_tokens)
            memory_budget = placed.memory_budget(RunDir(self.out).scratch)
            if fits_in_memory(resident, batches, memory_budget):
                self._original = TeacherStates(Loop(resident, batches, memory_budget=memory_budget), keep=True)
        return self._original

    def _close_current(self) -> None:
        if self._current is not None:
            self._current.close()
        self._current, self._is_kept = None, False

    def _model(self, after_final_norm: bool) -> Intermediate:
        if self._current is not None and self._current.after_final_norm != after_final_norm:
            self._close_current()
        if self._current is None:
            from intarsia.commands.planning import original

            self._current = original(self.job, RunDir(self.out).scratch, after_final_norm=after_final_norm)
        return self._current


def _rung(planning: Planning, ladder: Ladder, planned: PlanResult, depth: int, note: str | None) -> Rung:
    if depth not in planned.depths:
        least = planned.depths[-1] if planned.depths else planned.layers
        why = planned.stopped or f"the ladder passes from above it to {least}"
        return Rung(layers=depth, note=f"not reached: {why}")
    steps: list[Mapping[str, Any]] = [entry for entry in ladder.log() if entry["layers"] >= depth]
    return Rung(
        layers=depth,
        planning=planning,
        ladder=ladder,
        recipe=ladder.recipe(depth),
        layer_forwards=sum(step["layer_forwards"] for step in steps),
        seconds=sum(step["seconds"] for step in steps),
        note=note,
    )


class Rows:
    """The measured rows, and the measuring of new ones.

    Attributes:
        dense_key: of the original's row.
    """

    def __init__(
        self,
        job: Job,
        log: Log,
        texts: Mapping[str, Corpus],
        tasks: TaskPlan | None,
        asked: Asked | None,
        evaluation: CompareEval,
    ) -> None:
        """
        Args:
            log: a line for each row; of two about the same model the later one counts.
            texts: what perplexity is measured on, by name.
            tasks: what accuracy is measured on; None for nothing.
            asked: the prompts that every model answers; None for none.
        """
        from intarsia.reporting.comparison import DENSE, read_rows

        self.asked = asked
        self.job, self.log, self.texts, self.tasks, self.evaluation = job, log, texts, tasks, evaluation
        self.rows = {row.key: row for row in read_rows(log.path)}
        self.dense_key: Key = (DENSE, job.checkpoint.architecture.n_layers, "none")

    def has(self, key: Key) -> bool:
        """Whether a row has all measures that this call asks for."""
        return key in self.rows and self._is_whole(self.rows[key])

    def has_model(self, name: str, job: Job) -> bool:
        """The same of a model that existed already, while it has the same weights."""
        row = self.rows.get((name, job.checkpoint.architecture.n_layers, "none"))
        return row is not None and row.weights_sha256 == job.sha256 and self._is_whole(row)

    def add(self, row: Row) -> None:
        """Record a row."""
        self._keep(row)
        progress.current().say(row.line)

    def add_shared(self, layer_forwards: float) -> None:
        """Record the cost of the shared pass in the original's row; no method's row contains it."""
        dense = self.rows[self.dense_key]
        if layer_forwards > (dense.layer_forwards or 0.0):
            self._keep(replace(dense, layer_forwards=layer_forwards))

    def _keep(self, row: Row) -> None:
        self.log.append(asdict(row))
        self.rows[row.key] = row

    def dense(self) -> Row:
        """The row of the original."""
        from intarsia.reporting.comparison import Row

        checkpoint, (method, layers, heal) = self.job.checkpoint, self.dense_key
        row = Row(method=method, layers=layers, heal=heal, parameters=checkpoint.parameters, bytes=checkpoint.nbytes)
        return self._with_measures(row, self.job.resident.model, self.job.model, dense=None)

    def existing(self, name: str, job: Job) -> Row:
        """The row of a model that existed already."""
        from intarsia.commands.evaluate import load_whole
        from intarsia.reporting.comparison import Row

        checkpoint = job.checkpoint
        row = Row(
            method=name,
            layers=checkpoint.architecture.n_layers,
            parameters=checkpoint.parameters,
            bytes=checkpoint.nbytes,
            weights_sha256=job.sha256,
        )
        return self._doubted(self._with_measures(row, load_whole(job), name, dense=self.rows[self.dense_key]))

    def measured(self, row: Row, rung: Rung, recipe: Recipe, path: Path, facts: Mapping[str, Any]) -> Row:
        """The row of a recipe's model; the measures of an equal model in an earlier row are reused.

        Args:
            path: the recipe's file.
            facts: of its healing.
        """
        from intarsia.building.assembled import assembled
        from intarsia.recipe import schema

        checkpoint = self.job.checkpoint
        row = replace(
            row,
            parameters=checkpoint.parameters - (recipe.depth - row.layers) * checkpoint.architecture.layer_parameters,
            bytes=_built_bytes(recipe, checkpoint),
            layer_forwards=rung.layer_forwards,
            plan_seconds=rung.seconds,
            recipe=path.relative_to(self.log.path.parent).as_posix(),
            recipe_sha256=schema.content_hash(recipe),
            **facts,
        )
        for other in self.rows.values():
            if other.recipe_sha256 == row.recipe_sha256 and self._is_whole(other):
                names = ("perplexity", "answers", "tasks", "speed")
                return self._doubted(replace(row, **{name: getattr(other, name) for name in names}))
        model = assembled(recipe, self.job.resident)
        return self._doubted(self._with_measures(row, model, row.full_name, dense=self.rows[self.dense_key]))

    def _doubted(self, row: Row) -> Row:
        """A row that says where perplexity or tasks look well and the answers do not."""
        from intarsia.evaluation.agreement import doubt

        dense, text = self.rows[self.dense_key], next(iter(self.texts), None)
        if row.answers is None or dense.answers is None:
            return row
        ratio = None if text is None else row.perplexity[text]["value"] / dense.perplexity[text]["value"]
        kept = row.tasks["mean"] / dense.tasks["mean"] if row.tasks and dense.tasks and dense.tasks["mean"] else None
        loops = row.answers["loops"]["value"]
        more = loops - dense.answers["loops"]["value"]
        found = doubt(row.answers["agreement"]["value"], loops, more_loops=more, perplexity=ratio, kept=kept)
        return replace(row, note="; ".join(filter(None, [row.note, found])) or None)

    def _wants_tasks(self, layers: int) -> bool:
        """Whether models of this depth are scored on tasks; the original is."""
        depths = self.evaluation.task_layers
        return self.tasks is not None and (depths is None or layers in (*depths, self.dense_key[1]))

    def _is_whole(self, row: Row) -> bool:
        if row.parameters is None:
            return True  # there is no such model
        tasks = row.tasks is not None or not self._wants_tasks(row.layers)
        return tasks and self._is_answered(row) and (row.speed is not None or not self.evaluation.speed)

    def _is_answered(self, row: Row) -> bool:
        """Whether a row's answers are to the prompts that this call asks for."""
        found, asked = row.answers, self.asked
        if asked is None:
            return True
        if found is None or found["asked"] != [asked.answers, asked.answer_tokens]:
            return False
        return asked.prompts is None or found["sha256"] == asked.prompts.sha256

    @cached_property
    def reference(self) -> Reference:
        """The original's answers, written once a command."""
        assert self.asked is not None
        return self.asked.answered(self.job.resident.model, seed=self.job.spec.seed, key=self.job.sha256)

    def _answers(self, model: PreTrainedModel, dense: Row | None) -> dict[str, Any] | None:
        if self.asked is None:
            return None
        followed = None if dense is None else self.reference.follow(model)
        original = self.job.resident.model
        found = self.reference.itself() if followed is None else self.reference.judge(followed, original)
        return {**asdict(found), "asked": [self.asked.answers, self.asked.answer_tokens]}

    def _with_measures(self, row: Row, model: PreTrainedModel, name: str, dense: Row | None) -> Row:
        from intarsia.evaluation.perplexity import perplexity

        perplexities = {}
        for text, corpus in self.texts.items():
            found = perplexity(model, corpus)
            perplexities[text] = {
                "value": found.value,
                "nll": found.nll,
                "stderr": found.stderr if found.windows > 1 else None,  # one window has no scatter
                "windows": found.windows,
                "sha256": found.text_sha256,
            }
        return replace(
            row,
            perplexity=perplexities,
            answers=self._answers(model, dense),
            tasks=self._tasks(model, name, dense).to_dict() if self._wants_tasks(row.layers) else None,
            speed=self._speed(model, dense) if self.evaluation.speed else None,
        )

    def _tasks(self, model: PreTrainedModel, name: str, dense: Row | None) -> TaskResults:
        from intarsia.evaluation.results import TaskResults, retention
        from intarsia.evaluation.tasks import score_tasks

        assert self.tasks is not None
        found = score_tasks(self.tasks, model, self.job.tokenizer, name=name)
        if dense is None or dense.tasks is None:
            return found
        kept = TaskResults.from_dict(dense.tasks)
        try:
            return replace(found, retention=retention(kept.scores, found.scores, against=self.job.model))
        except UserError as error:  # a metric that is no mean over items
            progress.current().say(f"no retention: {error}")
            return found

    def _speed(self, model: PreTrainedModel, dense: Row | None) -> dict[str, Any]:
        """Measured in turns with the original, so that other load on the machine affects both."""
        from intarsia.evaluation.speed import compare_speed

        models = {"this": model, **({} if dense is None else {"dense": self.job.resident.model})}
        found = {name: asdict(speed) for name, speed in compare_speed(models).items()}
        return {**found.pop("this"), **found}


def _built_bytes(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """Bytes of the weights that a build writes."""
    architecture = checkpoint.architecture

    def layer(index: int) -> int:
        return sum(
            checkpoint.headers[architecture.tensor_name(index, local)].nbytes
            for local in architecture.layer_shapes(index)
        )

    outside = checkpoint.nbytes - sum(layer(index) for index in range(architecture.n_layers))
    return outside + sum(layer(op.sources[0].layer) for op in recipe.layers)
