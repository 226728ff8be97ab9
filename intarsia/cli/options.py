"""Arguments and flags that several verbs share, so that they have one name and one meaning."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from intarsia.planning.settings import Settings

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local folder, a GGUF file, a hub id, or `demo`.", show_default=False)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the new model.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
Layers = Annotated[int | None, typer.Option(metavar="N", help="How many layers to keep.", show_default=False)]
Sparsity = Annotated[
    float | None,
    typer.Option(
        metavar="S",
        help="Share of all parameters to remove, between 0 and 1: the greatest depth that removes at least that much.",
        show_default=False,
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... (default: the best there is)")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32 (default: the checkpoint's own)")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")]
AsJson = Annotated[bool, typer.Option("--json", help="The result as one JSON object on stdout; no progress display.")]

Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize",
        help="Read weights of 8 bits (FP8 with scales) as ordinary ones. Other quantised models are refused.",
    ),
]
GgufFile = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Which GGUF file of a folder or hub model to read.", show_default=False),
]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Size of a weight file at most.")]

# Where the result goes
_HUB = "HuggingFace hub"
PushToHub = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Send the result there when it is complete: `name` or `owner/name`.",
        show_default=False,
        rich_help_panel=_HUB,
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.", rich_help_panel=_HUB)]

# Planning
_PLANNING, _COME, _LACO = "Calibration and cost", "CoMe", "LaCo"
Method = Annotated[
    str,
    typer.Option(
        help="How to choose: come, come-p, or a baseline: shortgpt, sleb, taylor, taylor+, magnitude, magnitude+, mka, "
        "laco, angular, reverse."
    ),
]
Calibration = Annotated[
    list[str],
    typer.Option(
        metavar="SPEC",
        help="Calibration text: a .txt, .jsonl or .parquet file, hub:DATASET:SPLIT:COLUMN (for a dataset with "
        "configurations hub:DATASET/CONFIG:SPLIT:COLUMN), or `self`: the model writes it. `file.txt#0:0.9` is the "
        "first nine tenths of a file. Several (comma separated, or given again) take equal parts.",
        rich_help_panel=_PLANNING,
    ),
]
Tokens = Annotated[int, typer.Option(help="Calibration tokens.", rich_help_panel=_PLANNING)]
SeqLen = Annotated[int, typer.Option(help="Tokens in a sequence.", rich_help_panel=_PLANNING)]
BatchTokens = Annotated[
    int | None, typer.Option(help="Tokens in a batch (default: by memory).", rich_help_panel=_PLANNING)
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", rich_help_panel=_PLANNING)]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print the plan, its cost and the memory it needs; do nothing.", rich_help_panel=_PLANNING
    ),
]

HealInLoop = Annotated[
    bool,
    typer.Option(
        "--heal-in-loop",
        help="Repair what each step changes in closed form, so that the next one sees the repaired model "
        "(come, come-p, sleb, laco).",
        rich_help_panel=_PLANNING,
    ),
]

# Larger than memory
_LARGE = "Models larger than memory"
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Keep one layer in memory at a time, read from the files when it is needed: same result, less memory.",
        rich_help_panel=_LARGE,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What hidden states may take in memory, such as 8GB; the rest goes to files in the run folder (default: "
        "two fifths of what is free).",
        show_default=False,
        rich_help_panel=_LARGE,
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Lay the layers over several devices, such as cuda:0,cuda:1; the first has embedding and head.",
        show_default=False,
        rich_help_panel=_LARGE,
    ),
]

Shape = Annotated[
    list[str],
    typer.Option(
        metavar="NAME",
        help="With --dry-run and without a model: the cost on paper for a well-known shape (llama-2-7b, llama-3-70b "
        "...) or a config.json; may be given again.",
        show_default=False,
        rich_help_panel=_LARGE,
    ),
]
DeviceMemory = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="With --shape: the memory of devices, such as 24GB,80GB.",
        rich_help_panel=_LARGE,
    ),
]

SpanChoice = Annotated[
    Literal["sbi", "sleb", "reconstruction"],
    typer.Option(
        help="Merge where the block influence is least, where skipping costs least, or where a closed-form fit comes "
        "closest to the original.",
        rich_help_panel=_COME,
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
Racing = Annotated[
    bool,
    typer.Option(
        help="come-p, sleb: give a candidate up as soon as it is clearly worse on part of the text.",
        rich_help_panel=_COME,
    ),
]
Beam = Annotated[
    int,
    typer.Option(
        metavar="N", help="come-p: follow the N best paths at once, at N times the cost.", rich_help_panel=_COME
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

LacoMerge = Annotated[int, typer.Option(metavar="C", help="Layers that become one.", rich_help_panel=_LACO)]
LacoThreshold = Annotated[
    float,
    typer.Option(help="Least similarity of final hidden states; lowered where it must be.", rich_help_panel=_LACO),
]
LacoInterval = Annotated[int, typer.Option(help="Layers to go on after a merge.", rich_help_panel=_LACO)]
LacoLowest = Annotated[int, typer.Option(help="First layer that others may collapse into.", rich_help_panel=_LACO)]
LacoHighest = Annotated[
    int | None,
    typer.Option(help="Merge within the first so many layers.", show_default=False, rich_help_panel=_LACO),
]


def planner_settings(context: typer.Context) -> Settings:
    """The settings of the chosen method, from the options of the same names.

    Imported here, because `--help` must not wait for what a planner needs.
    """
    from intarsia.planning.settings import ComeSettings, LacoSettings, SlebSettings

    given = context.params
    if given["method"] == "laco":
        names = [field.name for field in fields(LacoSettings) if field.name != "reference"]
        return LacoSettings(reference=given["reference"], **{name: given[f"laco_{name}"] for name in names})
    if given["method"] == "sleb":
        return SlebSettings(racing=given["racing"])
    return ComeSettings(**{field.name: given[field.name] for field in fields(ComeSettings)})
