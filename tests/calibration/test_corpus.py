from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.calibration.corpus import Corpus, load_corpus, tokenize
from intarsia.errors import UserError
from tests import families


class Letters:
    """A tokenizer whose tokens are the characters' numbers; EOS 0, and BOS 1 if it puts one by itself."""

    eos_token_id: int | None = 0

    def __init__(self, *, bos: bool = False) -> None:
        self.bos_token_id = 1 if bos else None
        self.read: list[str] = []

    def __call__(self, texts: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            first = [1] if add_special_tokens and self.bos_token_id else []
            return {"input_ids": first + [ord(letter) for letter in texts]}
        assert not add_special_tokens
        self.read += texts
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def _rows(corpus: Corpus) -> list[str]:
    return ["".join({0: "/", 1: "^"}.get(i, chr(i)) for i in row) for row in corpus.input_ids.tolist()]


def test_packs_documents_joined_by_eos() -> None:
    corpus = tokenize(["abc", "de", "fghij"], Letters(), tokens=11, seq_len=4, shuffle=False)
    assert _rows(corpus) == ["abc/", "de/f"]
    assert (corpus.tokens, corpus.documents, corpus.seq_len, len(corpus), corpus.mask) == (8, 3, 4, 2, None)


def test_bos_where_the_tokenizer_puts_one() -> None:
    corpus = tokenize(["abcdefghij"], Letters(bos=True), tokens=12, seq_len=4, shuffle=False)
    assert _rows(corpus) == ["^abc", "^def", "^ghi"]


def test_no_eos_no_joint() -> None:
    letters = Letters()
    letters.eos_token_id = None
    assert _rows(tokenize(["abc", "de"], letters, tokens=4, seq_len=4, shuffle=False)) == ["abcd"]


def test_reads_no_more_than_it_needs() -> None:
    letters = Letters()
    tokenize((f"text{i:04}" for i in range(10_000)), letters, tokens=64, seq_len=8, shuffle=False)
    assert len(letters.read) < 500


def test_shuffle_reaches_the_whole_source_and_follows_the_seed() -> None:
    text = "".join(chr(100 + i) * 4 for i in range(200))
    one, same, other = (
        tokenize([text], Letters(), tokens=160, seq_len=4, seed=seed, shuffle=True) for seed in (1, 1, 2)
    )
    assert torch.equal(one.input_ids, same.input_ids)
    assert one.sha256 == same.sha256 != other.sha256
    starts = one.input_ids[:, 0].tolist()
    assert len(set(starts)) == 40  # none twice
    assert max(starts) > 270 and min(starts) < 130


def test_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tokenize(["abc" * 50], Letters(), tokens=16, seq_len=4, shuffle=True)
    assert torch.equal(torch.rand(3), expected)


def test_too_short_says_how_many_there_are() -> None:
    with pytest.raises(UserError, match=r"words: expected at least 16 tokens.*found 9 tokens.*at most 8 tokens"):
        tokenize(["abcdefghi"], Letters(), tokens=16, seq_len=4, shuffle=True, description="words")
    with pytest.raises(UserError, match=r"found 3 tokens.*shorter sequences"):
        tokenize(["abc"], Letters(), tokens=4, seq_len=4, shuffle=False)
    with pytest.raises(UserError, match="found 3 tokens"):
        tokenize(["abc"], Letters(), tokens=4, seq_len=4, shuffle=False, short_is_fine=True)
    assert len(tokenize(["abcdefghi"], Letters(), tokens=99, seq_len=4, shuffle=False, short_is_fine=True)) == 2


@pytest.mark.parametrize(("tokens", "seq_len"), [(3, 4), (10, 1), (10, 0)])
def test_impossible_sizes(tokens: int, seq_len: int) -> None:
    with pytest.raises(UserError, match="sequence length of at least 2"):
        tokenize(["abcdefghi"], Letters(), tokens=tokens, seq_len=seq_len, shuffle=False)


def test_take_split_and_batches() -> None:
    corpus = tokenize(["abcdefghijklmnopqrst"], Letters(), tokens=20, seq_len=4, shuffle=False)
    assert _rows(corpus.take(2)) == ["abcd", "efgh"]
    first, rest = corpus.split(0.6)
    assert (_rows(first), _rows(rest)) == (["abcd", "efgh", "ijkl"], ["mnop", "qrst"])
    assert first.sha256 == corpus.take(3).sha256 != rest.sha256
    assert [len(ids) for ids, _ in corpus.batches(2)] == [2, 2, 1]
    assert len(corpus.split(0.001)[0]) == 1 and len(corpus.split(0.999)[1]) == 1
    with pytest.raises(UserError, match="at least 6 sequences"):
        corpus.take(6)
    with pytest.raises(UserError, match="held out"):
        corpus.take(1).split(0.5)


def test_mask_counts_and_is_hashed() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    padded = Corpus.of(ids, mask=mask, description="padded", documents=2)
    assert padded.tokens == 4
    assert padded.sha256 != Corpus.of(ids, description="full", documents=2).sha256
    part = list(padded.batches(1))[1][1]
    assert part is not None and part.tolist() == [[True, False, False]]
    assert Corpus.of(ids.view(2, 3), description="", documents=1).sha256 != (
        Corpus.of(ids.view(3, 2), description="", documents=1).sha256
    )


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("a" * 400)
    second.write_text("b" * 400)
    return first, second


def test_several_sources_in_equal_parts_taking_turns(two_files: tuple[Path, Path]) -> None:
    first, second = two_files
    corpus = load_corpus(f"{first},{second}", Letters(), tokens=20, seq_len=4, seed=0)
    assert _rows(corpus) == ["aaaa", "bbbb", "aaaa", "bbbb", "aaaa"]
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
