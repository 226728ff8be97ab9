"""`intarsia compress`: a model in, a smaller model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from intarsia.cli import options, values
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show


def compress(
    context: typer.Context,
    model: options.Model,
    out: options.Out,
    layers: options.Layers = None,
    sparsity: options.Sparsity = None,
    method: options.Method = "come",
    calibration: options.Calibration = ["self"],  # noqa: B006  (typer copies it)
    tokens: options.Tokens = 65536,
    seq_len: options.SeqLen = 512,
    heal: Annotated[
        Literal["closed-form", "none"],
        typer.Option(help="Repair the cut model on the calibration text, without training; or leave it as cut."),
    ] = "closed-form",
    eval_text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text for the perplexity before and after.", show_default=False),
    ] = None,
    eval_windows: Annotated[int, typer.Option(help="Sequences of the evaluation text to use.")] = 64,
    run: Annotated[
        Path | None,
        typer.Option(help="Run folder: progress, log and ladder (default: beside OUT).", show_default=False),
    ] = None,
    revision: options.Revision = None,
    dequantize: options.Dequantize = False,
    gguf_file: options.GgufFile = None,
    max_shard_size: options.MaxShardSize = "5GB",
    heal_in_loop: options.HealInLoop = False,
    span_choice: options.SpanChoice = "sbi",
    merge: options.MergeCount = 2,
    sharpness: options.Sharpness = 1.0,
    dominance: options.Dominance = None,
    no_repeat: options.NoRepeat = False,
    norm: options.NormChoice = "fold",
    sensitivity: options.Sensitivity = "mean-abs",
    distance: options.Distance = "all-tokens",
    granularity: options.Granularity = 10,
    spans: options.Spans = 3,
    removals: options.Removals = False,
    racing: options.Racing = True,
    finalists: options.Finalists = 1,
    beam: options.Beam = 1,
    combine: options.Combine = "concat",
    reference: options.Reference = False,
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
    overwrite: options.Overwrite = False,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a model shallower: plan, heal, build and judge in one go.

    Give either --layers or --sparsity. Stopped at any point, the same command continues where it was.
    """
    with guard(run=run, resumes=True) as stdout:
        max_shard_bytes = values.byte_count(max_shard_size)
        from intarsia.checkpoint.model_name import asked_for
        from intarsia.stages.compress import compress as stage
        from intarsia.stages.push import check_push, pushed

        progress = display(quiet=quiet or as_json)
        check_push(push_to_hub)
        result = stage(
            asked_for(model, dequantize=dequantize, gguf_file=gguf_file),
            out,
            layers=layers,
            sparsity=sparsity,
            method=method,
            calibration=values.one_or_more(calibration),
            tokens=tokens,
            seq_len=seq_len,
            heal=heal,
            eval_text=eval_text,
            eval_windows=eval_windows,
            run=run,
            revision=revision,
            settings=options.planner_settings(context),
            heal_in_loop=heal_in_loop,
            device=device,
            dtype=dtype,
            devices=values.words(devices),
            stream=stream,
            memory_bytes=values.memory_bytes(memory),
            batch_tokens=batch_tokens,
            seed=seed,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
            max_shard_bytes=max_shard_bytes,
        )
        result = pushed(result, out, push_to_hub, private=private, dry_run=dry_run, progress=progress)
        show(result, to=stdout, as_json=as_json)
