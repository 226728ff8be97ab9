"""GGUF export: a checkpoint as one file, written tensor by tensor, which appears whole or not at all.

Names come from the maps of the package `gguf`. Vectors (norms, biases) stay in 32 bits, as llama.cpp expects. In the
llama architecture, the two entries that rotate together are adjacent, while transformers has them half a head apart:
rows of q and k are permuted. Features that the format or llama.cpp's graph does not support are refused by name.

Two kinds of tokenizers are written: byte-level BPE (`gpt2` in GGUF: tokens, merges and the name of the rule that splits
text before merging) and SentencePiece-like BPE (`llama`: tokens with scores). The rule is recognised by the tokenizer's
regular expression; an unknown one is refused, and its name can be given as an option.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from intarsia.building.loaded_model import stock_config
from intarsia.checkpoint.gguf_source import divisors, need_gguf
from intarsia.checkpoint.reader import Checkpoint
from intarsia.disk import read_json, replaced
from intarsia.errors import Problem, Problems, UserError, few
from intarsia.progress import current

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT_2 = "the expression of GPT-2"
# Steps of splitting text -> llama.cpp's name of the rule.
_SPLITS: dict[tuple[str, ...], str] = {
    (_GPT_2,): "gpt-2",
    ("every digit", _GPT_2): "smollm",
    (_LETTERS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_LETTERS + r"\p{N}" + _REST,): "qwen2",
    (_TEKKEN,): "tekken",
}
KINDS = ("F16", "Q8_0", "F32", "BF16")
_GRAPHS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name of the architecture, by the config's `model_type`."""
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_PADDING = 32
_BLOCK = 32  # entries of a row that share a scale in Q8_0
_CHUNK = 2**24  # entries converted at a time


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """A tokenizer in the form of a GGUF file."""

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
        vocabulary: rows of the embedding; ids without a token are written as unused.
        pre: the name of the splitting rule, overriding the detected one.

    Raises:
        UserError: there is no `tokenizer.json`, or its kind is not supported.
    """
    import gguf

    remedy = "Save it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
    data = read_json(folder / "tokenizer.json", expected="a tokenizer of transformers", remedy=remedy)
    found = data["model"]
    if found.get("type") != "BPE":
        raise _unsupported(folder, f"a tokenizer of type {found.get('type')}")
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(data.get("pre_tokenizer"), "pretokenizers"))
    if not byte_level and not found.get("byte_fallback"):
        raise _unsupported(folder, "BPE over neither bytes nor SentencePiece's symbols")
    added = {int(entry["id"]): entry for entry in data.get("added_tokens", [])}
    tokens = _tokens(folder, found["vocab"], added, vocabulary)
    special = gguf.SpecialVocab(folder, load_merges=byte_level, special_token_types=(), n_vocab=vocabulary)
    # Use the behaviour of transformers, not the settings in the files.
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


def _unsupported(folder: Path, found: str) -> UserError:
    return UserError(
        f"{folder / 'tokenizer.json'} is {found}; only byte-level BPE and BPE with byte fallback are supported.",
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
            f"{folder / 'tokenizer.json'}: the embedding has {vocabulary:,} rows, but none for {few(beyond)}.",
            "Tokenizer and weights do not match; download the checkpoint again.",
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
    """Scores from merge ranks: SentencePiece merges the best score first, BPE the lowest rank, so a score is -rank."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, 0)) if token is not None else -1e6 for token in tokens]


def _adds(tokenizer: Any) -> dict[str, bool]:
    """Whether it adds a first and a last token to a text, by its behaviour, not its settings."""
    ids = list(tokenizer("a")["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "bos": bos is not None and bool(ids) and ids[0] == bos,
        "eos": eos is not None and len(ids) > 1 and ids[-1] == eos,
    }


def _steps(entry: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be one step or a sequence."""
    if entry is None:
        return []
    return list(entry[inner]) if entry.get("type") == "Sequence" else [entry]


def _prefixes_space(data: Mapping[str, Any]) -> bool:
    """Whether a space is prepended to a text."""
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
    # Composing characters, as in Qwen, is not part of any rule's name.
    others = [step for step in _steps(data.get("normalizer"), "normalizers") if step["type"] != "NFC"]
    if name is None or others:
        text = " then ".join([*(str(step) for step in others), *steps]) or "nothing"
        raise UserError(
            f"{folder / 'tokenizer.json'} splits text by a rule other than {', '.join(_SPLITS.values())}: "
            f"{text if len(text) < 300 else text[:300] + ' ...'}.",
            "If you know llama.cpp's name of this rule, pass --tokenizer-pre NAME.",
        )
    return name


def add_tokenizer(writer: Any, found: GgufTokenizer) -> None:
    """Write the tokenizer to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(list(found.tokens))
    writer.add_token_types(list(found.types))
    if found.scores is not None:
        writer.add_token_scores(list(found.scores))
    found.special.add_to_gguf(writer, quiet=True)
    if found.space_prefix is not None:
        writer.add_add_space_prefix(found.space_prefix)


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor to write."""

    name: str
    # its name in the checkpoint; None for the divisors of the rotary embedding
    source: str | None
    shape: tuple[int, ...]
    kind: str
    # heads whose rows are permuted
    heads: int | None = None

    @property
    def nbytes(self) -> int:
        entries = prod(self.shape)
        return entries // _BLOCK * (_BLOCK + 2) if self.kind == "Q8_0" else entries * {"F32": 4}.get(self.kind, 2)


@dataclass(frozen=True, kw_only=True)
class GgufPlan:
    """Everything in a file except the weights."""

    kind: str
    name: str
    # llama.cpp's name of the architecture
    graph: str
    layers: int
    # the config read by transformers
    config: Any
    # positions with the same results as in transformers
    context: int
    # why the context is shorter than the config's
    shortened: str | None
    # of the rotary embedding's frequencies, for Llama 3
    divisors: npt.NDArray[np.float32] | None
    tokenizer: GgufTokenizer
    tensors: tuple[GgufTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(-(-tensor.nbytes // _PADDING) * _PADDING for tensor in self.tensors)


def plan_gguf(
    checkpoint: Checkpoint, tokenizer: Any, kind: str, *, name: str, tokenizer_pre: str | None = None
) -> GgufPlan:
    """Plan a file, and find its problems, before reading weights.

    Args:
        kind: one of `KINDS`, for matrices; vectors are always in 32 bits.
        name: the model's name in the file.
        tokenizer_pre: llama.cpp's name of the tokenizer's splitting rule, if it is not detected.

    Raises:
        UserError: the package `gguf` is missing, or the model cannot be written as GGUF.
    """
    if kind not in KINDS:
        raise UserError(f"--gguf is {kind!r}.", f"Choose one of {', '.join(KINDS)}.")
    need_gguf("export --gguf", extra="gguf")
    family = str(checkpoint.config["model_type"])
    if family not in _GRAPHS:
        raise UserError(
            f"{checkpoint.folder}: models of type {family} cannot be exported to GGUF, only {', '.join(_GRAPHS)}.",
            "Use llama.cpp's own converter, convert_hf_to_gguf.py, on the folder: it is a stock checkpoint.",
        )
    config: Any = stock_config(checkpoint)
    _refuse_unsupported(checkpoint, config)
    architecture = checkpoint.architecture
    context, shortened = _context(architecture.layer_types, config)
    rope = config.rope_parameters
    scales = divisors(rope, architecture.head_dim) if rope.get("rope_type") == "llama3" else None
    graph = _GRAPHS[family]
    return GgufPlan(
        kind=kind,
        name=name,
        graph=graph,
        layers=architecture.n_layers,
        config=config,
        context=context,
        shortened=shortened,
        divisors=scales,
        tokenizer=gguf_tokenizer(checkpoint.folder, tokenizer, architecture.vocabulary, pre=tokenizer_pre),
        tensors=tuple(_tensors(checkpoint, graph, scales, kind)),
    )


def _refuse_unsupported(checkpoint: Checkpoint, config: Any) -> None:
    rope = config.rope_parameters
    qk_biases = any(name.endswith(("q_proj.bias", "o_proj.bias")) for name in checkpoint.headers)
    Problems(
        Problem(
            f"{checkpoint.folder}: GGUF and llama.cpp do not support {found}.",
            "Run the folder with transformers or vLLM instead.",
        )
        for wrong, found in (
            (config.hidden_act != "silu", f"the activation {config.hidden_act}"),
            (rope.get("rope_type", "default") not in _ROPE_TYPES, f"rotary embedding of type {rope.get('rope_type')}"),
            (rope.get("partial_rotary_factor", 1.0) != 1.0, "a rotary embedding of a part of each head"),
            (checkpoint.config["model_type"] == "qwen3" and qk_biases, "biases of attention in Qwen3"),
        )
        if wrong
    ).raise_any()


def _context(layer_types: tuple[str, ...] | None, config: Any) -> tuple[int, str | None]:
    """The context length: these GGUF architectures have no sliding window, so it ends at the window's size."""
    most = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    slides = layer_types is None or any("sliding" in kind for kind in layer_types)
    if window is None or not getattr(config, "use_sliding_window", True) or not slides or window >= most:
        return most, None
    note = f"GGUF does not support its sliding window of {window:,} tokens, which has no effect up to there"
    return int(window), note


def _tensors(
    checkpoint: Checkpoint, graph: str, scales: npt.NDArray[np.float32] | None, kind: str
) -> Iterator[GgufTensor]:
    """All tensors to write, in order."""
    import gguf

    architecture = checkpoint.architecture
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[graph.upper()], architecture.n_layers)
    outside = ["model.embed_tokens.weight", "model.norm.weight", *([] if architecture.tied else ["lm_head.weight"])]
    inside = [
        architecture.tensor_name(layer, local)
        for layer in range(architecture.n_layers)
        for local in architecture.layer_shapes()
    ]
    for source in (*outside, *inside):
        shape = checkpoint.headers[source].shape
        heads = None
        if graph == "llama" and ".self_attn.q_proj." in source:
            heads = architecture.n_query_heads
        elif graph == "llama" and ".self_attn.k_proj." in source:
            heads = architecture.n_kv_heads
        own = "F32" if len(shape) == 1 else "F16" if kind == "Q8_0" and shape[-1] % _BLOCK else kind
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"{source} has no name in GGUF"
        yield GgufTensor(name=name, source=source, shape=shape, kind=own, heads=heads)
    if scales is not None:
        yield GgufTensor(name="rope_freqs.weight", source=None, shape=scales.shape, kind="F32")


def write_gguf(checkpoint: Checkpoint, plan: GgufPlan, out: Path) -> None:
    """Write the file, with a few rows of one tensor in memory at a time.

    Raises:
        UserError: a value does not fit, or the disk is full; the file is removed.
    """
    import gguf

    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        replaced(out) as staged,
        current().task(f"writing {out.name}", plan.nbytes) as task,
    ):
        writer = gguf.GGUFWriter(staged, plan.graph)
        try:
            writer.add_type("model")
            writer.add_name(plan.name)
            writer.add_file_type(gguf.LlamaFileType["ALL_F32" if plan.kind == "F32" else f"MOSTLY_{plan.kind}"])
            if plan.kind == "Q8_0":
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            _add_shape(writer, checkpoint, plan)
            add_tokenizer(writer, plan.tokenizer)
            for tensor in plan.tensors:
                kind = gguf.GGMLQuantizationType[tensor.kind]
                writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.nbytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (stream,) = writer.fout
            writer.write_padding(stream, stream.tell())
            for tensor in plan.tensors:
                written = 0
                for rows in _entries(tensor, checkpoint, plan):
                    stream.write(rows.data)
                    written += rows.nbytes
                    task.advance(rows.nbytes)
                assert written == tensor.nbytes, f"{tensor.name}: planned {tensor.nbytes} bytes, wrote {written}"
                writer.write_padding(stream, tensor.nbytes)
        finally:
            writer.close()


def _add_shape(writer: Any, checkpoint: Checkpoint, plan: GgufPlan) -> None:
    import gguf

    architecture, rope = checkpoint.architecture, plan.config.rope_parameters
    writer.add_block_count(architecture.n_layers)
    writer.add_context_length(plan.context)
    writer.add_embedding_length(architecture.width)
    writer.add_feed_forward_length(architecture.n_channels)
    writer.add_head_count(architecture.n_query_heads)
    writer.add_head_count_kv(architecture.n_kv_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(float(plan.config.rms_norm_eps))
    writer.add_vocab_size(architecture.vocabulary)
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        if rope.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        for name, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(float(rope[name]))


def _entries(tensor: GgufTensor, checkpoint: Checkpoint, plan: GgufPlan) -> Iterator[npt.NDArray[Any]]:
    """The tensor's bytes in the file, some rows at a time.

    Raises:
        UserError: a value does not fit into 16 bits, or is not finite.
    """
    if tensor.source is None:
        assert plan.divisors is not None, "only the divisors have no source"
        yield plan.divisors
        return
    whole = checkpoint.tensor(tensor.source)
    if tensor.heads is not None:
        whole = side_by_side(whole, tensor.heads)
    rows = max(_CHUNK // max(whole.shape[-1], 1), 1) if whole.ndim > 1 else whole.shape[0]
    for start in range(0, whole.shape[0], rows):
        yield _converted(whole[start : start + rows], tensor)


def side_by_side(weight: Tensor, heads: int) -> Tensor:
    """Rows (or bias entries) of each head with the two halves interleaved."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _converted(part: Tensor, tensor: GgufTensor) -> npt.NDArray[Any]:
    import gguf

    if tensor.kind == "F16":
        part = part.to(torch.float16)
    if not bool(torch.isfinite(part).all()):
        raise UserError(
            f"The tensor {tensor.source} has NaN, infinity or numbers that {tensor.kind} cannot hold.",
            "Export as BF16 or F32.",
        )
    if tensor.kind == "F16":
        return part.contiguous().numpy()
    if tensor.kind == "BF16":
        return part.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    wide = part.float().contiguous().numpy()
    return wide if tensor.kind == "F32" else gguf.quantize(wide, gguf.GGMLQuantizationType.Q8_0)
