"""What a GGUF file says about a model's shape, from a checkpoint's config.

Source: the keys of the GGUF specification, through the names of the package `gguf`. A feature that the file format or
llama.cpp's graph of the family has no place for is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from intarsia.building.loading import stock_config
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.rope import divisors
from intarsia.errors import Problem, UserError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""From a config's `model_type` to what llama.cpp calls the architecture."""

_ROPE_TYPES = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class Hparams:
    """The shape of a model as GGUF names it.

    `context`: positions that give the same results as in transformers. `rope`: type and numbers of the rotary
    embedding. `divisors`: of its frequencies, for Llama 3. `shortened`: why the context is shorter than the config's.
    """

    architecture: str
    layers: int
    width: int
    channels: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    epsilon: float
    rope: Mapping[str, Any]
    divisors: npt.NDArray[np.float32] | None
    shortened: str | None


def hparams(checkpoint: Checkpoint) -> Hparams:
    """The shape of a checkpoint's model.

    Raises:
        UserError: its family cannot be written as GGUF here, or it has features that GGUF has no place for.
    """
    anatomy = checkpoint.anatomy
    kind = str(checkpoint.config["model_type"])
    where = str(checkpoint.folder)
    if kind not in ARCHITECTURES:
        raise UserError.of(
            where=f"{where}: model_type",
            expected=f"a family that is exported to GGUF: {', '.join(ARCHITECTURES)}",
            found=kind,
            remedy="Use llama.cpp's own converter, convert_hf_to_gguf.py, on the folder: it is a stock checkpoint.",
        )
    config: Any = stock_config(checkpoint)
    rope = dict(config.rope_parameters)
    _refuse(checkpoint, config, rope, where)
    context, shortened = _context(anatomy.layer_types, config)
    return Hparams(
        architecture=ARCHITECTURES[kind],
        layers=anatomy.n_layers,
        width=anatomy.width,
        channels=anatomy.n_channels,
        query_heads=anatomy.n_query_heads,
        kv_heads=anatomy.n_kv_heads,
        head_dim=anatomy.head_dim,
        vocabulary=anatomy.vocabulary,
        context=context,
        epsilon=float(config.rms_norm_eps),
        rope=rope,
        divisors=_divisors(rope, anatomy.head_dim),
        shortened=shortened,
    )


def _refuse(checkpoint: Checkpoint, config: Any, rope: Mapping[str, Any], where: str) -> None:
    names = checkpoint.headers
    qk_biases = any(name.endswith(("q_proj.bias", "o_proj.bias")) for name in names)
    problems = [
        Problem(
            where=where,
            expected="only what GGUF and llama.cpp have a place for",
            found=found,
            remedy="Run the folder with transformers or vLLM instead.",
        )
        for wrong, found in (
            (config.hidden_act != "silu", f"the activation {config.hidden_act}"),
            (rope.get("rope_type", "default") not in _ROPE_TYPES, f"rotary embedding of type {rope.get('rope_type')}"),
            (rope.get("partial_rotary_factor", 1.0) != 1.0, "a rotary embedding of a part of each head"),
            (checkpoint.config["model_type"] == "qwen3" and qk_biases, "biases of attention in Qwen3"),
        )
        if wrong
    ]
    if problems:
        raise UserError(problems)


def _context(layer_types: tuple[str, ...] | None, config: Any) -> tuple[int, str | None]:
    """These architectures of GGUF have no sliding window; up to its size it makes no difference."""
    most = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    slides = layer_types is None or any("sliding" in kind for kind in layer_types)
    if window is None or not getattr(config, "use_sliding_window", True) or not slides or window >= most:
        return most, None
    return int(
        window
    ), f"its sliding window of {window:,} tokens has no place in the file; up to there it makes no difference"


def _divisors(rope: Mapping[str, Any], head_dim: int) -> npt.NDArray[np.float32] | None:
    if rope.get("rope_type") != "llama3":
        return None
    return divisors(
        head_dim=head_dim,
        theta=float(rope["rope_theta"]),
        factor=float(rope["factor"]),
        low=float(rope["low_freq_factor"]),
        high=float(rope["high_freq_factor"]),
        original=int(rope["original_max_position_embeddings"]),
    )


def add_hparams(writer: Any, shape: Hparams) -> None:
    """Put the shape into a `gguf.GGUFWriter`."""
    import gguf

    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.channels)
    writer.add_head_count(shape.query_heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(float(shape.rope["rope_theta"]))
    kind = shape.rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(shape.rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(shape.rope["factor"]))
        original = shape.rope.get("original_max_position_embeddings")
        if original:
            writer.add_rope_scaling_orig_ctx_len(int(original))
        numbers: dict[str, Callable[[float], None]] = {
            "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
            "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
        }
        for name, add in numbers.items():
            if shape.rope.get(name) is not None:
                add(float(shape.rope[name]))
