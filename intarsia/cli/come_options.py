"""Flags of the planner CoMe; some of them hold for other planners too, as their help says."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

_COME = "CoMe"

SpanChoice = Annotated[
    Literal["sbi", "sleb"],
    typer.Option(
        help="Merge where the block influence is least, or where skipping costs least.", rich_help_panel=_COME
    ),
]
MergeCount = Annotated[int, typer.Option("--merge", metavar="M", help="Layers merged at once.", rich_help_panel=_COME)]
Sharpness = Annotated[float, typer.Option(help="Shares follow block influence to this power.", rich_help_panel=_COME)]
Dominance = Annotated[
    float | None,
    typer.Option(
        help="Least share of the strongest of n layers: this to the power 1/(n-1).",
        show_default=False,
        rich_help_panel=_COME,
    ),
]
NoRepeat = Annotated[bool, typer.Option("--no-repeat", help="Never merge a merged layer.", rich_help_panel=_COME)]
NormChoice = Annotated[
    Literal["fold", "average"],
    typer.Option(
        "--norm",
        help="Fold norms into the rows that read them (exact), or average them (as published).",
        rich_help_panel=_COME,
    ),
]
Sensitivity = Annotated[
    Literal["mean-abs", "l2"], typer.Option(help="Activation norm of channel scores.", rich_help_panel=_COME)
]
Distance = Annotated[
    Literal["all-tokens", "last-token"], typer.Option(help="Tokens of the span influence.", rich_help_panel=_COME)
]
Granularity = Annotated[int, typer.Option(help="come-p: steps of the ratio between 0 and 1.", rich_help_panel=_COME)]
Spans = Annotated[
    int,
    typer.Option(metavar="K", help="come-p: try the ratios of the K spans of least influence.", rich_help_panel=_COME),
]
Removals = Annotated[
    bool,
    typer.Option(help="come-p: also try to drop each layer, as sleb does.", rich_help_panel=_COME),
]
Finalists = Annotated[
    int,
    typer.Option(
        metavar="K",
        help="come-p with --heal-in-loop: repair the K best candidates of each step before one is chosen.",
        rich_help_panel=_COME,
    ),
]
Blocks = Annotated[
    int,
    typer.Option(
        metavar="K",
        help="come-p with --heal-in-loop: also repair the original without a block of layers, of the K best blocks.",
        rich_help_panel=_COME,
    ),
]
Thorough = Annotated[
    bool,
    typer.Option(
        "--thorough",
        help="come-p: what gives the best repaired models, slowly: --heal-in-loop --spans 5 --granularity 5 --removals "
        "--finalists 4 --blocks 5. Any of these can be given besides.",
        rich_help_panel=_COME,
    ),
]
Racing = Annotated[
    bool,
    typer.Option(
        help="come-p, sleb: give a candidate up as soon as it is clearly worse on part of the text.",
        rich_help_panel=_COME,
    ),
]
Reference = Annotated[
    bool,
    typer.Option(
        "--reference",
        help="come, come-p, laco: published behaviour where ours differs, except the grouped-query mistake.",
        rich_help_panel=_COME,
    ),
]
Combine = Annotated[
    Literal["concat", "weight-sum", "fuse"],
    typer.Option(
        help="Join pieces of the layers; or, as ablations, add whole layers up by share, or add the pieces that are "
        "left out onto those that are kept.",
        rich_help_panel=_COME,
    ),
]
