"""`intarsia plan`: measure a model and write the ladder of recipes into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from intarsia.cli import come_options, options, values
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show


def plan(
    context: typer.Context,
    model: options.Model,
    run: Annotated[Path, typer.Option(help="Run folder: progress, log and ladder.", show_default=False)],
    layers: options.Layers = None,
    sparsity: options.Sparsity = None,
    method: options.Method = "come",
    calibration: options.Calibration = ["self"],  # noqa: B006  (typer copies it)
    tokens: options.Tokens = 65536,
    seq_len: options.SeqLen = 512,
    revision: options.Revision = None,
    dequantize: options.Dequantize = False,
    gguf_file: options.GgufFile = None,
    heal_in_loop: options.HealInLoop = False,
    span_choice: come_options.SpanChoice = "sbi",
    merge: come_options.MergeCount = 2,
    sharpness: come_options.Sharpness = 1.0,
    dominance: come_options.Dominance = None,
    no_repeat: come_options.NoRepeat = False,
    norm: come_options.NormChoice = "fold",
    sensitivity: come_options.Sensitivity = "mean-abs",
    distance: come_options.Distance = "all-tokens",
    granularity: come_options.Granularity = 10,
    spans: come_options.Spans = 3,
    removals: come_options.Removals = False,
    racing: come_options.Racing = True,
    finalists: come_options.Finalists = 1,
    blocks: come_options.Blocks = 0,
    thorough: come_options.Thorough = False,
    combine: come_options.Combine = "concat",
    reference: come_options.Reference = False,
    laco_merge: options.LacoMerge = 4,
    laco_threshold: options.LacoThreshold = 0.65,
    laco_interval: options.LacoInterval = 2,
    laco_lowest: options.LacoLowest = 1,
    laco_highest: options.LacoHighest = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    devices: options.Devices = None,
    stream: options.Stream = False,
    memory: options.Memory = None,
    batch_tokens: options.BatchTokens = None,
    seed: options.Seed = 0,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Decide what to make: a recipe for every depth down to the target, none of them built yet.

    Give either --layers or --sparsity. `intarsia build RUN --layers N` builds any of the depths later. Stopped at
    any point, the same command continues where it was.
    """
    with guard(run=run, resumes=True) as stdout:
        from intarsia.checkpoint.resolve import asked_for
        from intarsia.stages.plan import plan as stage

        result = stage(
            asked_for(model, dequantize=dequantize, gguf_file=gguf_file),
            run,
            layers=layers,
            sparsity=sparsity,
            method=method,
            calibration=values.one_or_more(calibration),
            tokens=tokens,
            seq_len=seq_len,
            settings=options.planner_settings(context),
            heal_in_loop=heal_in_loop or thorough,
            revision=revision,
            device=device,
            dtype=dtype,
            devices=values.words(devices),
            stream=stream,
            memory_bytes=values.memory_bytes(memory),
            batch_tokens=batch_tokens,
            seed=seed,
            dry_run=dry_run,
            progress=display(quiet=quiet or as_json),
        )
        show(result, to=stdout, as_json=as_json)
