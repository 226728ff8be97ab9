from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from intarsia.data.sources import documents, parse
from intarsia.data.text import _names
from intarsia.errors import UserError


def _write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def _jsonl(path: Path, records: list[Any]) -> str:
    return _write(path, "".join(json.dumps(record) + "\n" for record in records))


def _parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=10)
    return str(path)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert list(documents(_write(tmp_path / "a.txt", "\ufeffone\r\ntwo\rthree\n"))) == ["one\ntwo\nthree\n"]


@pytest.mark.parametrize(
    ("records", "option", "expected"),
    [
        ([{"text": "a", "title": "x"}, {"text": "b", "title": "y"}], "", ["a", "b"]),
        ([{"body": "a", "id": 1}, {"body": " ", "id": 2}, {"body": None, "id": 3}], "", ["a"]),
        ([{"text": "a", "title": "x"}], "#column=title", ["x"]),
    ],
)
def test_jsonl(tmp_path: Path, records: list[Any], option: str, expected: list[str]) -> None:
    assert list(documents(_jsonl(tmp_path / "a.jsonl", records) + option)) == expected


def test_parquet(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", {"text": [f"t{i}" for i in range(50)], "n": list(range(50))})
    assert list(documents(path)) == [f"t{i}" for i in range(50)]
    assert list(documents(path + "#0.9:1")) == [f"t{i}" for i in range(45, 50)]
    sampled = list(documents(path, limit_bytes=300, seed=1))
    assert sampled == list(documents(path, limit_bytes=300, seed=1)) != list(documents(path, limit_bytes=300, seed=2))
    assert 0 < len(sampled) < 50
    with pytest.raises(UserError, match="a column 'body'; found the columns text, n"):
        list(documents(path + "#column=body"))


@pytest.mark.parametrize("cut", [0.1, 0.33, 0.5, 0.9])
def test_shares_are_disjoint_and_complete(tmp_path: Path, cut: float) -> None:
    lines = [f"line {i} ä\n" for i in range(100)]
    path = _write(tmp_path / "a.txt", "".join(lines))
    first, rest = (next(documents(f"{path}#{share}")) for share in (f"0:{cut}", f"{cut}:1"))
    assert first + rest == "".join(lines)
    assert first.endswith("\n")
    assert len(first) / len(first + rest) == pytest.approx(cut, abs=0.02)
    records = _jsonl(tmp_path / "a.jsonl", [{"text": line} for line in lines])
    assert [*documents(f"{records}#0:{cut}"), *documents(f"{records}#column=text&{cut}:1")] == lines


def test_a_large_file_is_sampled_all_over(tmp_path: Path) -> None:
    lines = [f"line {i:07}\n" for i in range(200_000)]
    path = _write(tmp_path / "a.txt", "".join(lines))
    parts = list(documents(path, limit_bytes=2**20, seed=3))
    read = [line for part in parts for line in part.splitlines(keepends=True)]
    assert len(parts) == 4
    assert set(read) < set(lines) and len(set(read)) == len(read)  # whole lines, none twice
    assert int(read[0][5:]) < 60_000 and int(read[-1][5:]) > 140_000
    assert parts == list(documents(path, limit_bytes=2**20, seed=3))
    assert parts != list(documents(path, limit_bytes=2**20, seed=4))
    (head,) = documents(path, limit_bytes=1000)
    assert head.splitlines(keepends=True) == lines[: len(head) // 13] and 1000 <= len(head) < 1020


def test_running_text_without_line_ends_is_cut_between_characters(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "ä€😀" * 100_000)
    parts = list(documents(path, limit_bytes=2**19, seed=0))
    assert len(parts) == 2 and all(set(part) == set("ä€😀") for part in parts)
    assert set(next(documents(path + "#0.5:1"))) == set("ä€😀")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "", r"a\.txt: expected text; found none \(empty"),
        ("a.txt", " \n\n", "expected text; found none"),
        ("a.jsonl", "", "expected text; found none"),
        ("a.txt", b"abc\ndef\xe9gh", r"expected UTF-8 text; found byte 0xe9 at offset 7.*iconv"),
        ("a.jsonl", b'{"text": "\xff"}\n', "byte 0xff at offset 10"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl:2: expected a JSON object"),
        ("a.jsonl", '["a"]\n', r"a\.jsonl:1: expected a JSON object"),
        ("a.jsonl", "[" * 200_000, r"a\.jsonl:1: expected a JSON object"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"other": "a"}\n',
            r"a\.jsonl:3: expected a column 'text'; found the columns other",
        ),
        ("a.jsonl", '{"a": "x", "b": "y"}\n', "string columns a, b.*#column=NAME"),
        ("a.jsonl", '{"a": 1}\n', "no string column"),
        ("a.jsonl", '{"text": ["a"]}\n', "no string column"),
        ("a.jsonl", '{"text": "a"}\n{"text": ["a"]}\n', "text in column 'text'; found a list"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "lone surrogate"),
        ("a.parquet", "text", "expected a Parquet file"),
        ("a.csv", "text", r"the suffix '\.csv'.*Write its text column as JSON lines"),
        ("a.pdf", "text", r"the suffix '\.pdf'.*Extract its text"),
        ("a.txt.zst", "text", r"the suffix '\.zst'.*zstd -d"),
        ("a.txt", b"PK\x03\x04rest", "a ZIP archive.*Unpack it"),
        ("a.txt", b"%PDF-1.7 rest", "a PDF document.*Extract"),
        ("a.jsonl", b"PAR1rest", "a Parquet file.*the suffix .parquet"),
        ("a.txt", "roti".encode("utf-16-le"), "UTF-16 without a byte-order mark.*iconv -f UTF-16LE"),
        ("a.jsonl", '{"text": "roti"}'.encode("utf-16-be"), "UTF-16 without a byte-order mark.*iconv -f UTF-16BE"),
        ("a.txt", "roti".encode("utf-16")[:-1], "text in utf-16, by its byte-order mark"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:40],
            "a complete compressed file.*Download this file again",
        ),
        ("a.jsonl.gz", gzip.compress(b"roti", mtime=0), "a.jsonl.gz:1: expected a JSON object"),
        ("a.json", '[{"text": "a"}', "a JSON array of records, or JSON lines"),
        ("a.json", "3", "a JSON array of records"),
        ("a.json", "[]", "expected text; found none"),
        ("a.json", "[[1]]", "expected a JSON object"),
        ("noname", "text", "expected a .txt, .jsonl, .json or .parquet file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, data: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(documents(_write(tmp_path / name, data)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.txt", "an existing file; found none"),
        ("folder.txt", "a folder with text files; found none"),
        ("a.txt#0.5", "a share START:END"),
        ("a.txt#0.9:0.1", "a share START:END"),
        ("a.txt#0:nan", "a share START:END"),
        ("a.txt#column=x", "no column for a text file"),
        ("hub:name", "hub:DATASET"),
        ("hub:name:split:", "hub:DATASET"),
        ("", "expected a .txt"),
    ],
)
def test_bad_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("abc\n")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match=message):
        list(documents(spec))


RECORDS = [{"text": "eins ä€😀"}, {"text": "zwei"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("pack", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_encodings_and_compression(encoding: str, pack: str, suffix: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding.endswith("be") else ""
    pretty = json.dumps(RECORDS, indent=1, ensure_ascii=False)
    data = (mark + {".txt": LINES, ".jsonl": LINES, ".json": pretty}[suffix]).encode(encoding)
    squeeze = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[pack]
    path = _write(tmp_path / f"a{suffix}{pack}", squeeze(data))
    wanted = [LINES] if suffix == ".txt" else [record["text"] for record in RECORDS]
    assert list(documents(path)) == wanted
    if suffix == ".jsonl":
        assert [*documents(f"{path}#0:0.3"), *documents(f"{path}#0.3:1")] == wanted


@pytest.mark.parametrize(
    "data",
    [
        json.dumps([record["text"] for record in RECORDS]),
        json.dumps({"version": 2, "data": RECORDS}, indent=1),
        LINES,
    ],
)
def test_json_in_other_forms(data: str, tmp_path: Path) -> None:
    assert list(documents(_write(tmp_path / "a.json", data))) == [record["text"] for record in RECORDS]


def test_a_folder_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    _write(folder / "b.txt", "b")
    _write(folder / "a.jsonl.gz", gzip.compress(LINES.encode()))
    _write(folder / "more" / "c.md", "c".encode("utf-16"))
    for name in ("image.png", ".hidden/d.txt", ".d.txt"):
        _write(folder / name, "not this")
    assert list(documents(str(folder))) == [*(record["text"] for record in RECORDS), "b", "c"]
    _write(folder / "b.txt", "line\n" * 100_000)
    assert 2**18 < sum(map(len, documents(f"{folder}#0:1", limit_bytes=2**18, seed=1))) + 2**12 < 2**19
    assert _names([str(folder)]) == [str(folder)]


def test_a_file_whose_name_holds_a_number_sign(tmp_path: Path) -> None:
    assert list(documents(_write(tmp_path / "c#.txt", "abc"))) == ["abc"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("hub:wikitext:test:text", ("wikitext", None, "test", "text")),
        ("hub:org/name:train:body", ("org/name", None, "train", "body")),
        ("hub:org/name/config:train:body", ("org/name", "config", "train", "body")),
    ],
)
def test_hub_specs(spec: str, expected: tuple[str | None, ...]) -> None:
    source = parse(spec)
    assert (source.dataset, source.config, source.split, source.column) == expected


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    folder.mkdir()
    _jsonl(folder / "train.jsonl", [{"body": f"t{i}", "n": i} for i in range(40)])
    return str(folder)


def test_a_local_folder_through_datasets(hub_folder: str) -> None:
    assert list(documents(f"hub:{hub_folder}:train:body")) == [f"t{i}" for i in range(40)]
    assert list(documents(f"hub:{hub_folder}:train:body", limit_bytes=4)) == ["t0", "t1"]
    shuffled = list(documents(f"hub:{hub_folder}:train:body", seed=1))
    assert shuffled != [f"t{i}" for i in range(40)] and len(set(shuffled)) == 40
    assert shuffled == list(documents(f"hub:{hub_folder}:train:body", seed=1))


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("train:text", "a column 'text'; found the columns body, n"),
        ("train:n", "text in column 'n'; found a int"),
        ("dev:body", "a readable data set; found ValueError.*or give a local text file"),
    ],
)
def test_a_local_folder_that_does_not_fit(hub_folder: str, tail: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(documents(f"hub:{hub_folder}:{tail}"))


@pytest.mark.parametrize("when", ["at once", "on the way"])
def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*args: Any, **kwargs: Any) -> Any:
        if when == "at once":
            raise ConnectionError("Couldn't reach 'org/name' on the Hub")

        def rows() -> Any:
            yield {"text": "a"}
            raise RuntimeError("Cannot send a request")

        return rows()

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError, match=r"hub:org/name:train:text: expected a readable data set.*give a local text file, or `self`"
    ):
        list(documents("hub:org/name:train:text"))
