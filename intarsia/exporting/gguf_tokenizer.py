"""A tokenizer as a GGUF file holds it.

Two kinds are written: byte-level BPE (`gpt2` in GGUF: tokens, merges and the name of the rule by which text is split
before merging) and SentencePiece-like BPE (`llama`: tokens with scores). The rule's name is found from the regular
expression that the tokenizer itself states, never from the model's name; one that is not known is refused, and can be
given by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.errors import UserError, few

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT_2 = "the expression of GPT-2"
# The steps by which text is split -> what llama.cpp calls them.
_SPLITS: dict[tuple[str, ...], str] = {
    (_GPT_2,): "gpt-2",
    ("every digit", _GPT_2): "smollm",
    (_LETTERS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_LETTERS + r"\p{N}" + _REST,): "qwen2",
    (_TEKKEN,): "tekken",
}


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """What a GGUF file says about a tokenizer."""

    # `gpt2` or `llama`
    model: str
    # the name of the splitting rule
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    # only for `llama`
    scores: Sequence[float] | None
    # merges, special tokens and chat template, as a `gguf.SpecialVocab`
    special: Any
    space_prefix: bool | None


def gguf_tokenizer(folder: Path, tokenizer: Any, vocabulary: int, *, pre: str | None = None) -> GgufTokenizer:
    """The tokenizer of a model folder.

    Args:
        tokenizer: as transformers loads it from the folder.
        vocabulary: rows of the embedding; ids without a token are written as unused.
        pre: the name of the splitting rule, where it is known better than the tokenizer states it.

    Raises:
        UserError: there is no `tokenizer.json`, or it is of a kind that is not written.
    """
    import gguf

    data = _read(folder)
    found = data["model"]
    if found.get("type") != "BPE":
        raise _unsupported(folder, f"a tokenizer of type {found.get('type')}")
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(data.get("pre_tokenizer"), "pretokenizers"))
    if not byte_level and not found.get("byte_fallback"):
        raise _unsupported(folder, "BPE over neither bytes nor SentencePiece's symbols")
    added = {int(entry["id"]): entry for entry in data.get("added_tokens", [])}
    tokens = _tokens(folder, found["vocab"], added, vocabulary)
    special = gguf.SpecialVocab(folder, load_merges=byte_level, special_token_types=(), n_vocab=vocabulary)
    # What transformers does counts, not what the files say.
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    special.special_token_ids = {name: int(i) for name, i in ids.items() if i is not None and i < vocabulary}
    special.add_special_token = _adds(tokenizer)
    special.chat_template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    return GgufTokenizer(
        model="gpt2" if byte_level else "llama",
        pre=pre or (_pre(folder, data) if byte_level else "default"),
        tokens=[f"[PAD{index}]" if token is None else token for index, token in enumerate(tokens)],
        types=[_type(index, token, added, byte_level, found.get("unk_token")) for index, token in enumerate(tokens)],
        scores=None if byte_level else _scores(tokens, found["merges"]),
        special=special,
        space_prefix=None if byte_level else _prefixes_space(data),
    )


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{folder} has no tokenizer.json.",
            "Save it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER).",
        )
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def _unsupported(folder: Path, found: str) -> UserError:
    return UserError(
        f"{folder / 'tokenizer.json'} is {found}; byte-level BPE, and BPE with byte fallback, are written.",
        "Use llama.cpp's own converter, convert_hf_to_gguf.py, on the folder: it is a stock checkpoint.",
    )


def _tokens(folder: Path, vocab: Mapping[str, int], added: Mapping[int, Any], vocabulary: int) -> list[str | None]:
    tokens: list[str | None] = [None] * vocabulary
    pairs = [
        *((index, token) for token, index in vocab.items()),
        *((i, entry["content"]) for i, entry in added.items()),
    ]
    beyond = [token for index, token in pairs if index >= vocabulary]
    if beyond:
        raise UserError(
            f"{folder / 'tokenizer.json'}: the embedding has {vocabulary:,} rows, and none for {few(beyond)}.",
            "Tokenizer and weights do not belong together; get the checkpoint again.",
        )
    for index, token in pairs:
        tokens[index] = token
    return tokens


def _type(index: int, token: str | None, added: Mapping[int, Any], byte_level: bool, unknown: str | None) -> int:
    from gguf import TokenType

    if token is None:
        return TokenType.UNUSED
    if not byte_level and token == unknown:
        return TokenType.UNKNOWN
    if not byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return TokenType.BYTE
    if index in added:
        return TokenType.CONTROL if added[index].get("special") else TokenType.USER_DEFINED
    return TokenType.NORMAL


def _scores(tokens: Sequence[str | None], merges: Sequence[str | Sequence[str]]) -> list[float]:
    """SentencePiece joins what has the best score first, BPE what was merged first: the rank with its sign turned."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, 0)) if token is not None else -1e6 for token in tokens]


def _adds(tokenizer: Any) -> dict[str, bool]:
    """Whether it puts its first and last token around a text: what it does, not what its settings say."""
    ids = list(tokenizer("a")["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "bos": bos is not None and bool(ids) and ids[0] == bos,
        "eos": eos is not None and len(ids) > 1 and ids[-1] == eos,
    }


def _steps(entry: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence or one alone."""
    if entry is None:
        return []
    return list(entry[inner]) if entry.get("type") == "Sequence" else [entry]


def _prefixes_space(data: Mapping[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    for step in [*_steps(data.get("normalizer"), "normalizers"), *_steps(data.get("pre_tokenizer"), "pretokenizers")]:
        if step["type"] == "Prepend":
            return True
        if step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            return bool(scheme != "never")
    return False


def _pre(folder: Path, data: Mapping[str, Any]) -> str:
    steps: list[str] = []
    for step in _steps(data.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Digits" and step.get("individual_digits"):
            steps.append("every digit")
        elif step["type"] == "Split" and "Regex" in step.get("pattern", {}):
            steps.append(step["pattern"]["Regex"])
        elif step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            steps += [_GPT_2] if step.get("use_regex", True) else []
        else:
            steps.append(f"{step['type']} {json.dumps(step)}")
    name = _SPLITS.get(tuple(steps))
    # Composing characters, as Qwen does it, is part of no rule's name.
    others = [step for step in _steps(data.get("normalizer"), "normalizers") if step["type"] != "NFC"]
    if name is None or others:
        text = " then ".join([*(str(step) for step in others), *steps]) or "nothing"
        raise UserError(
            f"{folder / 'tokenizer.json'} splits text by a rule that is none of {', '.join(_SPLITS.values())}: "
            f"{text if len(text) < 300 else text[:300] + ' ...'}.",
            "Where you know what llama.cpp calls this rule, pass --tokenizer-pre NAME.",
        )
    return name


def add_tokenizer(writer: Any, found: GgufTokenizer) -> None:
    """Put the tokenizer into a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(list(found.tokens))
    writer.add_token_types(list(found.types))
    if found.scores is not None:
        writer.add_token_scores(list(found.scores))
    found.special.add_to_gguf(writer, quiet=True)
    if found.space_prefix is not None:
        writer.add_add_space_prefix(found.space_prefix)
