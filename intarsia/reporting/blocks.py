"""What a report page consists of, before it is HTML: plain data that the template lays out.

Every kind of run has one function that reads it into a `Subject`. Texts are plain, and the template escapes them; only
pictures are markup, made by this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with what it shows."""

    svg: Markup
    caption: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells as text, by column."""

    rows: Sequence[Mapping[str, str]]
    # The columns that hold no numbers.
    words: Sequence[str] = ()
    caption: str = ""
    # Shown on demand.
    folded: bool = False

    @property
    def columns(self) -> list[str]:
        """Every column of a row, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The puzzle picture at every depth of a ladder."""

    # Layers of the original.
    depth: int
    # By depth, the deepest first; the last one is shown first.
    pictures: Mapping[int, Markup]
    # What the page's script shows of the layer that is pointed at.
    data: Mapping[str, Any]
    # What is shown while no layer is pointed at.
    summary: str
    # Names of the variants, in the order of their colours, where there are several.
    members: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Written:
    """What models generate after one prompt."""

    prompt: str
    # By model: the text that both share, the token where they part, and the rest.
    answers: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How to make the same again: commands to copy, and facts by name."""

    commands: Sequence[str]
    facts: Sequence[tuple[str, str]]


Block: TypeAlias = Figure | Table | Pictures | Written | Origin


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
class Measured:
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

    title: str
    subtitle: str
    # The hash of the original's weights, empty where it is not known, and the original's name.
    base: tuple[str, str]
    tiles: Sequence[Tile] = ()
    # What a reader must know first.
    notes: Sequence[str] = ()
    # Sections without blocks are left out.
    sections: Sequence[Section] = ()
    # What can be compared with other runs.
    ladders: Sequence[Measured] = ()
    # The evaluation texts: a hash of the exact tokens, and the text in words.
    texts: Mapping[str, str] = field(default_factory=dict)
