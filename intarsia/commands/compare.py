"""`intarsia compare`: several methods on one model, at several depths, pruned and healed, in one table.

All methods share one pass over the whole model, whose hidden states and measures are kept for the next method. A
recipe's model is measured in memory; it shares every unchanged layer with the original, and has the same measures as
the folder that `intarsia build` would write.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from intarsia import progress
from intarsia.errors import Problems, Rule, check
from intarsia.flags import Flag, Result, flag, plain
from intarsia.options import ModelRef, Runtime, Target, TextsAndTasks, TextSpec, named, words
from intarsia.registry import Chosen, heal_stages, planners, words_of
from intarsia.run_dir import RunDir

if TYPE_CHECKING:
    from intarsia.commands.job import Job
    from intarsia.data.corpus import Corpus
    from intarsia.evaluation.tasks import Task, TaskPlan

_DETAILS = {"next-token KL", "tokens of an answer", "perplexity of answers", "bytes", "layer forwards"}
_DETAILS |= {"plan seconds", "heal forwards", "heal seconds"}


@dataclass(frozen=True, kw_only=True)
class Entrants:
    """Comparison: methods, depths and heal stages, and existing models."""

    # Methods of `intarsia plan`, with their options in brackets: come,come-p[spans=1],come[norm=average].
    methods: tuple[str, ...] = flag((), metavar="NAMES", commas=False)
    # Depths: 27,25,23.
    layers: tuple[int, ...] = flag((), metavar="N,N")
    # How to heal each model: none, closed-form, or several stages in a row as closed-form+layerwise. Each entry
    # gives a row of the table.
    heal: tuple[str, ...] = flag(("none",), metavar="NAMES", commas=False)
    # Existing models with the same tokenizer, as MODEL or NAME=MODEL: one more row each.
    models: tuple[str, ...] = flag((), metavar="MODELS")

    def __post_init__(self) -> None:
        for name in ("methods", "heal"):
            given = words(getattr(self, name))
            object.__setattr__(self, name, tuple(word for text in given for word in words_of(text)))
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers), reverse=True)))
        object.__setattr__(self, "models", words(self.models))
        known, planned = ", ".join(planners.names), bool(self.methods)
        check(
            (planned or bool(self.models), "--methods names no method.", f"Name some of {known}; or give --models."),
            (planned or not self.layers, "--layers is given without --methods.", "Give both, or leave it out."),
            (bool(self.layers) or not planned, "--layers names no depth.", "Write them like 27,25,23."),
            (bool(self.heal), "--heal is empty.", "Write none, or none,closed-form."),
        )

    def heals(self) -> dict[str, tuple[Chosen, ...]]:
        """The heal stages of every kind of row, by name; rows without healing first.

        Raises:
            UserError: there is no such stage.
        """
        problems = Problems()
        found = {}
        for kind in sorted(self.heal, key=lambda kind: kind != "none"):
            with problems:
                found[kind] = heal_stages.choose_all("none" if kind == "none" else kind.split("+"))
        problems.raise_any()
        return found


@dataclass(frozen=True, kw_only=True)
class CompareEval(TextsAndTasks):
    """Evaluation: measures of each model."""

    # Depths to score on tasks (default: all).
    task_layers: tuple[int, ...] | None = flag(None, metavar="N,N")
    # Measure tokens per second too, alternating each model with the original.
    speed: bool = False

    def rules(self) -> list[Rule]:
        """What must hold."""
        alone = self.task_layers is not None and not self.tasks
        return [
            *super().rules(),
            (bool(self.text or self.tasks), "There is nothing to measure.", "Give --eval-text or --tasks."),
            (not alone, "--task-layers is given without --tasks.", "Give --tasks, or leave it out."),
        ]


@dataclass(frozen=True, kw_only=True)
class CompareResult(Result):
    """The result of a comparison."""

    model: str
    out: Path
    # The table, one mapping per model; None for a dry run.
    rows: tuple[Mapping[str, Any], ...] | None = None
    # For each method, its passes over the calibration text at most, without the shared one.
    estimate: tuple[Mapping[str, Any], ...] = ()
    # In this call: passes that measured the whole model, their cost, and the cost of all ladders.
    passes: int = 0
    shared_layer_forwards: float = 0.0
    layer_forwards: float = 0.0
    # Other files that were written.
    files: tuple[Path, ...] = ()
    seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        data = super().to_dict()
        if self.rows is None:
            return {name: data[name] for name in ("model", "out", "estimate", "seconds")}
        return {name: value for name, value in data.items() if name != "estimate"}

    def summary(self) -> dict[str, Any]:
        """The table without the details, which the report has."""
        data = self.to_dict()
        if self.rows is None:
            return data
        rows = [{name: value for name, value in row.items() if name not in _DETAILS} for row in self.rows]
        kept = {name: data[name] for name in ("model", "passes", "seconds", "out")}
        return {"rows": rows, **kept, "report": str(self.files[-1])}


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

    The methods share one pass over the model, and pruned models are measured in memory, without building them. The same
    command resumes an interrupted comparison; methods, depths, heals, models and tasks can be added later.
    `intarsia build OUT/plans/METHOD --layers N` builds any of the models.

    Raises:
        UserError: the input cannot be used; nothing was written.
    """
    from intarsia.checkpoint.resolve import inputs_of
    from intarsia.commands.compare_rows import Ladders, Rows
    from intarsia.commands.job import Job, pin_text
    from intarsia.disk import check_no_input
    from intarsia.evaluation.agreement import Asked
    from intarsia.evaluation.perplexity import eval_corpora
    from intarsia.evaluation.speed import peak_memory_bytes
    from intarsia.evaluation.tasks import TaskPlan
    from intarsia.healing.pipeline import check_stages, check_turns
    from intarsia.inspection.own_code import OPTION, OWN_CODE
    from intarsia.reporting.comparison import DENSE, ROWS, SETTINGS, Row, cells, load
    from intarsia.reporting.wording import command

    started, out = time.perf_counter(), Path(out)
    run = RunDir(out, option="-o")

    # Input: find every problem before any work.
    methods = planners.choose_all(",".join(entrants.methods)) if entrants.methods else ()
    heals, given = entrants.heals(), [named(each) for each in entrants.models]
    for stages in heals.values():
        check_stages(stages, runtime)
    read = [*text.sources, *evaluation.sources.values(), *evaluation.tasks, *filter(None, [evaluation.prompts])]
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
    whole_model = "--tasks or --speed is given with --stream; they need the whole model in memory."
    streamed = runtime.stream and (evaluation.tasks or evaluation.speed)
    check(
        (not deep, f"--layers names {_listed(deep)}; the model has {whole} layers.", "Keep fewer, and at least 1."),
        (not strangers, f"--task-layers names {_listed(strangers)}.", "Add them to --layers."),
        (not streamed, whole_model, "Leave one of them out."),
    )
    texts = eval_corpora(evaluation, job.tokenizer, seq_len=text.seq_len)
    tasks = TaskPlan.of(evaluation, job.tokenizer)
    asked = Asked.of(evaluation, job.tokenizer, job.checkpoint.architecture.config, stream=runtime.stream)
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
    settings = _settings(run, job, texts)
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
            _ = job.text.calibration  # a mistyped text must not leave a folder
        # The bar counts whole rows: inside a task of no units, the steps of a plan do not move it.
        shown = progress.current()
        with (
            run.opened(settings),
            shown.task("comparing", len(missing) + len(unknown)) as task,
            shown.task("", 1, units=0.0),
        ):
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
            parts = [str(settings["model"]), "-o", out.name]
            parts += [] if job.revision is None else ["--revision", job.revision]
            parts += [OPTION] if OWN_CODE in settings["config"] else []
            again = {"command": command("compare", *parts, given=(entrants, evaluation, text))}
            run.write_json(SETTINGS, _report_facts(job, run, texts, evaluation) | {"asked": wishes} | again)
            try:
                # The original first, which also shows whether the tasks can be scored.
                if rows.dense_key in missing:
                    rows.add(rows.dense())
                    task.advance()
                # Methods that share a pass over the whole model, one after the other.
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
        rows=tuple(cells(load(out))),
        passes=ladders.passes,
        shared_layer_forwards=ladders.shared_forwards,
        layer_forwards=ladders.layer_forwards,
    )


def _models(given: Sequence[tuple[str, str]], job: Job, taken: Sequence[str]) -> dict[str, Job]:
    """The existing models by the names of their rows; `taken` are names of other rows."""
    from intarsia.commands.job import Job, check_same_tokenizer

    problems, found = Problems(), dict[str, Job]()
    for name, source in given:
        with problems:
            check((name not in (*found, *taken), f"Two rows are called {name!r}.", "Give names: --models NAME=MODEL."))
            found[name] = Job(source, runtime=job.runtime)
            check_same_tokenizer(job, found[name])
    problems.raise_any()
    return found


def _settings(run: RunDir, job: Job, texts: Mapping[str, Corpus]) -> dict[str, Any]:
    """The settings that decide the results. An evaluation text is identified by its content, not by its path."""
    from intarsia.commands.job import settings_of

    settings = settings_of(run, job)
    return {
        "kind": "compare",
        "base_sha256": settings.pop("sha256"),
        **settings,
        "eval_texts": {name: {"sha256": text.sha256, "windows": len(text)} for name, text in texts.items()},
    }


def _task_facts(tasks: TaskPlan, evaluation: CompareEval) -> dict[str, Any]:
    """The pinned facts of the tasks, for a local file its questions. Tasks may be added later."""
    from hashlib import sha256

    def fact(task: Task) -> dict[str, Any]:
        chat = {"chat_template": True} if tasks.chat else {}
        if task.questions:
            return {"limit": tasks.limit, **chat, "sha256": sha256(repr(task.questions).encode()).hexdigest()}
        return {"limit": tasks.limit, **chat, "include_path": plain(evaluation.include_path)}

    return {task.name: fact(task) for task in tasks.tasks}


def _report_facts(job: Job, run: RunDir, texts: Mapping[str, Corpus], evaluation: CompareEval) -> dict[str, Any]:
    """The facts about the comparison for its report."""
    from intarsia.commands.job import versions

    settings = run.pinned()
    nested = ("calibration", "tokens", "seq_len", "seed")
    sources = list(evaluation.sources.values())
    named_tasks = run.pinned("tasks") if (run.path / "tasks.json").is_file() else {}
    read = (run.path / "calibration.json").is_file()  # missing if there are only existing models
    return {
        **{name: value for name, value in settings.items() if name not in nested},
        "settings": {name: settings[name] for name in nested},
        "calibration": {"text": settings["calibration"], **run.pinned("calibration")} if read else None,
        "eval_texts": [
            {"name": name, "spec": source, **settings["eval_texts"][name], "seq_len": text.seq_len}
            for (name, text), source in zip(texts.items(), sources, strict=True)
        ],
        "tasks": [
            {"name": name, "spec": spec, **fact}
            for spec, (name, fact) in zip(evaluation.tasks or named_tasks, named_tasks.items(), strict=True)
        ],
        "versions": versions(),
    }


def _estimate(
    method: Chosen, job: Job, depths: tuple[int, ...], heals: Mapping[str, tuple[Chosen, ...]]
) -> dict[str, Any]:
    """A method's passes over the calibration text at most, without the shared one."""
    from intarsia.commands.planning import Planning

    planning = Planning(job, Target(layers=min(depths)), method)
    planner, architecture = planning.planner, job.checkpoint.architecture
    shared = architecture.n_layers if planner.measures or planner.progressive else 0
    sequences = max(job.spec.length // job.spec.seq_len, 1)
    # If a step may remove several layers, every depth may need a ladder of its own.
    targets = depths if planner.layers_at_once > 2 else [min(depths)]
    forwards = sum(planner.forwards_at_most(architecture, target, sequences) - shared for target in targets)
    return {
        "method": method.label,
        "passes_at_most": forwards / architecture.n_layers,
        "heal_passes_at_most": len(depths) * sum(planning.heal_passes_at_most(stages) for stages in heals.values()),
        "models": len(depths) * len(heals),
    }


def _write_outputs(out: Path) -> tuple[Path, ...]:
    """Write the table as CSV and Markdown, figures of quality, and the report page."""
    from intarsia.commands.report import REPORT
    from intarsia.disk import write_whole
    from intarsia.reporting.comparison import MEAN, as_csv, as_markdown, load
    from intarsia.reporting.comparison_report import figure
    from intarsia.reporting.figures import standalone
    from intarsia.reporting.page import write_report

    comparison = load(out)
    files = {"table.csv": as_csv(comparison), "table.md": as_markdown(comparison)}
    scored = any(row.tasks for row in comparison.rows)
    for quality in (*comparison.texts, *([MEAN] if scored else [])):
        name = re.sub(r"[^\w.-]", "-", quality)
        files[f"figure-{name}.svg"] = standalone(figure(comparison, quality=quality))
    for name, content in files.items():
        write_whole(out / name, content)
    write_report([out], out / REPORT)
    return tuple(out / name for name in (*files, REPORT))


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))
