"""`SHA256SUMS`: the hashes of a model folder's files, in the form that `sha256sum -c` reads.

Everything that decides what the model does is listed. The model card, the picture and the report are not: people and
later stages edit them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

from intarsia.errors import Problem, UserError

SUMS_FILE = "SHA256SUMS"
_DOCUMENTS = ("README.md", "*.html", "*.svg", "*.png", ".*", SUMS_FILE)
_BLOCK = 2**22


def sha256_of(file: Path, advance: Callable[[int], None] | None = None) -> str:
    """The sha256 (hex) of a file; `advance` is told the bytes as they are read."""
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total.update(block)
            if advance is not None:
                advance(len(block))
    return total.hexdigest()


def listed_files(folder: Path) -> Iterator[Path]:
    """The files of a model folder that its sums list, in the order of their names."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not any(fnmatch(file.name, pattern) for pattern in _DOCUMENTS):
            yield file


def write_sums(folder: Path, known: Mapping[str, str]) -> None:
    """Write the sums of a folder that is complete but for them; `known` are those of files hashed while written."""
    lines = []
    for file in listed_files(folder):
        name = file.relative_to(folder).as_posix()
        lines.append(f"{known.get(name) or sha256_of(file)}  {name}\n")
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str] | None:
    """The listed hashes by file name; None where a folder has no list.

    Raises:
        UserError: the list is no such list, or names files outside the folder.
    """
    file = folder / SUMS_FILE
    if not file.is_file():
        return None
    found: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        digest, _, name = line.partition("  ")
        path = Path(name)
        hexadecimal = len(digest) == 64 and not digest.strip("0123456789abcdef")
        if not hexadecimal or not name or path.is_absolute() or ".." in path.parts:
            raise UserError.of(
                where=f"{file}: line {number}",
                expected="a sha256, two spaces and the name of a file in this folder",
                found=repr(line[:120]),
                remedy=f"Get {SUMS_FILE} again.",
            )
        found[name] = digest
    return found


def differing(folder: Path, sums: Mapping[str, str], advance: Callable[[int], None] | None = None) -> list[Problem]:
    """What in a folder is not as its sums say: files that are gone, changed, or weights that are not listed."""
    problems = []
    for name, digest in sums.items():
        file = folder / name
        found = sha256_of(file, advance) if file.is_file() else "no such file"
        if found != digest:
            problems.append(
                Problem(
                    where=str(file), expected=f"sha256 {digest}", found=found, remedy="Get or build the folder again."
                )
            )
    there = {file.relative_to(folder).as_posix() for file in listed_files(folder)}
    problems += [
        Problem(
            where=str(folder / name),
            expected=f"only weights that {SUMS_FILE} lists",
            found="a file that it does not list",
            remedy="Remove the file, or build the folder again.",
        )
        for name in sorted(there - sums.keys())
        if name.endswith(".safetensors")
    ]
    return problems
