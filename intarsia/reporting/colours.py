"""The colours of every picture, for a light and a dark background.

A picture names its colours as CSS variables, which the style sheet of the page defines. A picture in a file of its own
gets the light colours written out, with rules for a dark background.
"""

from __future__ import annotations

import re

from markupsafe import Markup

WOODS, HUES = 6, 12

PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#2b2520", "#ede5d9"),
    "soft": ("#6d665e", "#b3a899"),
    "rule": ("#8a7f72", "#8f8475"),
    "accent": ("#8f4a1d", "#e3a572"),
    # Woods of the puzzle picture: neighbours differ enough to tell pieces of adjacent layers apart.
    "w0": ("#d9a05b", "#dca766"),
    "w1": ("#7d4e27", "#9b6a3f"),
    "w2": ("#c4693a", "#d27c4b"),
    "w3": ("#4f3a2c", "#7a6250"),
    "w4": ("#e6c588", "#eed3a0"),
    "w5": ("#a4793f", "#b98f58"),
    # Series of a chart.
    "s0": ("#a63d1b", "#ef8157"),
    "s1": ("#1f6f78", "#58b8c2"),
    "s2": ("#b98a1d", "#e6bb55"),
    "s3": ("#5b4a9e", "#a797ec"),
    "s4": ("#5f8a3a", "#9bc873"),
    "s5": ("#b0487f", "#e58bbb"),
    "s6": ("#3f72b5", "#85b3ee"),
    "s7": ("#7d6a55", "#c0ab92"),
    "s8": ("#d07a3c", "#f2ab78"),
    "s9": ("#3c9a83", "#76cfb8"),
    "s10": ("#94792f", "#cdb268"),
    "s11": ("#8b8f96", "#b9bdc4"),
}


def variables() -> str:
    """The definition of every colour as a CSS variable."""
    light, dark = ("".join(f"--{name}:{pair[side]};" for name, pair in PALETTE.items()) for side in (0, 1))
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def standalone(svg: Markup) -> str:
    """Return a picture of the page as the text of an SVG file; programs that know no CSS variables can read it."""
    text = re.sub(r"var\(--(\w+)\)", lambda found: PALETTE[found[1]][0], str(svg))
    dark = "".join(
        f'[{attribute}="{PALETTE[name][0]}"]{{{attribute}:{PALETTE[name][1]}}}'
        for attribute, name in sorted(set(re.findall(r'(fill|stroke)="var\(--(\w+)\)"', svg)))
    )
    head, _, rest = text.partition(">")
    return f"{head}><style>@media (prefers-color-scheme:dark){{{dark}}}</style>{rest}\n"
