"""Arguments and flags that several verbs share, so that they have one name and one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def valued(metavar: str, help: str, *, panel: str | None = None, min: int | None = None) -> Any:
    """An option that takes a value, and has no default to show: what it is when it is left out, `help` says."""
    return typer.Option(metavar=metavar, help=help, show_default=False, rich_help_panel=panel, min=min)


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local folder, a GGUF file, a hub id, or `demo`.", show_default=False)
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the new model.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
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
GgufFile = Annotated[str | None, valued("NAME", "Which GGUF file of a folder or hub model to read.")]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Size of a weight file at most.")]

# Where the result goes
_HUB = "HuggingFace hub"
PushToHub = Annotated[
    str | None, valued("NAME", "Send the result there when it is complete: `name` or `owner/name`.", panel=_HUB)
]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.", rich_help_panel=_HUB)]

# Planning
_PLANNING = "Calibration and cost"
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
        "--dry-run",
        help="Print what it takes (weights, hidden states, passes over the text, disk); do nothing.",
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
    valued(
        "SIZE",
        "What hidden states may take in memory, such as 8GB; the rest goes to files in the run folder (default: "
        "two fifths of what is free).",
        panel=_LARGE,
    ),
]
