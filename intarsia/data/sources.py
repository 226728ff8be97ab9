"""Text sources: their names, and readers for each kind (text, JSON lines, Parquet, folders, data sets).

A reader yields texts, or conversations for rows of messages. Compressed files, JSON arrays, and UTF-16 and UTF-32 with
a byte-order mark are first converted to a temporary file of plain UTF-8.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast

from intarsia.data.conversations import Columns, Conversation, missing_column, row_error
from intarsia.progress import current

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
_UNPACK = "Unpack it, and give the folder."
_EXTRACT = "Extract its text to a .txt file."
_COLUMN = 'Write its text column as JSON lines: one {"text": ...} per line.'
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
Document: TypeAlias = str | Conversation
Rows: TypeAlias = Iterable[tuple[str, dict[str, Any]]]
"""Rows of a data set, each with its place for errors."""
_MOST_READ = 16 * 1024 * 1024  # bytes of one source that are tokenised (a few seconds), unless more is needed
_BYTES_A_TOKEN = 32  # generous
_BLOCK = 256 * 1024  # bytes of one sampled stretch of a large file
_LONGEST_LINE = 64 * 1024  # bytes of running text to search for a line end
_HUB_REMEDY = "Check the name and the connection (HF_HUB_OFFLINE, HF_TOKEN), or give a local text file, or `self`."


def kind_of(path: Path) -> Kind | None:
    """The kind of a file by its name, apart from compression; None if it is not readable text."""
    suffix, compressed = path.suffix.lower(), False
    if suffix in (name for name, _ in _COMPRESSED.values()):
        suffix, compressed = Path(path.stem).suffix.lower(), True
    kind = _KINDS.get(suffix)
    return None if compressed and kind == "parquet" else kind


def files_in(folder: Path) -> tuple[list[Path], int]:
    """The text files below a folder in the order of names, and the number of other files."""
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
    """Open a file of text or JSON as UTF-8: running text, or one JSON record per line.

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
            raise row_error(
                where, f"text in {encoding}, by its byte-order mark", str(error), "Save it again."
            ) from None
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # an error of the disk, not of the content
                raise
            raise row_error(where, "a complete compressed file", str(error), "Download this file again.") from None


def _head(stream: BinaryIO, size: int) -> bytes:
    found = stream.read(size)
    stream.seek(0)
    return found


def _refuse_binary(head: bytes, path: Path, where: str) -> None:
    for sign, found, remedy in _SIGNS:
        if head.startswith(sign):
            raise row_error(where, "text", found, remedy)
    if b"\0" in head:
        order = "LE" if head[1::2].count(0) > head[::2].count(0) else "BE"
        raise row_error(
            where,
            "UTF-8 text",
            "zero bytes: UTF-16 without a byte-order mark, or not text",
            f"If it is UTF-16, convert it: iconv -f UTF-16{order} -t UTF-8 {path.name}.",
        )


def _records_of(plain: BinaryIO, where: str) -> BinaryIO:
    """A JSON file as one record per line: an array, an object with one array, one record, or JSON lines already."""
    plain.seek(0)
    data = plain.read()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        if data.lstrip().startswith(b"{") and b"\n" in data.strip():
            return plain  # JSON lines under another name; the reader reports wrong lines
        raise row_error(where, "a JSON array of records, or JSON lines", str(error), "Correct the file.") from None
    if isinstance(value, dict) and not any(name in value for name in ("messages", "conversations")):
        arrays = [each for each in value.values() if isinstance(each, list)]
        value = arrays[0] if len(arrays) == 1 and not any(isinstance(each, str) for each in value.values()) else [value]
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise row_error(where, "a JSON array of records", repr(value)[:60], "Write an array of records with text.")
    lines = (json.dumps({"text": each} if isinstance(each, str) else each) for each in value)
    plain.seek(0)
    plain.truncate()
    for line in lines:
        plain.write(f"{line}\n".encode())
    return plain


@dataclass(frozen=True, kw_only=True)
class Source:
    """A parsed spec. `share` is the part of a file to read; a hub source has `dataset`, `config` and `split`."""

    spec: str
    kind: Kind
    path: Path = Path()
    share: tuple[float, float] = (0.0, 1.0)
    column: str | None = None
    dataset: str = ""
    config: str | None = None
    split: str = ""


def parse(spec: str) -> Source:
    """Parse a spec.

    Raises:
        UserError: the spec has no known form, or the file does not exist.
    """
    if spec.startswith("hub:"):
        return _parse_hub(spec)
    name, _, options = (spec, "", "") if Path(spec).exists() else spec.partition("#")
    path = Path(name)
    kind: Kind | None = "folder" if name and path.is_dir() else kind_of(path)
    if kind is None:
        found = f"the suffix {path.suffix!r}" if path.suffix else repr(spec)
        raise row_error(spec, ACCEPTED, found, _REMEDIES.get(path.suffix.lower(), f"Pass {ACCEPTED}."))
    if not path.exists():
        raise row_error(spec, "an existing file", "none", "Check the path.")
    share, column = (0.0, 1.0), None
    for option in filter(None, options.split("&")):
        if option.startswith("column="):
            column = option.removeprefix("column=")
        else:
            share = parse_share(option, where=spec)
    if column is not None and kind == "text":
        raise row_error(spec, "no column for a text file", f"column {column!r}", "Leave `column=` out.")
    return Source(spec=spec, kind=kind, path=path, share=share, column=column)


def parse_share(text: str, *, where: str) -> tuple[float, float]:
    """`0:0.9` as two numbers.

    Raises:
        UserError: they are not two ascending numbers in 0..1.
    """
    try:
        start, end = (float(number) for number in text.split(":"))
    except ValueError:
        start, end = 1.0, 0.0
    if not 0.0 <= start < end <= 1.0:
        raise row_error(where, "a share START:END with 0 <= START < END <= 1", repr(text), "Write it like 0:0.9.")
    return start, end


def _parse_hub(spec: str) -> Source:
    body = spec.removeprefix("hub:").rsplit(":", 2)
    if len(body) < 2 or not all(body):
        form = "hub:DATASET[/CONFIG]:SPLIT[:COLUMN]"
        raise row_error(spec, form, repr(spec), "For example hub:Salesforce/wikitext/wikitext-2-raw-v1:train:text")
    dataset, split = body[:2]
    column, config = body[2] if len(body) > 2 else None, None
    if not Path(dataset).is_dir() and dataset.count("/") >= 2:
        org, name, config = dataset.split("/", 2)
        dataset = f"{org}/{name}"
    return Source(spec=spec, kind="hub", dataset=dataset, config=config, split=split, column=column)


Reader: TypeAlias = Callable[[Source, int | None, int | None], Iterator[Document]]


def _stretches(source: Source, limit: int | None, seed: int | None) -> Iterator[tuple[int, bytes]]:
    """Stretches of whole lines of a file, each with its byte offset."""
    with open_plain(source.path, where=source.spec) as file:
        size = file.seek(0, os.SEEK_END)

        def line_start(at: int) -> int:
            if at <= 0 or at >= size:
                return min(max(at, 0), size)
            file.seek(at)
            # A record must be whole; running text without line ends may be split at any character.
            line = file.readline(_LONGEST_LINE if source.kind == "text" else -1)
            if not line.endswith(b"\n"):
                head = file.read(3)  # a character of UTF-8 has at most 3 further bytes
                rest = head.lstrip(bytes(range(0x80, 0xC0)))
                file.seek(-len(rest), 1)
            return file.tell()

        start, end = (line_start(int(size * share)) for share in source.share)
        if limit is None or end - start <= limit:
            wanted = [(start, end)]
        elif seed is None:
            wanted = [(start, min(line_start(start + limit), end))]
        else:
            # One stretch at a random place in each of many equal strata, so that they spread over the file without
            # overlap.
            count = max(1, limit // _BLOCK)
            stratum = (end - start) // count
            chance = random.Random(seed)
            places = [start + i * stratum + chance.randrange(max(1, stratum - _BLOCK)) for i in range(count)]
            wanted = [(line_start(at), min(line_start(at + _BLOCK), end)) for at in places]
        done = start
        for first, last in wanted:
            first = max(first, done)
            if first < last:
                file.seek(first)
                yield first, file.read(last - first)
                done = last


def _decode(source: Source, offset: int, data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise row_error(
            source.spec,
            "UTF-8 text",
            f"byte 0x{data[error.start]:02x} at offset {at}, which is not UTF-8",
            f"Convert the file: iconv -f LATIN1 -t UTF-8 {source.path.name} (replace LATIN1 by its encoding).",
        ) from None
    # Line breaks as in Python's text mode; models were not trained on carriage returns.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removeprefix("\ufeff") if offset == 0 else text


def _json_rows(source: Source, limit: int | None, seed: int | None) -> Rows:
    for offset, data in _stretches(source, limit, seed):
        for number, line in enumerate(_decode(source, offset, data).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{source.spec}:{number}" if offset == 0 else f"{source.spec}, line {number} from byte {offset}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise row_error(where, "a JSON object", f"{line[:60]!r} ({error})", "Correct this line.") from None
            if not isinstance(record, dict):
                raise row_error(where, "a JSON object", f"{line[:60]!r}", "Correct this line.")
            yield where, record


def _documents_of(
    source: Source, rows: Rows, *, columns: Columns | None = None, limit: int | None = None
) -> Iterator[Document]:
    """Rows as texts or conversations, up to about `limit` bytes; missing columns are detected in the first row."""
    given, empty = 0, True
    for where, record in rows:
        if columns is None:
            name = source.column
            columns = Columns.of_record(where, record) if name is None else Columns(question=name)
        document = columns.read(record, where)
        given += document.size if isinstance(document, Conversation) else len(document)
        empty = empty and not document
        yield document
        if limit is not None and given >= limit:
            return
    if empty and columns is not None and columns.answer is not None:
        column = columns.answer
        raise row_error(source.spec, f"answers in column {column!r}", "none", "Name another column: FILE#column=NAME")


def _read_folder(source: Source, limit: int | None, seed: int | None) -> Iterator[Document]:
    """All text files below a folder in the order of names, each by its share of the bytes."""
    files, others = files_in(source.path)
    if not files:
        raise row_error(source.spec, "a folder with text files", f"none ({others} of other kinds)", "Check the path.")
    if others:
        current().say(f"{source.path}: {len(files)} text files, ignoring {others} files of other kinds")
    total = max(1, sum(file.stat().st_size for file in files))
    for file in files:
        part = None if limit is None else max(1, limit * file.stat().st_size // total)
        kind = kind_of(file)
        assert kind is not None
        column = None if kind == "text" else source.column
        one = replace(source, spec=str(file), kind=kind, path=file, column=column)
        yield from READERS[kind](one, part, seed)


def _read_parquet(source: Source, limit: int | None, seed: int | None) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as file:
            kinds = {field.name: _kind(field.type) for field in file.schema_arrow}
            if source.column is not None and source.column not in kinds:
                raise missing_column(source.spec, source.column, list(kinds))
            columns = Columns.found(source.spec, kinds) if source.column is None else Columns(question=source.column)
            rows = _parquet_rows(file, source, columns, limit, seed)
            yield from _documents_of(source, rows, columns=columns, limit=limit if seed is None else None)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise row_error(source.spec, "a Parquet file", str(error).splitlines()[0], "Write the file again.") from None


def _parquet_rows(file: Any, source: Source, columns: Columns, limit: int | None, seed: int | None) -> Rows:
    total = file.metadata.num_rows
    first, last = (int(total * share) for share in source.share)
    kept = 1.0
    if limit is not None:  # about `limit` bytes of the text
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        kept = min(1.0, limit / max(1.0, size * (source.share[1] - source.share[0])))
    chance = None if seed is None else random.Random(seed)
    row = 0
    for batch in file.iter_batches(batch_size=1024, columns=columns.read_from(file.schema_arrow.names)):
        for record in batch.to_pylist():
            row += 1
            if first < row <= last and (chance is None or chance.random() < kept):
                yield f"{source.spec}, row {row}", record


def _kind(found: Any) -> str:
    """The kind of a Parquet column of this type, in the words of `Columns`."""
    import pyarrow as pa

    if found in (pa.string(), pa.large_string()):
        return "text"
    if pa.types.is_list(found) or pa.types.is_large_list(found):
        return "messages" if pa.types.is_struct(found.value_type) else str(found)
    return str(found)


def _hub_rows(source: Source, seed: int | None) -> Rows:
    import datasets

    try:
        data = datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=True)
        if seed is not None:
            data = data.shuffle(seed=seed, buffer_size=1000)
        for number, record in enumerate(data):
            yield f"{source.spec}, row {number}", record
    except Exception as error:
        # Unknown or gated names and network failures raise errors of `datasets`, of the hub's client and of its HTTP
        # library, which differ between versions; so catch all.
        found = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise row_error(source.spec, "a readable data set", found, _HUB_REMEDY) from error


READERS: Mapping[Kind, Reader] = {
    "text": lambda source, limit, seed: (_decode(source, *stretch) for stretch in _stretches(source, limit, seed)),
    "jsonl": lambda source, limit, seed: _documents_of(source, _json_rows(source, limit, seed)),
    "parquet": _read_parquet,
    "folder": _read_folder,
    "hub": lambda source, limit, seed: _documents_of(source, _hub_rows(source, seed), limit=limit),
}


def bytes_for(tokens: int) -> int:
    """How many bytes of a source are read for that many tokens, at most: enough, also where tokens are long."""
    return max(_MOST_READ, _BYTES_A_TOKEN * tokens)


def documents(spec: str, *, limit_bytes: int | None = None, seed: int | None = None) -> Iterator[Document]:
    """The texts or conversations of a source, in order, without empty ones.

    Args:
        spec: see `intarsia.data.sources`.
        limit_bytes: about how much to read of a larger source; None reads everything.
        seed: with a limit, sample across the source instead of reading its head. A hub data set is then shuffled by
            shards and through a buffer.

    Raises:
        UserError: the source cannot be used; raised when the problem is reached.
    """
    source = parse(spec)
    found = False
    for document in READERS[source.kind](source, limit_bytes, seed):
        if isinstance(document, Conversation) or document.strip():
            found = True
            yield document
    if not found:
        raise row_error(spec, "text", "none (empty, or only white space)", "Give a source with text.")
