from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.data.text import load_corpus
from intarsia.errors import UserError
from tests import families
from tests.data.letters import Letters, rows


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("a" * 400)
    second.write_text("b" * 400)
    return first, second


def test_several_sources_in_equal_parts_taking_turns(two_files: tuple[Path, Path]) -> None:
    first, second = two_files
    corpus = load_corpus(f"{first},{second}", Letters(), tokens=20, seq_len=4, seed=0)
    assert rows(corpus) == ["aaaa", "bbbb", "aaaa", "bbbb", "aaaa"]
    as_list = load_corpus([str(first), str(second)], Letters(), tokens=20, seq_len=4, seed=0)
    assert as_list.sha256 == corpus.sha256
    assert corpus.documents == 2


@pytest.mark.parametrize("more", [24, 28, 80])
def test_more_tokens_give_the_same_sequences_first(tmp_path: Path, more: int) -> None:
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    for i, path in enumerate(files):
        path.write_text("".join(chr(200 * (i + 1) + j) * 4 for j in range(50)), encoding="utf-8")
    specs = [str(path) for path in files]
    few, many = (load_corpus(specs, Letters(), tokens=n, seq_len=4, seed=3) for n in (20, more))
    assert torch.equal(many.input_ids[: len(few)], few.input_ids)
    assert len({tuple(row) for row in many.input_ids.tolist()}) == len(many)


def test_a_file_with_a_comma_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a,b.txt"
    path.write_text("abcd" * 10)
    assert len(load_corpus(str(path), Letters(), tokens=8, seq_len=4, seed=0)) == 2


def test_more_sources_than_sequences(two_files: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="each of 2 sources"):
        load_corpus([str(path) for path in two_files], Letters(), tokens=4, seq_len=4, seed=0)
    with pytest.raises(UserError, match="one source"):
        load_corpus("", Letters(), tokens=4, seq_len=4, seed=0)
    with pytest.raises(UserError, match="one source"):
        load_corpus(f"{two_files[0]},", Letters(), tokens=8, seq_len=4, seed=0)


def test_self_needs_a_model() -> None:
    with pytest.raises(UserError, match="a model that writes"):
        load_corpus("self", Letters(), tokens=8, seq_len=4, seed=0)


def test_self_beside_a_file(two_files: tuple[Path, Path]) -> None:
    tokenizer = families.make_tokenizer()
    corpus = load_corpus(
        f"self,{two_files[0]}",
        tokenizer,
        tokens=64,
        seq_len=16,
        seed=0,
        model_for_self=lambda: families.make_model("llama"),
    )
    assert corpus.input_ids.shape == (4, 16)
