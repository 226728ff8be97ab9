"""`intarsia compress`: a model in, a smaller model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from intarsia.cli import come_options, options, values
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
    eval_text: Annotated[str | None, options.valued("FILE", "Text for the perplexity before and after.")] = None,
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
        from intarsia.checkpoint.resolve import asked_for
        from intarsia.commands.push import push_later
        from intarsia.stages.compress import compress as stage

        progress = display(quiet=quiet or as_json)
        send_off = push_later(push_to_hub, private=private, dry_run=dry_run, progress=progress)
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
            heal_in_loop=heal_in_loop or thorough,
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
        show(send_off(result, out), to=stdout, as_json=as_json)
