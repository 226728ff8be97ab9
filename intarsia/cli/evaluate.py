"""`intarsia eval ...`: how good a model is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intarsia.cli import options, values
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show

if TYPE_CHECKING:
    from intarsia.evaluation.retention import Ratio
    from intarsia.evaluation.task_results import TaskResults


def perplexity(
    model: options.Model,
    text: Annotated[str, options.valued("FILE", "Text; `file.txt#0.9:1` is its last tenth.")],
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    windows: Annotated[int, typer.Option(help="How many windows, from the start of the text; 0 for all.")] = 64,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    stream: options.Stream = False,
    memory: options.Memory = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Perplexity of a model on a text, over windows that do not overlap."""
    with guard() as stdout:
        from intarsia.stages.evaluate import evaluate_perplexity

        result = evaluate_perplexity(
            model,
            text,
            seq_len=seq_len,
            windows=windows or None,
            revision=revision,
            device=device,
            dtype=dtype,
            stream=stream,
            memory_bytes=values.memory_bytes(memory),
            progress=display(quiet=quiet or as_json),
        )
        show(result, to=stdout, as_json=as_json)


def tasks(
    model: options.Model,
    tasks: Annotated[
        str,
        options.valued(
            "NAMES",
            "Separated by commas: names of lm-eval (arc_easy, hellaswag, mmlu, ...), and .jsonl files of query, "
            "choices and gold (`piqa.jsonl#0.33:1` is the last two thirds of its items).",
        ),
    ],
    limit: Annotated[int | None, options.valued("N", "The first N items of each task.")] = None,
    against: Annotated[
        str | None,
        options.valued("MODEL", "Also what is kept of this model's accuracy, on the same items, with a 95 % interval."),
    ] = None,
    include_path: Annotated[Path | None, options.valued("DIR", "A folder with YAML tasks of your own.")] = None,
    num_fewshot: Annotated[
        int | None, options.valued("K", "Examples before each question (default: as the task says).")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch (default: by device).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the interval's draws.")] = 0,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Accuracy of a model on tasks: those of lm-eval, and local files of questions."""
    with guard() as stdout:
        from intarsia.stages.evaluate_tasks import evaluate_tasks

        results = evaluate_tasks(
            model,
            values.words(tasks),
            limit=limit,
            against=against,
            include_path=include_path,
            num_fewshot=num_fewshot,
            batch_tokens=batch_tokens,
            seed=seed,
            revision=revision,
            device=device,
            dtype=dtype,
            progress=display(quiet=quiet or as_json),
        )
        show(results if as_json else _Table(results), to=stdout, as_json=as_json)


class _Table:
    """Results on tasks as a person reads them: a row a task, without the outcomes of single items."""

    def __init__(self, results: TaskResults) -> None:
        self._results = results

    def to_dict(self) -> dict[str, Any]:
        """What is shown."""
        results = self._results
        kept = {} if results.retention is None else {task.name: task for task in results.retention.tasks}
        rows: list[dict[str, Any]] = []
        for score in results.scores:
            row: dict[str, Any] = {"task": score.name}
            row |= {name: metric.to_dict() for name, metric in score.metrics.items()}
            row |= {"items": score.n, "chance": score.chance}
            if score.name in kept:
                row["kept"] = _interval(kept[score.name].accuracy)
                row["kept above chance"] = _interval(kept[score.name].above_chance)
            rows.append(row)
        shown: dict[str, Any] = {"model": results.model, "tasks": rows, "mean": results.mean}
        if results.retention is not None:
            mean = results.retention.mean
            shown["against"] = results.retention.against
            shown["kept of the mean"] = _interval(mean.accuracy)
            shown["above chance"] = _interval(mean.above_chance)
        return shown


def _interval(ratio: Ratio | None) -> str:
    """`0.93 (0.88 to 0.97)`."""
    if ratio is None:
        return "nothing to keep"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f} (no interval)"
    return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
