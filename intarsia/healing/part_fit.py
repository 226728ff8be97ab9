"""One read-out of a layer, fitted in closed form from given inputs towards given outputs.

Shape suffixes: `B` sequences of a batch, `T` tokens, `N` tokens, `C` features, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from intarsia.anatomy.spec import Anatomy, Part
from intarsia.calibration.stream import LayerCall, LayerStream
from intarsia.healing.behind_norm import NormBehind, Passed, fit_norm, fit_weight
from intarsia.healing.ridge import Fit, Gram, choose
from intarsia.healing.scratch import IN_MEMORY, Scratch
from intarsia.heap import give_back


@dataclass(frozen=True, kw_only=True)
class FitBatch:
    """Sequences `rows`, as they go into a layer and as they should come out of it.

    `call` are the layer's other arguments. `mask` is True at real tokens; None where all are.
    """

    rows: slice
    h_BTD: Tensor
    wanted_BTD: Tensor
    call: LayerCall
    mask: Tensor | None


Batches = Callable[[], Iterable[FitBatch]]
"""Gives all batches, again every time it is called: a layer is run once for every read-out."""


@dataclass(frozen=True, kw_only=True)
class FitRule:
    """What a token counts, every how-manieth sequence is held out, and ridge strengths to choose from.

    `relative`: a token counts with 1 / |wanted|^2; `uniform`: all the same.
    """

    weighting: Literal["relative", "uniform"]
    held_out: int
    ridges: tuple[float, ...]


class PartFit:
    """One part's read-out, fitted. Each step gives a module's name, its new weight if that is better, and the fit."""

    def __init__(
        self,
        module: nn.Module,
        part: Part,
        batches: Batches,
        *,
        stream: LayerStream,
        anatomy: Anatomy,
        rule: FitRule,
        scratch: Scratch = IN_MEMORY,
    ) -> None:
        self.module, self.batches, self.stream, self.anatomy, self.rule = module, batches, stream, anatomy, rule
        self.scratch = scratch
        self.writer = anatomy.writer(part).module
        target = module.get_submodule(self.writer)
        assert isinstance(target, nn.Linear)
        self.target = target
        self.features = target.weight.shape[1]
        norm = anatomy.norm_after(part)
        self.norm_name = "" if norm is None else norm.module
        self.behind = (
            None
            if norm is None
            else NormBehind(module.get_submodule(norm.module), offset=norm.offset, scale=anatomy.residual_scale)
        )

    def norm(self, where: str) -> tuple[str, Tensor | None, Fit]:
        """The weight of the norm behind the read-out.

        Raises:
            UserError: activations are not finite.
        """
        assert self.behind is not None
        where = f"{where}, {self.norm_name}"
        weight, found = fit_norm(self.behind, self._passes, self.rule.ridges, where=where)
        return self.norm_name, weight, found

    def read_out(self, where: str) -> tuple[str, Tensor | None, Fit]:
        """The weight of the read-out.

        Raises:
            UserError: activations are not finite.
        """
        own, where = self.target.weight, f"{where}, {self.writer}"
        if self.behind is not None:
            ridges = self.rule.ridges
            return self.writer, *fit_weight(self.behind, own, self._passes, ridges, where=where, scratch=self.scratch)
        give_back()  # what is free since the layer was made, and below what is free since it was run
        moments = self._moments()
        give_back()
        found = choose(*moments, self.rule.ridges, where=where)
        del moments
        weight = found.applied(own)
        return self.writer, weight, replace(found, change_DC=None)  # as large as the weight in float32

    def judged(self, weight: Tensor, found: Fit) -> tuple[Tensor | None, Fit]:
        """A read-out's new weight with the error that it really leaves; none, where that is no less than before."""
        own = self.target.weight
        self.target.weight = nn.Parameter(weight, requires_grad=False)
        total, tokens = 0.0, 0
        for passed in self._passes():
            weight_N = passed.weight_N[passed.held_N]
            total += float((weight_N * passed.missing_ND[passed.held_N].square().sum(-1)).sum())
            tokens += int((weight_N > 0).sum())
        self.target.weight = own
        after = total / max(tokens, 1)
        if after < found.error_before:
            return weight, replace(found, error_after=after)
        return None, replace(found, change_DC=None, ridge=None, error_after=found.error_before)

    def _moments(self) -> tuple[Gram, Gram]:
        """Moments of the inputs and of what is missing: to fit on, and of held-out sequences."""
        scale = self.anatomy.residual_scale
        features, width, device = self.features, self.anatomy.width, self.stream.device
        fitted = Gram(features, width, device, scratch=self.scratch)
        held_out = Gram(features, width, device, held_out=True, scratch=self.scratch)
        for passed in self._passes():
            for gram, chosen in ((fitted, ~passed.held_N), (held_out, passed.held_N)):
                if bool(chosen.any()):
                    weight_N = passed.weight_N[chosen] * scale**2
                    gram.add(passed.x_NC[chosen], passed.missing_ND[chosen] / scale, weight_N)
        return fitted, held_out

    def _passes(self) -> Iterator[Passed]:
        for batch in self.batches():
            with _seen(self.target) as seen:
                out_BTD = self.stream.run(self.module, batch.h_BTD, batch.call)
            x, y = seen[0]
            rows = torch.arange(batch.rows.start, batch.rows.stop, device=out_BTD.device) % self.rule.held_out == 0
            missing_BTD = batch.wanted_BTD.float() - out_BTD.float()
            yield Passed(
                x_NC=x.reshape(-1, self.features),
                y_ND=y.reshape(-1, y.shape[-1]),
                missing_ND=missing_BTD.reshape(-1, missing_BTD.shape[-1]),
                weight_N=_weights(batch, self.rule.weighting).reshape(-1),
                held_N=rows[:, None].expand(out_BTD.shape[:2]).reshape(-1),
            )


def _weights(batch: FitBatch, weighting: str) -> Tensor:
    if weighting == "relative":
        weight_BT = batch.wanted_BTD.float().square().sum(dim=-1).clamp_min(1e-12).reciprocal()
    else:
        weight_BT = torch.ones(batch.wanted_BTD.shape[:2], device=batch.wanted_BTD.device)
    return weight_BT if batch.mask is None else weight_BT * batch.mask


@contextmanager
def _seen(target: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What a read-out is given and gives while the layer runs."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = target.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        yield seen
    finally:
        handle.remove()
