"""What names a text: `.txt`, `.jsonl` and `.parquet` files, and data sets through `datasets`.

A *spec* is one string:

- `notes.txt`: the whole file is one document (line ends of any kind become line feeds);
- `pages.jsonl`: one JSON object a line; the document is its field `text`, or its only string field;
- `pages.parquet`: the same with columns;
- `hub:DATASET[/CONFIG]:SPLIT:COLUMN`: a data set of the hub (`org/name`, `org/name/config` or `name`), or a local
  folder that `datasets` can load.

Behind a file's `#`, joined by `&`: a share of it (`notes.txt#0:0.9` is the first nine tenths) and the column
(`pages.jsonl#column=body&0.9:1`). Shares are of bytes, cut at the next line end, so that the parts on the two sides
of a cut share no line; of a parquet file, shares of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from intarsia.errors import UserError

_SUFFIXES: dict[str, Literal["text", "jsonl", "parquet"]] = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet"}
_KINDS = "a .txt, .jsonl or .parquet file, hub:DATASET[/CONFIG]:SPLIT:COLUMN, or self"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A parsed spec. `share` is the part of a file that is read; a hub source has `dataset`, `config` and `split`."""

    spec: str
    kind: Literal["text", "jsonl", "parquet", "hub"]
    path: Path = Path()
    share: tuple[float, float] = (0.0, 1.0)
    column: str | None = None
    dataset: str = ""
    config: str | None = None
    split: str = ""


def parse(spec: str) -> Source:
    """A spec taken apart.

    Raises:
        UserError: the spec has no known form, or the file does not exist.
    """
    if spec.startswith("hub:"):
        return _parse_hub(spec)
    name, _, options = (spec, "", "") if Path(spec).is_file() else spec.partition("#")
    path = Path(name)
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise source_error(
            spec, _KINDS, f"the suffix {path.suffix!r}" if path.suffix else repr(spec), f"Pass {_KINDS}."
        )
    if not path.is_file():
        raise source_error(
            spec, "an existing file", "a folder" if path.is_dir() else "nothing there", "Check the path."
        )
    share, column = (0.0, 1.0), None
    for option in filter(None, options.split("&")):
        if option.startswith("column="):
            column = option.removeprefix("column=")
        else:
            share = parse_share(option, where=spec)
    if column is not None and kind == "text":
        raise source_error(spec, "no column for a text file", f"column {column!r}", "Leave `column=` out.")
    return Source(spec=spec, kind=kind, path=path, share=share, column=column)


def parse_share(text: str, *, where: str) -> tuple[float, float]:
    """`0:0.9` as two numbers.

    Raises:
        UserError: not two rising numbers in 0..1.
    """
    try:
        start, end = (float(number) for number in text.split(":"))
    except ValueError:
        start, end = 1.0, 0.0
    if not 0.0 <= start < end <= 1.0:
        raise source_error(where, "a share START:END with 0 <= START < END <= 1", repr(text), "Write it like 0:0.9.")
    return start, end


def _parse_hub(spec: str) -> Source:
    body = spec.removeprefix("hub:").rsplit(":", 2)
    if len(body) != 3 or not all(body):
        form = "hub:DATASET[/CONFIG]:SPLIT:COLUMN"
        raise source_error(spec, form, repr(spec), "For example hub:Salesforce/wikitext/wikitext-2-raw-v1:train:text")
    dataset, split, column = body
    config = None
    if not Path(dataset).is_dir() and dataset.count("/") >= 2:
        org, name, config = dataset.split("/", 2)
        dataset = f"{org}/{name}"
    return Source(spec=spec, kind="hub", dataset=dataset, config=config, split=split, column=column)


def source_error(where: str, expected: str, found: str, remedy: str) -> UserError:
    """An error in a source."""
    return UserError.of(where=f"text source {where}", expected=expected, found=found, remedy=remedy)
