"""`intarsia tailor`: one small model out of a family of fine-tunes, by search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from intarsia.cli import options, values
from intarsia.cli.display import display
from intarsia.cli.guard import guard
from intarsia.cli.show import show

_SEARCH, _WHERE, _JUDGING = "Search", "Where trials run", "What comes of it"


def tailor(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FAMILY.yaml|RUN",
            help="A family file, or the folder of a search to go on with.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="RUN", help="Folder of the search.", show_default=False)
    ] = None,
    engine: Annotated[
        Literal["smac", "evolve", "random"] | None,
        typer.Option(help="Instead of the family file's.", show_default=False, rich_help_panel=_SEARCH),
    ] = None,
    trials: Annotated[int | None, options.valued("N", "Instead of the family file's.", min=1, panel=_SEARCH)] = None,
    more_trials: Annotated[
        int | None,
        options.valued(
            "N",
            "Of a search that is finished: so many more. One that is not finished goes on to its end first.",
            min=1,
            panel=_SEARCH,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Only go on with a search, never begin one.", rich_help_panel=_SEARCH),
    ] = False,
    calibration: Annotated[
        list[str],
        options.valued(
            "SPEC",
            "Text for planners and for concatenation (default: what the objectives show the search).",
            panel=_SEARCH,
        ),
    ] = [],  # noqa: B006  (typer copies it)
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of that text.", rich_help_panel=_SEARCH)] = 8192,
    workers: Annotated[
        int | None,
        options.valued("N", "Trials at once, each in a process of its own (default: 1, here).", min=1, panel=_WHERE),
    ] = None,
    scheduler: Annotated[
        str | None,
        options.valued(
            "ADDRESS", "Run trials on the workers of a Dask scheduler, such as tcp://host:8786.", panel=_WHERE
        ),
    ] = None,
    memory: Annotated[
        str | None,
        options.valued("SIZE", "What the caches of all workers may take together, such as 2GB.", panel=_WHERE),
    ] = None,
    judge: Annotated[
        bool,
        typer.Option(help="Judge the incumbent on what the search never saw.", rich_help_panel=_JUDGING),
    ] = True,
    judge_examples: Annotated[
        int, typer.Option(min=1, help="Unseen items of each objective, at most.", rich_help_panel=_JUDGING)
    ] = 1000,
    build: Annotated[bool, typer.Option(help="Build the incumbent into RUN/best.", rich_help_panel=_JUDGING)] = True,
    device: options.Device = None,
    dtype: options.Dtype = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the size of the space, the budgets and the cost; only config files are read.",
            rich_help_panel=_SEARCH,
        ),
    ] = False,
    configs: Annotated[
        Path | None,
        options.valued(
            "DIR",
            "For a dry run: where the config files of models on the hub are, DIR/ORGANISATION/NAME/config.json.",
            panel=_SEARCH,
        ),
    ] = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Search for the best small model that can be made of a family: remove, select, merge and join layers.

    Stopped at any point, the same command continues. `intarsia build RUN --best NAME` (or --knee, --trial N) builds
    any trial.
    """
    with guard(run=out or source, resumes=True) as stdout:
        memory_bytes = values.memory_bytes(memory)
        from intarsia.stages.tailor import tailor as stage

        result = stage(
            source,
            out,
            engine=engine,
            trials=trials,
            more_trials=more_trials,
            resume=resume,
            scheduler=scheduler,
            workers=workers,
            calibration=calibration,
            tokens=tokens,
            judge=judge,
            judge_examples=judge_examples,
            build=build,
            device=device,
            dtype=dtype,
            memory_bytes=memory_bytes,
            configs=configs,
            dry_run=dry_run,
            progress=display(quiet=quiet or as_json),
        )
        show(result, to=stdout, as_json=as_json)
