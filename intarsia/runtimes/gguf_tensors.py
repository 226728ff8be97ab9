"""A checkpoint's tensors under GGUF's names, in its order of rotary pairs and its data types, one at a time.

Vectors (norms, biases) stay in 32 bits, as llama.cpp wants them. In the llama architecture the two entries that
rotate together lie side by side, where transformers has them half a head apart: rows of q and k change places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from intarsia.runtimes.gguf_hparams import Hparams

KINDS = ("F16", "Q8_0", "F32", "BF16")
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""What llama.cpp calls a file most of whose tensors are of a kind."""

_BLOCK = 32  # entries of a row that Q8_0 gives one scale
_CHUNK = 2**24  # entries that are converted together
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor to write. `source` is its name in the checkpoint; None for the divisors of the rotary embedding."""

    name: str
    source: str | None
    shape: tuple[int, ...]
    kind: str
    heads: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its entries."""
        entries = int(np.prod(self.shape))
        return entries // _BLOCK * (_BLOCK + 2) if self.kind == "Q8_0" else entries * {"F32": 4}.get(self.kind, 2)


def tensors_of(checkpoint: Checkpoint, shape: Hparams, kind: str) -> Iterator[GgufTensor]:
    """Everything to write, in order."""
    permuted = shape.architecture == "llama"
    for source in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        if source in checkpoint.headers and not (source.startswith("lm_head") and checkpoint.anatomy.tied):
            yield _tensor(checkpoint, source, _renamed(source, _OUTSIDE), kind)
    if shape.divisors is not None:
        yield GgufTensor(name="rope_freqs.weight", source=None, shape=shape.divisors.shape, kind="F32")
    for layer in range(shape.layers):
        for local in checkpoint.anatomy.layer_shapes():
            heads = None
            if permuted and local.startswith(("self_attn.q_proj", "self_attn.k_proj")):
                heads = shape.query_heads if ".q_proj" in local else shape.kv_heads
            name = f"blk.{layer}.{_renamed(local, _IN_LAYER)}"
            yield _tensor(checkpoint, checkpoint.anatomy.tensor_name(layer, local), name, kind, heads)


def _renamed(name: str, names: dict[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{names[module]}.{leaf}"


def _tensor(checkpoint: Checkpoint, source: str, name: str, kind: str, heads: int | None = None) -> GgufTensor:
    shape = checkpoint.headers[source].shape
    if len(shape) == 1:
        kind = "F32"
    elif kind == "Q8_0" and shape[-1] % _BLOCK:
        kind = "F16"
    return GgufTensor(name=name, source=source, shape=shape, kind=kind, heads=heads)


def entries_of(tensor: GgufTensor, checkpoint: Checkpoint, shape: Hparams) -> Iterator[npt.NDArray[Any]]:
    """The tensor's bytes in the file, some rows at a time.

    Raises:
        UserError: a value does not fit into 16 bits, or is no finite number.
    """
    if tensor.source is None:
        assert shape.divisors is not None, "only the divisors have no source"
        yield shape.divisors
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
        raise UserError.of(
            where=f"tensor {tensor.source}",
            expected=f"numbers that {tensor.kind} can hold",
            found="larger ones, NaN or infinity",
            remedy="Export as BF16 or F32.",
        )
    if tensor.kind == "F16":
        return part.contiguous().numpy()
    if tensor.kind == "BF16":
        return part.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    wide = part.float().contiguous().numpy()
    return wide if tensor.kind == "F32" else gguf.quantize(wide, gguf.GGMLQuantizationType.Q8_0)
