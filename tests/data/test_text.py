from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia import progress
from intarsia.data.corpus import Corpus
from intarsia.data.text import TextParts, draw
from intarsia.errors import UserError
from intarsia.options import TextSpec
from intarsia.progress import Display
from tests import families
from tests.data.letters import Letters, rows


def _draw(*sources: Path | str, n: int = 5, tokenizer: Any = None, seed: int = 0, **more: Any) -> TextParts:
    """Parts of which the first has n sequences of 4 tokens."""
    spec = TextSpec(sources=tuple(map(str, sources)), tokens=4 * n, seq_len=4, seed=seed)
    return draw(spec, tokenizer or Letters(), **more)


def _sequences(*corpora: Corpus | None) -> list[tuple[int, ...]]:
    return [tuple(row) for corpus in corpora if corpus is not None for row in corpus.input_ids.tolist()]


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("a" * 400)
    second.write_text("b" * 400)
    return first, second


@pytest.fixture
def varied(tmp_path: Path) -> list[Path]:
    """Three files of 50 sequences of 4 letters, every sequence another."""
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    for i, path in enumerate(files):
        path.write_text("".join(chr(200 * (i + 1) + j) * 4 for j in range(50)), encoding="utf-8")
    return files


def test_several_sources_in_equal_parts_taking_turns(two_files: tuple[Path, Path]) -> None:
    first, second = two_files
    corpus = _draw(f"{first},{second}").calibration
    assert rows(corpus) == ["aaaa", "bbbb", "aaaa", "bbbb", "aaaa"]
    assert _draw(first, second).calibration.sha256 == corpus.sha256
    assert corpus.documents == 2


@pytest.mark.parametrize("more", [6, 7, 20])
def test_more_tokens_give_the_same_sequences_first(varied: list[Path], more: int) -> None:
    few, many = (_draw(*varied, n=n, seed=3).calibration for n in (5, more))
    assert torch.equal(many.input_ids[: len(few)], few.input_ids)
    assert len(set(_sequences(many))) == len(many)


@pytest.mark.parametrize(
    ("n", "sizes"), [(5, (5, 1, 1)), (24, (24, 3, 3)), (40, (40, 5, 5)), (46, (46, 2, 2)), (49, (49, 1, 0))]
)
def test_three_disjoint_parts(varied: list[Path], n: int, sizes: tuple[int, ...]) -> None:
    """Selection and test have an eighth each; where the text is short they share what is left, the test part first."""
    parts = _draw(varied[0], n=n)
    found = parts.calibration, parts.test, parts.selection
    assert tuple(0 if part is None else len(part) for part in found) == sizes
    assert len(set(_sequences(*found))) == sum(sizes)


def test_a_source_that_is_only_long_enough_for_the_calibration(varied: list[Path]) -> None:
    parts = _draw(varied[0], n=50)
    assert len(parts.calibration) == 50 and parts.test is parts.selection is None
    with pytest.raises(UserError, match="at least 204 tokens"):
        _draw(varied[0], n=51)


def test_a_file_with_a_comma_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a,b.txt"
    path.write_text("abcd" * 10)
    assert len(_draw(path, n=2).calibration) == 2


def test_sources_that_cannot_be(two_files: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="fewer than its 2 sources"):
        _draw(*two_files, n=1)
    with pytest.raises(UserError, match="empty"):
        _draw(f"{two_files[0]},", n=2)
    with pytest.raises(UserError, match="twice"):
        _draw(two_files[0], two_files[0], n=4)
    with pytest.raises(UserError, match="no model to write it"):
        _draw("self", n=2)


@pytest.mark.parametrize("mixed", [False, True])
def test_text_that_the_model_writes_has_three_parts_too(varied: list[Path], mixed: bool) -> None:
    """Also beside a file, and no part with the next seed is what another part was written as."""
    model, tokenizer = families.make_model("llama"), families.make_tokenizer()
    varied[0].write_text(families.sample_text(400), encoding="utf-8")
    sources = ("self", varied[0]) if mixed else ("self",)
    seen: list[tuple[int, ...]] = []
    for seed in (0, 1, 2):
        spec = TextSpec(sources=tuple(map(str, sources)), tokens=16 * 16, seq_len=16, seed=seed)
        parts = draw(spec, tokenizer, writer=lambda: model)
        assert parts.test is not None and parts.selection is not None
        found = [_sequences(parts.calibration), _sequences(parts.test), _sequences(parts.selection)]
        assert [len(part) for part in found] == [16, 2, 2]
        written = [row for part in found for row in part[:: 1 + mixed]]
        if mixed:
            assert len({row for part in found for row in part}) == 20
        seen += written
    assert len(set(seen)) == len(seen)


def test_only_the_parts_that_are_asked_for_are_written() -> None:
    calls = []

    def writer() -> Any:
        calls.append(1)
        return families.make_model("llama")

    parts = draw(TextSpec(tokens=32, seq_len=16), families.make_tokenizer(), writer=writer)
    assert not calls
    assert parts.test is not None and len(calls) == 1
    assert parts.test is parts.test and len(calls) == 1


def test_text_that_is_still_to_be_written_does_not_move_the_bar() -> None:
    seen: list[float] = []

    class Watched(Display):
        def moved(self) -> None:
            super().moved()
            seen.append(self._pace.share)

    text = TextSpec(sources=("self",), tokens=64, seq_len=16)
    with progress.reporting_to(Watched(io.StringIO())), progress.job({"text": 1, "planning": 1}) as job:
        with job.part("text"):
            draw(text, Letters(), writer=lambda: None)
            assert set(seen) == {0.0}
        assert seen[-1] == 0.5
