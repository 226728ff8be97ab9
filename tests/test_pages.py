"""Commands in the README and the documentation: every one of them is understood."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from intarsia.cli.main import find, function
from intarsia.cli.parse import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))))
FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(intarsia [a-z]+ [^`]+)`")


def commands(text: str) -> Iterator[list[str]]:
    """The words after `intarsia` of every command; of those in a sentence, where nothing is left open."""
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(found.split()) for found in INLINE.findall(text) if not re.search(r"\.\.\.|[|\[]", found)]
    for line in lines:
        words = shlex.split(re.sub(r"(?<= )N\b", "2", line), comments=True)
        while "intarsia" in words:
            words = words[words.index("intarsia") + 1 :]
            end = next((at for at, word in enumerate(words) if word.endswith((";", ">", "&&"))), len(words) - 1)
            yield [word.rstrip(";") for word in words[: end + 1] if word not in (">", "&&")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(page: str) -> None:
    for words in commands((ROOT / page).read_text(encoding="utf-8")):
        name, rest = find(words)
        if rest and not {"--help", "--plugin"} & {*rest}:  # a plugin is a file that there is
            parse(function(name), name, rest)


def test_commands_are_found() -> None:
    text = "```sh\nintarsia inspect OUT; intarsia verify OUT   # both\n```\n`intarsia plan M --layers N --run\nR`"
    assert list(commands(text)) == [
        ["inspect", "OUT"],
        ["verify", "OUT"],
        ["plan", "M", "--layers", "2", "--run", "R"],
    ]
