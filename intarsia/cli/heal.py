"""`intarsia heal`: a cut model in, a repaired one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from intarsia.cli import options, values
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show

_TEXT, _BOTH, _LAYERS, _WHOLE = "Text", "Training", "Layerwise training", "End-to-end training"


def heal(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL|RECIPE",
            help="A folder that intarsia has built, a recipe (.yaml), or a run folder of `plan`.",
            show_default=False,
        ),
    ],
    out: options.Out,
    data: Annotated[
        list[str],
        options.valued(
            "SPEC", "Training text, as --calibration of `plan`; a small part of it is held out.", panel=_TEXT
        ),
    ],
    tokens: Annotated[
        str, typer.Option(metavar="N", help="Tokens of it: 500000, 500k, 2M.", rich_help_panel=_TEXT)
    ] = "65536",
    stages: Annotated[
        str, typer.Option(metavar="LIST", help="Of closed-form, layerwise, end-to-end, in the order wanted.")
    ] = "closed-form",
    teacher: Annotated[
        str | None,
        options.valued(
            "MODEL",
            "Whom to learn from (default: the recipe's base; of several models, their blend with no layer removed).",
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.", rich_help_panel=_TEXT)] = 512,
    fit_tokens: Annotated[
        str, typer.Option(metavar="N", help="Of these, for the closed form at most.", rich_help_panel=_TEXT)
    ] = "131072",
    eval_text: Annotated[
        list[str],
        options.valued("FILE", "Text whose perplexity is told after every stage; may be given again.", panel=_TEXT),
    ] = [],  # noqa: B006  (typer copies it)
    eval_windows: Annotated[int, typer.Option(help="Sequences of each to use.", rich_help_panel=_TEXT)] = 64,
    epochs: Annotated[int, typer.Option(help="How often the text is read.", rich_help_panel=_BOTH)] = 1,
    evaluations: Annotated[
        int, typer.Option(help="How often the held-out loss is measured, and state saved.", rich_help_panel=_BOTH)
    ] = 10,
    patience: Annotated[
        int, typer.Option(help="Stop after so many of them without a new best.", rich_help_panel=_BOTH)
    ] = 3,
    layer_lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_LAYERS)] = 3e-4,
    layer_batch_tokens: Annotated[int, typer.Option(help="Tokens of a step.", rich_help_panel=_LAYERS)] = 2048,
    layer_kl: Annotated[
        float, typer.Option(help="Weight of KL between softmaxed hidden states.", rich_help_panel=_LAYERS)
    ] = 1.0,
    layer_mse: Annotated[float, typer.Option(help="Weight of the squared error.", rich_help_panel=_LAYERS)] = 1.0,
    layer_cosine: Annotated[float, typer.Option(help="Weight of 1 - cosine.", rich_help_panel=_LAYERS)] = 0.0,
    weighting: Annotated[
        Literal["relative", "clip", "uniform"],
        typer.Option(help="What a token counts in the squared error.", rich_help_panel=_LAYERS),
    ] = "relative",
    layer_inputs: Annotated[
        Literal["teacher", "student"],
        typer.Option(
            help="Feed a layer the original's hidden states (as published), or those of the healed layers before it.",
            rich_help_panel=_LAYERS,
        ),
    ] = "teacher",
    layers: Annotated[
        Literal["spans", "behind"],
        typer.Option(
            "--train-layers",
            help="Layers that were changed, or also every layer behind the first of them.",
            rich_help_panel=_LAYERS,
        ),
    ] = "spans",
    only: Annotated[
        list[str], options.valued("NAME", "Train these alone: down_proj, mlp ...; may be given again.", panel=_LAYERS)
    ] = [],  # noqa: B006
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_WHOLE)] = 1e-4,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a step.", rich_help_panel=_WHOLE)] = 8192,
    micro_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens in one pass on one device (default: by device).", rich_help_panel=_WHOLE),
    ] = None,
    logits: Annotated[float, typer.Option(help="Weight of the KL of next tokens.", rich_help_panel=_WHOLE)] = 1.0,
    hidden: Annotated[
        float, typer.Option(help="Weight of hidden states at the ends of spans.", rich_help_panel=_WHOLE)
    ] = 0.0,
    cross_entropy: Annotated[float, typer.Option(help="Weight of the text itself.", rich_help_panel=_WHOLE)] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of the KL of next tokens.", rich_help_panel=_WHOLE)] = 1.0,
    top_k: Annotated[
        int | None, options.valued("K", "Learn from a cache of the teacher's K likeliest tokens.", panel=_WHOLE)
    ] = None,
    lora: Annotated[
        int | None,
        options.valued(
            "R",
            "Train changes of this rank, merged at the end. Of a mixture of experts: of its attention.",
            panel=_WHOLE,
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory, slower.", rich_help_panel=_WHOLE)
    ] = False,
    precision: Annotated[
        Literal["auto", "bf16", "no"], typer.Option(help="Mixed precision.", rich_help_panel=_WHOLE)
    ] = "auto",
    log: Annotated[
        str | None,
        typer.Option(
            metavar="TRACKER", help="tensorboard, wandb ...: any that Accelerate knows.", rich_help_panel=_WHOLE
        ),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder: state and log (default: beside OUT).", show_default=False)
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    stream: options.Stream = False,
    memory: options.Memory = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    max_shard_size: options.MaxShardSize = "5GB",
    overwrite: options.Overwrite = False,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Repair a cut model: in closed form, layer by layer, or as a whole.

    Stopped at any point, the same command continues where it was. Under `accelerate launch -m intarsia heal ...` the
    end-to-end stage uses all processes.
    """
    with guard(run=run, resumes=True) as stdout:
        most, most_fitted = values.token_count(tokens, "--tokens"), values.token_count(fit_tokens, "--fit-tokens")
        max_shard_bytes = values.byte_count(max_shard_size)
        from intarsia.commands.push import push_later
        from intarsia.healing.launch import rank
        from intarsia.healing.settings import EndToEndSettings, LayerwiseSettings
        from intarsia.stages.heal import heal as stage

        progress = display(quiet=quiet or as_json or rank() > 0)
        send_off = push_later(push_to_hub, private=private, progress=progress)
        result = stage(
            source,
            out,
            data=values.one_or_more(data),
            teacher=teacher,
            stages=[name.strip() for name in stages.split(",")],
            tokens=most,
            seq_len=seq_len,
            fit_tokens=most_fitted,
            eval_text=eval_text,
            eval_windows=eval_windows,
            layerwise=LayerwiseSettings(
                epochs=epochs,
                evaluations=evaluations,
                patience=patience,
                lr=layer_lr,
                batch_tokens=layer_batch_tokens,
                kl=layer_kl,
                mse=layer_mse,
                cosine=layer_cosine,
                weighting=weighting,
                inputs=layer_inputs,
                layers=layers,
                only=tuple(only),
            ),
            end_to_end=EndToEndSettings(
                epochs=epochs,
                evaluations=evaluations,
                patience=patience,
                lr=lr,
                batch_tokens=batch_tokens,
                micro_tokens=micro_tokens,
                logits=logits,
                hidden=hidden,
                cross_entropy=cross_entropy,
                temperature=temperature,
                top_k=top_k,
                lora=lora,
                checkpointing=checkpointing,
                precision=precision,
                log=log,
            ),
            run=run,
            device=device,
            dtype=dtype,
            stream=stream,
            memory_bytes=values.memory_bytes(memory),
            seed=seed,
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
        if rank() == 0:
            show(send_off(result, out), to=stdout, as_json=as_json)
