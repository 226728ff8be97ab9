"""Text files as people have them, opened as plain UTF-8.

Compressed files, JSON arrays, and UTF-16 and UTF-32 with a byte-order mark are turned into a temporary file first.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast

from intarsia.errors import UserError

Kind: TypeAlias = Literal["text", "jsonl", "parquet", "folder", "hub"]

_KINDS: dict[str, Kind] = {
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
}
ACCEPTED = (
    "a .txt, .jsonl, .json or .parquet file (the first three also with .gz, .bz2 or .xz), a folder of such files, "
    "hub:DATASET[/CONFIG]:SPLIT[:COLUMN], or self"
)
_COMPRESSED: dict[bytes, tuple[str, Callable[..., Any]]] = {
    b"\x1f\x8b": (".gz", gzip.open),
    b"BZh": (".bz2", bz2.open),
    b"\xfd7zXZ\x00": (".xz", lzma.open),
}
# UTF-32 first: its little-endian mark starts with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UNPACK = "Unpack it, and pass the folder."
_EXTRACT = "Extract its text to a .txt file."
_COLUMN = 'Write its text column as JSON lines: one {"text": ...} a line.'
_REMEDIES = {
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), _UNPACK),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".html"), _EXTRACT),
    **dict.fromkeys((".csv", ".tsv", ".xlsx", ".arrow", ".feather"), _COLUMN),
    ".zst": "Decompress it: zstd -d FILE.",
}
_SIGNS = (
    (b"PK\x03\x04", "a ZIP archive, or an office document", _UNPACK),
    (b"%PDF", "a PDF document", _EXTRACT),
    (b"PAR1", "a Parquet file", "Give it the suffix .parquet."),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", _REMEDIES[".zst"]),
)
_HEAD = 4096


def kind_of(path: Path) -> Kind | None:
    """What a file is by its name, apart from compression; None if it is no text that can be read."""
    suffix, compressed = path.suffix.lower(), False
    if suffix in (name for name, _ in _COMPRESSED.values()):
        suffix, compressed = Path(path.stem).suffix.lower(), True
    kind = _KINDS.get(suffix)
    return None if compressed and kind == "parquet" else kind


def remedy_for(path: Path) -> str:
    """What to do with a file of another kind."""
    return _REMEDIES.get(path.suffix.lower(), f"Pass {ACCEPTED}.")


def files_in(folder: Path) -> tuple[list[Path], int]:
    """The text files below a folder in the order of their names, and how many other files there are."""
    found: list[Path] = []
    others = 0
    for inner, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(inner) / name for name in sorted(names) if not name.startswith(".")):
            if kind_of(path) is None:
                others += 1
            else:
                found.append(path)
    return found, others


def open_plain(path: Path, *, where: str) -> BinaryIO:
    """A file of text or JSON as UTF-8: running text, or one JSON record a line.

    Args:
        where: what the file is called in errors.

    Raises:
        UserError: it is a file of another kind, in no known encoding, or damaged.
    """
    with ExitStack() as stack:
        raw = stack.enter_context(path.open("rb"))
        stream = cast("BinaryIO", raw)
        opener = next((opener for sign, (_, opener) in _COMPRESSED.items() if _head(raw, len(sign)) == sign), None)
        try:
            if opener is not None:
                stream = opener(raw)
            head = _head(stream, _HEAD)
            encoding = next((name for mark, name in _MARKS if head.startswith(mark)), None)
            if encoding is None:
                _refuse_binary(head, path, where)
            array = ".json" in (suffix.lower() for suffix in path.suffixes[-2:])
            if opener is None and encoding is None and not array:
                stack.pop_all()
                return raw
            plain = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115  (the caller closes it)
            if encoding is None:
                shutil.copyfileobj(stream, plain)
            else:
                text = io.TextIOWrapper(stream, encoding=encoding, newline="")
                while chunk := text.read(1 << 20):
                    plain.write(chunk.encode())
            return _records_of(plain, where) if array else plain
        except UnicodeError as error:
            raise _wrong(
                where, f"text in {encoding}, as its byte-order mark says", str(error), "Save it again."
            ) from None
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the file's content
                raise
            raise _wrong(where, "a whole compressed file", str(error), "Get this file again.") from None


def _head(stream: BinaryIO, size: int) -> bytes:
    found = stream.read(size)
    stream.seek(0)
    return found


def _refuse_binary(head: bytes, path: Path, where: str) -> None:
    for sign, found, remedy in _SIGNS:
        if head.startswith(sign):
            raise _wrong(where, "text", found, remedy)
    if b"\0" in head:
        order = "LE" if head[1::2].count(0) > head[::2].count(0) else "BE"
        raise _wrong(
            where,
            "UTF-8 text",
            "bytes of zero: UTF-16 without a byte-order mark, or no text",
            f"If it is UTF-16, convert it: iconv -f UTF-16{order} -t UTF-8 {path.name}.",
        )


def _records_of(plain: BinaryIO, where: str) -> BinaryIO:
    """A JSON file as one record a line: an array, an object with one array, one record, or JSON lines already."""
    plain.seek(0)
    data = plain.read()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        if data.lstrip().startswith(b"{") and b"\n" in data.strip():
            return plain  # JSON lines under another name; the reader names the line if one is wrong
        raise _wrong(where, "a JSON array of records, or JSON lines", str(error), "Correct the file.") from None
    if isinstance(value, dict) and not any(name in value for name in ("messages", "conversations")):
        arrays = [each for each in value.values() if isinstance(each, list)]
        value = arrays[0] if len(arrays) == 1 and not any(isinstance(each, str) for each in value.values()) else [value]
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise _wrong(where, "a JSON array of records", repr(value)[:60], "Write an array of records with text.")
    lines = (json.dumps({"text": each} if isinstance(each, str) else each) for each in value)
    plain.seek(0)
    plain.truncate()
    for line in lines:
        plain.write(f"{line}\n".encode())
    return plain


def _wrong(where: str, expected: str, found: str, remedy: str) -> UserError:
    return UserError(f"text source {where}: expected {expected}; found {found}.", remedy)
