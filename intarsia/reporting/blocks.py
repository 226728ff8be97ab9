"""What a report page consists of, before it is HTML: plain data that the template lays out.

Every kind of run has one function that reads it into a `Subject`; nothing in here knows what kinds there are. Texts
are plain and are escaped by the template; only pictures are markup, made by this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with what it shows. `wide` ones take the whole width."""

    svg: str
    caption: str
    wide: bool = False
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of written cells. `numbers` are the columns that line up at the right; `folded` ones open on demand."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numbers: frozenset[int] = frozenset()
    folded: bool = False
    kind: Literal["table"] = "table"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and what belongs to them."""

    pairs: Sequence[tuple[str, str]]
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True, kw_only=True)
class Note:
    """A sentence that must not be overlooked."""

    text: str
    kind: Literal["note"] = "note"


@dataclass(frozen=True, kw_only=True)
class Code:
    """Something to copy."""

    text: str
    kind: Literal["code"] = "code"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """The puzzle picture at one depth."""

    layers: int
    svg: str


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The puzzle picture at every depth of a ladder, and what is told of the layer that is pointed at (`data`).

    `summary` is told while no layer is.
    """

    name: str
    depth: int
    chosen: int
    pictures: Sequence[Picture]
    data: Mapping[str, Any]
    summary: str
    kind: Literal["pictures"] = "pictures"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What models write after one prompt."""

    prompt: str
    answers: Sequence[tuple[str, str]]
    kind: Literal["written"] = "written"


Block: TypeAlias = Figure | Table | Facts | Note | Code | Pictures | Written


@dataclass(frozen=True, kw_only=True)
class Section:
    """Blocks under a heading, with a sentence on how to read them."""

    title: str
    blocks: Sequence[Block]
    intro: str = ""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number that is seen first: what it was, what it is, and the change in words."""

    name: str
    now: str
    before: str = ""
    change: str = ""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """A measure by depth, on one text: what may stand in one chart has the same `text_key` and `measure`."""

    name: str
    measure: str
    text: str
    text_key: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One run of a report.

    Attributes:
        base: the hash of the original's weights, where it is known, and what it is called.
        ladders: what can be laid beside other runs.
        texts: what it was judged on: a key for the exact tokens, and the text in words.
        notes: what a reader must know first.
    """

    path: Path
    title: str
    subtitle: str
    base: tuple[str, str]
    tiles: Sequence[Tile] = ()
    notes: Sequence[str] = ()
    sections: Sequence[Section] = ()
    ladders: Sequence[Ladder] = ()
    texts: Mapping[str, str] = field(default_factory=dict)


def table(rows: Sequence[Mapping[str, str]], *, text_columns: Sequence[str] = (), **how: Any) -> Table:
    """A table from written rows; every column but `text_columns` holds numbers."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Table(
        columns=columns,
        rows=[[row.get(name, "") for name in columns] for row in rows],
        numbers=frozenset(index for index, name in enumerate(columns) if name not in text_columns),
        **how,
    )
