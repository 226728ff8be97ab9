"""The blocks of a report page: plain data for the template.

Each kind of run has a function that reads it into a `Subject`. Texts are plain, and the template escapes them; only
pictures of this package are markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from markupsafe import Markup


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells as text, by column."""

    rows: Sequence[Mapping[str, str]]
    # Columns without numbers.
    words: Sequence[str] = ()
    caption: str = ""
    # Whether it is collapsed at first.
    folded: bool = False

    @property
    def columns(self) -> list[str]:
        """Every column of a row, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The puzzle picture at every depth of a ladder."""

    # Number of layers of the original.
    depth: int
    # Pictures by depth, deepest first; the page opens with the last one.
    pictures: Mapping[int, Markup]
    # Data of layers for the page's script.
    data: Mapping[str, Any]
    # Text shown while no layer is selected.
    summary: str
    # Names of the variants, in the order of their colours, if there are several.
    members: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Written:
    """The answers of models to one prompt."""

    prompt: str
    # By model: the shared text, the first differing token, and the rest.
    answers: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How to reproduce a result: commands to copy, and facts by name."""

    commands: Sequence[str]
    facts: Sequence[tuple[str, str]]


Block: TypeAlias = Figure | Table | Pictures | Written | Origin


@dataclass(frozen=True, kw_only=True)
class Section:
    """Blocks under a heading, with a sentence that explains them."""

    title: str
    blocks: Sequence[Block]
    intro: str = ""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number at the top of the page: its old and new value, and the change in words."""

    name: str
    now: str
    before: str = ""
    change: str = ""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measure by depth, on one text. Those with the same measure and text share a chart."""

    name: str
    measure: str
    text: str
    # Hash of the tokens.
    text_key: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One run of a report."""

    title: str
    subtitle: str
    # The hash of the original's weights, empty if unknown, and the original's name.
    base: tuple[str, str]
    tiles: Sequence[Tile] = ()
    # Important notes for the reader.
    notes: Sequence[str] = ()
    # Sections; those without blocks are omitted.
    sections: Sequence[Section] = ()
    # Measures that are comparable with other runs.
    ladders: Sequence[Measured] = ()
    # The evaluation texts: the hash of the tokens, and the text in words.
    texts: Mapping[str, str] = field(default_factory=dict)
