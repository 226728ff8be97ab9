"""`intarsia compare`: what every method makes of a model, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli import options, values
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show

_JUDGING = "Judging"


def compare(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the comparison.", show_default=False)],
    methods: Annotated[
        str,
        options.valued(
            "NAMES",
            "Methods of `intarsia plan`, comma separated; options that are not the defaults in brackets: "
            "come,come-p\\[spans=1],come\\[norm=average].",  # else they are taken for markup
        ),
    ],
    layers: Annotated[str, options.valued("N,N", "Depths, comma separated.")],
    heal: Annotated[str, typer.Option(metavar="KINDS", help="none, closed-form, or both: none,closed-form.")] = "none",
    eval_text: Annotated[
        list[str], options.valued("[NAME=]FILE", "Text for perplexity; may be given again.", panel=_JUDGING)
    ] = [],  # noqa: B006  (typer copies it)
    eval_windows: Annotated[
        list[int],
        typer.Option(help="Sequences of the evaluation text; once, or for every text.", rich_help_panel=_JUDGING),
    ] = [64],  # noqa: B006
    tasks: Annotated[
        str | None, options.valued("NAMES", "Tasks of lm-eval or task files (.jsonl), comma separated.", panel=_JUDGING)
    ] = None,
    task_layers: Annotated[
        str | None, options.valued("N,N", "Depths to score on tasks (default: all).", panel=_JUDGING)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of each task.", show_default=False, rich_help_panel=_JUDGING)
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="Folder with task definitions of your own.", show_default=False, rich_help_panel=_JUDGING),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure tokens a second too.", rich_help_panel=_JUDGING)
    ] = False,
    calibration: options.Calibration = ["self"],  # noqa: B006
    tokens: options.Tokens = 65536,
    seq_len: options.SeqLen = 512,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    batch_tokens: options.BatchTokens = None,
    seed: options.Seed = 0,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare methods on one model, at several depths, cut and healed: perplexity, tasks, speed, cost.

    The methods share one pass over the model, and nothing is built: each model is judged in memory. Stopped at any
    point, the same command continues with the next row; more methods and depths may be added later.
    `intarsia build OUT/plans/METHOD --layers N` builds any of the models.
    """
    with guard(run=out, resumes=True) as stdout:
        depths = values.numbers(layers, "--layers")
        from intarsia.stages.compare import compare as stage

        result = stage(
            model,
            out,
            methods=methods,
            layers=depths,
            heal=values.words(heal),
            eval_text=eval_text,
            eval_windows=eval_windows,
            tasks=values.words(tasks),
            task_layers=None if task_layers is None else values.numbers(task_layers, "--task-layers"),
            limit=limit,
            include_path=include_path,
            speed=speed,
            calibration=values.one_or_more(calibration),
            tokens=tokens,
            seq_len=seq_len,
            revision=revision,
            device=device,
            dtype=dtype,
            batch_tokens=batch_tokens,
            seed=seed,
            dry_run=dry_run,
            progress=display(quiet=quiet or as_json),
        )
        show(result, to=stdout, as_json=as_json)
