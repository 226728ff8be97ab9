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

from intarsia.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

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
    """What a GGUF file says about a tokenizer. `scores` only for `llama`, `merges` and `pre` only for `gpt2`."""

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] | None
    merges: Sequence[str] | None
    special: Mapping[str, int]
    adds: Mapping[str, bool]
    space_prefix: bool | None
    chat_template: str | None


def gguf_tokenizer(folder: Path, tokenizer: Any, vocabulary: int, *, pre: str | None = None) -> GgufTokenizer:
    """The tokenizer of a model folder.

    Args:
        tokenizer: as transformers loads it from the folder.
        vocabulary: rows of the embedding; ids without a token are written as unused.
        pre: the name of the splitting rule, where it is known better than the tokenizer states it.

    Raises:
        UserError: there is no `tokenizer.json`, or it is of a kind that is not written.
    """
    data = _read(folder)
    found = data["model"]
    if found.get("type") != "BPE":
        raise _unsupported(folder, f"a tokenizer of type {found.get('type')}")
    added = {int(entry["id"]): entry for entry in data.get("added_tokens", [])}
    tokens = _tokens(folder, found["vocab"], added, vocabulary)
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(data.get("pre_tokenizer"), "pretokenizers"))
    if not byte_level and not found.get("byte_fallback"):
        raise _unsupported(folder, "BPE over neither bytes nor SentencePiece's symbols")
    merges = [entry if isinstance(entry, str) else " ".join(entry) for entry in found["merges"]]
    types = [_type(index, token, added, byte_level, found.get("unk_token")) for index, token in enumerate(tokens)]
    types = [UNUSED if token is None else kind for token, kind in zip(tokens, types, strict=True)]
    template = tokenizer.chat_template
    return GgufTokenizer(
        model="gpt2" if byte_level else "llama",
        pre=pre or (_pre(folder, data) if byte_level else "default"),
        tokens=[f"[PAD{index}]" if token is None else token for index, token in enumerate(tokens)],
        types=types,
        scores=None if byte_level else _scores(tokens, merges),
        merges=merges if byte_level else None,
        special={
            name: int(index)
            for name in ("bos", "eos", "unk", "pad")
            if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None and index < vocabulary
        },
        adds=_adds(tokenizer),
        space_prefix=None if byte_level else _prefixes_space(data),
        chat_template=template if isinstance(template, str) else None,
    )


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError.of(
            where=str(folder),
            expected="a tokenizer.json",
            found="none",
            remedy="Save it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER).",
        )
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def _unsupported(folder: Path, found: str) -> UserError:
    return UserError.of(
        where=str(folder / "tokenizer.json"),
        expected="byte-level BPE, or BPE with byte fallback as SentencePiece has it",
        found=found,
        remedy="Use llama.cpp's own converter, convert_hf_to_gguf.py, on the folder: it is a stock checkpoint.",
    )


def _tokens(folder: Path, vocab: Mapping[str, int], added: Mapping[int, Any], vocabulary: int) -> list[str | None]:
    tokens: list[str | None] = [None] * vocabulary
    pairs = [
        *((index, token) for token, index in vocab.items()),
        *((i, entry["content"]) for i, entry in added.items()),
    ]
    beyond = [token for index, token in pairs if index >= vocabulary]
    if beyond:
        raise UserError.of(
            where=str(folder / "tokenizer.json"),
            expected=f"at most {vocabulary:,} tokens, one for each row of the embedding",
            found=f"{beyond[0]!r} and {len(beyond) - 1} more behind them",
            remedy="Tokenizer and weights do not belong together; get the checkpoint again.",
        )
    for index, token in pairs:
        tokens[index] = token
    return tokens


def _type(index: int, token: str | None, added: Mapping[int, Any], byte_level: bool, unknown: str | None) -> int:
    if not byte_level:
        if token is not None and token == unknown:
            return UNKNOWN
        if token is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return BYTE
    if index in added:
        return CONTROL if added[index].get("special") else USER_DEFINED
    return NORMAL


def _scores(tokens: Sequence[str | None], merges: Sequence[str]) -> list[float]:
    """SentencePiece joins what has the best score first, BPE what was merged first: the rank with its sign turned."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
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
        said = " then ".join([*(str(step) for step in others), *steps]) or "nothing"
        raise UserError.of(
            where=str(folder / "tokenizer.json"),
            expected=f"a rule for splitting text that is known: {', '.join(_SPLITS.values())}",
            found=said if len(said) < 300 else said[:300] + " ...",
            remedy="Where you know what llama.cpp calls this rule, pass --tokenizer-pre NAME.",
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
    if found.merges is not None:
        writer.add_token_merges(list(found.merges))
    for name, index in found.special.items():
        {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
        }[name](index)
    writer.add_add_bos_token(found.adds["bos"])
    writer.add_add_eos_token(found.adds["eos"])
    if found.space_prefix is not None:
        writer.add_add_space_prefix(found.space_prefix)
    if found.chat_template is not None:
        writer.add_chat_template(found.chat_template)
