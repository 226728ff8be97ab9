"""Compare: many methods on one model, at several depths, cut and healed, in one table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intarsia.checkpoint.hashing import acting_config
from intarsia.checkpoint.resolve import lasting
from intarsia.commands.job import check_seq_len, versions
from intarsia.evaluation.speed import peak_memory_bytes
from intarsia.evaluation.task_plan import plan_tasks
from intarsia.progress import Progress, Silent
from intarsia.registry import planners
from intarsia.reporting.comparison import cells, load
from intarsia.stages.compare_folder import CompareFolder
from intarsia.stages.compare_input import HEALS, check_depths, check_lists, estimated, load_texts, task_facts_of
from intarsia.stages.compare_judge import Judge
from intarsia.stages.compare_outputs import write_outputs
from intarsia.stages.compare_work import Work
from intarsia.stages.source import Source


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """What a comparison gave.

    Attributes:
        rows: the table, a mapping a model; None for a dry run.
        estimate: for every method, the passes over the calibration text that it takes at most, without the one that
            they share.
        shared_layer_forwards, layer_forwards: cost of that pass and of all ladders, in this call.
        passes: how often the whole model was measured in this call.
        files: what was written beside the rows.
    """

    model: str
    out: Path
    rows: tuple[Mapping[str, Any], ...] | None = None
    estimate: tuple[Mapping[str, Any], ...] = ()
    passes: int = 0
    shared_layer_forwards: float = 0.0
    layer_forwards: float = 0.0
    files: tuple[Path, ...] = ()
    seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data = {**asdict(self), "out": str(self.out), "files": [str(file) for file in self.files]}
        if self.rows is None:
            return {name: data[name] for name in ("model", "out", "estimate", "seconds")}
        return {name: value for name, value in data.items() if name != "estimate"}


def compare(
    model: str,
    out: Path,
    *,
    methods: str | Sequence[str],
    layers: Sequence[int],
    heal: Sequence[str] = ("none",),
    eval_text: str | Sequence[str] = (),
    eval_windows: int | Sequence[int] = 64,
    tasks: Sequence[str] = (),
    task_layers: Sequence[int] | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
    speed: bool = False,
    calibration: str | Sequence[str] = "self",
    tokens: int = 65536,
    seq_len: int = 512,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CompareResult:
    """Measure what every method makes of a model at every depth, beside the model itself.

    The methods share one pass over the model; what it took is in the row of the original, `dense`, and a method's rows
    tell what it took besides. Each model is a row that is kept as soon as it is measured, so a comparison that was
    stopped continues with the next one. More methods, depths, heals, tasks and speed may be asked for in the same
    folder later.

    Args:
        model: a local folder, a hub id, or `demo`.
        out: the folder of the comparison. Each method's ladder is a run folder under `plans/`.
        methods: names of methods, with options in brackets where they are not the defaults: `come[norm=average]`.
        layers: the depths.
        heal: `none`, `closed-form`, or both.
        eval_text: texts for perplexity, as SOURCE or NAME=SOURCE.
        eval_windows: windows of each of them, or of all.
        tasks: see `evaluate_tasks`; `limit` and `include_path` too.
        task_layers: depths at which models are scored on tasks; all by default.
        speed: measure tokens a second, each model in turns with the original.
        dry_run: estimate what it takes, and do nothing.

    Raises:
        UserError: something about the input cannot be used. Nothing has been written then.
    """
    begun = time.perf_counter()
    progress, out = progress or Silent(), Path(out)
    entrants = planners.choose_all(methods)
    texts_given = [eval_text] if isinstance(eval_text, str) else list(eval_text)
    windows = [eval_windows] if isinstance(eval_windows, int) else list(eval_windows)
    check_lists(layers, heal, texts_given, windows, tasks, task_layers)
    depths, heals = sorted(set(layers), reverse=True), [each for each in HEALS if each in heal]
    source = Source(
        model,
        revision=revision,
        calibration=calibration,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    check_depths(depths, source.checkpoint.architecture.n_layers)
    check_seq_len(source.checkpoint, seq_len)
    if len(windows) == 1:
        windows *= len(texts_given)
    texts, text_facts = load_texts(texts_given, windows, source.tokenizer, seq_len=seq_len)
    task_plan = plan_tasks(tasks, limit=limit, include_path=include_path) if tasks else None
    estimate = tuple(estimated(entrant, source, depths, heals) for entrant in entrants)
    if dry_run:
        return CompareResult(
            model=model,
            out=out,
            estimate=estimate,
            seconds=time.perf_counter() - begun,
            peak_memory_bytes=peak_memory_bytes(),
        )
    asked = {
        "methods": [entrant.label for entrant in entrants],
        "layers": depths,
        "heal": heals,
        "task_layers": None if task_layers is None else sorted(task_layers, reverse=True),
        "speed": speed,
    }
    task_facts = [] if task_plan is None else task_facts_of(task_plan, tasks, include_path)
    facts = _facts(source, CompareFolder(out).facts()) | {
        "eval_texts": text_facts,
        "tasks": task_facts,
        "asked": asked,
    }
    folder = CompareFolder.offer(out, facts)
    judge = Judge(source, texts, tasks=task_plan, task_layers=task_layers, speed=speed)
    work = Work(source, folder, judge, depths, heals, batch_tokens)
    try:
        if work.missing(entrants):
            corpus = source.corpus  # a mistyped text must not leave a folder behind
            facts["calibration"] = {
                "text": corpus.description,
                "sha256": corpus.sha256,
                "tokens": corpus.tokens,
            }
            folder.start(facts)
            work.run(entrants)
    finally:
        work.close()
    files = write_outputs(out)
    return CompareResult(
        model=model,
        out=out,
        rows=tuple(map(_with_errors, cells(load(out)))),
        estimate=estimate,
        passes=work.ladders.passes,
        shared_layer_forwards=work.ladders.shared_forwards,
        layer_forwards=work.ladders.layer_forwards,
        files=files,
        seconds=time.perf_counter() - begun,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _facts(source: Source, started: Mapping[str, Any]) -> dict[str, Any]:
    """What decides every number of the comparison. `started`: what it was started with, if it was."""
    given = ",".join(source.spec.sources)
    name = (started.get("settings") or {}).get("calibration", given)
    text = (started.get("calibration") or {}).get("sha256")
    # The same text by another name; what a model wrote has no other name.
    if name != given and text is not None and not any("self" in each.split(",") for each in (name, given)):
        given = name if source.corpus.sha256 == text else given
    return {
        "kind": "compare",
        "model": lasting(source.model),
        "revision": source.revision,
        "base_sha256": source.sha256,
        "config": acting_config(source.checkpoint.config),
        "settings": {
            "calibration": given,
            "tokens": source.tokens,
            "seq_len": source.seq_len,
            "seed": source.spec.seed,
        },
        "versions": versions(),
    }


def _with_errors(cells: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table with every number and its standard error as one value."""
    ends = " stderr"
    return {
        name: {"value": value, "stderr": cells[f"{name}{ends}"]} if cells.get(f"{name}{ends}") is not None else value
        for name, value in cells.items()
        if not name.endswith(ends)
    }
