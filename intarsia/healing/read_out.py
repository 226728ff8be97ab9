"""A causal language model as two parts: what makes the last hidden state, and the head that reads it.

So that losses can go through the head a few rows at a time. Where a model does more to its logits than its head does
(a scale, a soft cap), its trunk gives the whole logits and its head nothing: slower, and right.

Shape suffixes: `B` sequences, `T` tokens, `D` residual width, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.anatomy.spec import Anatomy


class ReadOut:
    """The two parts of a model. Holds the model without owning it, so that no wrapper sees its parameters twice."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self.model = model
        self._head: nn.Module | None = model.get_submodule(anatomy.family.head_in_memory)
        self._check()

    def trunk(
        self, ids_BT: Tensor, mask_BT: Tensor | None, *, hidden: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What `head` reads, `[B, T, ...]`, and, if asked for, the hidden states behind the embedding and every layer.

        The last hidden state is behind the final norm.
        """
        given: dict[str, Any] = {
            "input_ids": ids_BT,
            "attention_mask": None if mask_BT is None else mask_BT.long(),
            "use_cache": False,
            "output_hidden_states": hidden,
        }
        if self._head is None:
            out = self.model(**given)
            return out.logits, tuple(out.hidden_states) if hidden else ()
        out = self.model.base_model(**given)
        return out.last_hidden_state, tuple(out.hidden_states) if hidden else ()

    def head(self, rows: Tensor) -> Tensor:
        """Logits `[N, V]` of rows of what `trunk` gave."""
        return rows if self._head is None else self._head(rows)

    @torch.no_grad()
    def _check(self) -> None:
        ids_BT = torch.arange(4, device=next(self.model.parameters()).device)[None]
        rows, _ = self.trunk(ids_BT, None)
        whole = self.model(input_ids=ids_BT, use_cache=False).logits
        if not torch.allclose(self.head(rows).float(), whole.float(), rtol=1e-2, atol=1e-2):
            self._head = None
