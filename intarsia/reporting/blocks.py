"""What a report page consists of, before it is HTML: plain data that the template lays out.

Every kind of run has one function that reads it into a `Subject`; nothing in here knows what kinds there are. Texts
are plain and are escaped by the template; only pictures are markup, made by this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with what it shows."""

    svg: Markup
    caption: str
    kind: Literal["figure"] = "figure"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells as text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    # The columns that line up at the right.
    numbers: frozenset[int] = frozenset()
    # Shown on demand.
    folded: bool = False
    kind: Literal["table"] = "table"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and what belongs to them."""

    pairs: Sequence[tuple[str, str]]
    kind: Literal["facts"] = "facts"


@dataclass(frozen=True, kw_only=True)
class Code:
    """Something to copy."""

    text: str
    kind: Literal["code"] = "code"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """The puzzle picture at one depth."""

    layers: int
    svg: Markup


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The puzzle picture at every depth of a ladder."""

    # Layers of the original.
    depth: int
    # The depth that is shown first.
    chosen: int
    pictures: Sequence[Picture]
    # What the page's script shows of the layer that is pointed at.
    data: Mapping[str, Any]
    # What is shown while no layer is pointed at.
    summary: str
    # Names of the variants, in the order of their colours, where there are several.
    members: Sequence[str] = ()
    kind: Literal["pictures"] = "pictures"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What models generate after one prompt."""

    prompt: str
    # By model: the text that both share, the token where they part, and the rest.
    answers: Sequence[tuple[str, Sequence[str]]]
    kind: Literal["written"] = "written"


Block: TypeAlias = Figure | Table | Facts | Code | Pictures | Written


@dataclass(frozen=True, kw_only=True)
class Section:
    """Blocks under a heading, with a sentence on how to read them."""

    title: str
    blocks: Sequence[Block]
    intro: str = ""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number at the top of the page: what it was, what it is, and the change in words."""

    name: str
    now: str
    before: str = ""
    change: str = ""


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """A measure by depth, on one text. One chart shows those with the same measure and text."""

    name: str
    measure: str
    text: str
    # A hash of the exact tokens.
    text_key: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One run of a report."""

    path: Path
    title: str
    subtitle: str
    # The hash of the original's weights, empty where it is not known, and the original's name.
    base: tuple[str, str]
    tiles: Sequence[Tile] = ()
    # What a reader must know first.
    notes: Sequence[str] = ()
    sections: Sequence[Section] = ()
    # What can be compared with other runs.
    ladders: Sequence[Ladder] = ()
    # The evaluation texts: a hash of the exact tokens, and the text in words.
    texts: Mapping[str, str] = field(default_factory=dict)


def table(rows: Sequence[Mapping[str, str]], *, text_columns: Sequence[str] = (), **how: Any) -> Table:
    """Return a table of rows; every column but `text_columns` holds numbers."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return Table(
        columns=columns,
        rows=[[row.get(name, "") for name in columns] for row in rows],
        numbers=frozenset(index for index, name in enumerate(columns) if name not in text_columns),
        **how,
    )
