"""Runs rows on a model of transformers.

Whether a model takes rows of several continuations (`intarsia.evaluation.likelihood`) is known, not tried: the
families of this project take a mask of four dimensions and positions as they are given, with the attention
implementations `sdpa` and `eager`, as long as no row reaches past a sliding window. Everything else gets plain rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intarsia.architecture.families import Family, known_families
from intarsia.evaluation.likelihood import Forward, Likelihoods, Request, Rows, log_likelihoods

_CPU_BATCH = 512  # tokens; more is no faster for one core, and padded more
_GPU_BATCH = 16384


def score_requests(
    model: torch.nn.Module,
    requests: Sequence[Request],
    *,
    batch_tokens: int | None = None,
    greedy: bool = False,
    where: str = "log-likelihoods",
) -> Likelihoods:
    """Log-likelihoods of requests on a causal language model of transformers, where it is and in its own dtype.

    Args:
        model: left in the mode (training or not) it was in.
        batch_tokens: tokens a forward pass; None for a default by device.
        greedy, where: see `log_likelihoods`.

    Raises:
        UserError: a log-likelihood is not finite.
    """
    longest = max((len(request.context) + len(request.continuation) for request in requests), default=0)
    with evaluating(model):
        return log_likelihoods(
            forward_of(model),
            requests,
            pack=takes_packed_rows(model, longest),
            batch_tokens=batch_tokens or default_batch_tokens(next(model.parameters()).device),
            greedy=greedy,
            where=where,
        )


def forward_of(model: torch.nn.Module) -> Forward:
    """A model as a function from rows to logits.

    In most families of this project the logits are what the head makes of the last hidden state, and the head reads
    the wanted positions alone. Where a model does more to its logits (a scale, a soft cap) it is asked for those of the
    columns that any row wants; of an unknown model all logits are made.
    """
    weight = next(model.parameters())
    family = _family_of(model)
    head = None if family is None else model.get_submodule(family.head_in_memory)
    if head is not None and not makes_the_logits(head, model):
        head = None

    def run(rows: Rows) -> Tensor:
        inputs = inputs_of(model, rows)
        row_N, column_N = rows.row_N.to(weight.device), rows.column_N.to(weight.device)
        if family is None:
            return model(**inputs).logits[row_N, column_N]
        if head is None:
            columns, place_N = column_N.unique(return_inverse=True)
            return model(**inputs, logits_to_keep=columns).logits[row_N, place_N]
        base: Any = model.base_model
        return head(base(**inputs).last_hidden_state[row_N, column_N])

    return run


@torch.no_grad()
def makes_the_logits(head: torch.nn.Module, model: torch.nn.Module) -> bool:
    """Whether a model's logits are its head's output and nothing else, found on a few tokens."""
    ids_BT = torch.arange(4, device=next(model.parameters()).device)[None]
    base: Any = model.base_model
    own, whole = head(base(input_ids=ids_BT, use_cache=False).last_hidden_state), model(input_ids=ids_BT).logits
    return bool(torch.allclose(own.float(), whole.float(), rtol=1e-2, atol=1e-2))


def inputs_of(model: torch.nn.Module, rows: Rows) -> dict[str, Any]:
    """Rows as the keyword arguments of a model of transformers, on its device."""
    weight = next(model.parameters())
    inputs: dict[str, Any] = {"input_ids": rows.ids_BT.to(weight.device), "use_cache": False}
    if rows.attend_BTT is not None:
        assert rows.positions_BT is not None
        additive = getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager"
        inputs["attention_mask"] = _mask(rows.attend_BTT.to(weight.device), weight.dtype, additive)
        inputs["position_ids"] = rows.positions_BT.to(weight.device)
    return inputs


def takes_packed_rows(model: torch.nn.Module, longest: int) -> bool:
    """Whether a model can be given rows of several continuations, none longer by itself than `longest` tokens."""
    config: Any = getattr(model, "config", None)
    if _family_of(model) is None:
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    window = getattr(config, "sliding_window", None)
    return not window or longest <= window


def default_batch_tokens(device: torch.device) -> int:
    """Tokens a forward pass that keep a device busy."""
    return _CPU_BATCH if device.type == "cpu" else _GPU_BATCH


def _family_of(model: torch.nn.Module) -> Family | None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, PreTrainedModel):  # wrapped, by PEFT for example: its forward may do more
        return None
    return next((family for family in known_families().values() if kind in family.model_types), None)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _mask(attend_BTT: Tensor, dtype: torch.dtype, additive: bool) -> Tensor:
    """One mask for all heads: booleans, or what is added to attention scores."""
    attend_B1TT = attend_BTT[:, None]
    if not additive:
        return attend_B1TT
    mask_B1TT = torch.zeros(attend_B1TT.shape, dtype=dtype, device=attend_BTT.device)
    return mask_B1TT.masked_fill(~attend_B1TT, torch.finfo(dtype).min)
