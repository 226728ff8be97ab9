"""A tokenizer by hand whose tokens are letters, and what a corpus of it reads."""

from __future__ import annotations

from typing import Any

from intarsia.data.corpus import Corpus


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


def rows(corpus: Corpus) -> list[str]:
    return ["".join({0: "/", 1: "^"}.get(i, chr(i)) for i in row) for row in corpus.input_ids.tolist()]
