"""Validate the options of a plan, and estimate what it takes."""

from __future__ import annotations

from dataclasses import dataclass

from intarsia.errors import UserError
from intarsia.healing.settings import ClosedFormSettings
from intarsia.pruning.estimate import Estimate, estimate
from intarsia.pruning.finalists import check_finalists
from intarsia.pruning.ladder import METHODS, planner_of, progressive_methods, settings_of
from intarsia.pruning.settings import Settings
from intarsia.stages.setup import check_seq_len
from intarsia.stages.source import Source
from intarsia.stages.target import target_depth


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a plan is to do.

    Attributes:
        settings: of the method: as given, or its defaults.
        in_loop: how it repairs what a step changes before the next, if at all.
    """

    method: str
    settings: Settings | None
    in_loop: ClosedFormSettings | None
    target: int
    batch_tokens: int | None
    estimate: Estimate


def check_method(method: str, *, heal_in_loop: bool = False) -> None:
    """Refuse what is not one of `METHODS`, or cannot repair as it goes.

    Raises:
        UserError: listing those that can.
    """
    if method not in METHODS:
        raise UserError.of(
            where="--method", expected=f"one of {', '.join(METHODS)}", found=repr(method), remedy="Choose one of them."
        )
    able = ", ".join(progressive_methods())
    if heal_in_loop and method not in progressive_methods():
        raise UserError.of(
            where="--heal-in-loop",
            expected=f"a progressive method, which measures the model after every step: {able}",
            found=f"{method}, which decides once on the whole model",
            remedy="Choose one of them, or leave it out: `compress` and `heal` repair afterwards what any method cuts.",
        )


def asked(
    source: Source,
    method: str,
    given: Settings | None,
    *,
    layers: int | None,
    sparsity: float | None,
    in_loop: ClosedFormSettings | None,
    batch_tokens: int | None,
) -> Asked:
    """What is asked for, as far as it can be done.

    Args:
        given: settings, which count where they are the method's.

    Raises:
        UserError: it cannot be done.
    """
    settings = settings_of(method, given)
    check_finalists(method, settings, in_loop)
    target = target_depth(source.checkpoint, layers=layers, sparsity=sparsity)
    check_seq_len(source.checkpoint, source.seq_len)
    return Asked(
        method=method,
        settings=settings,
        in_loop=in_loop,
        target=target,
        batch_tokens=batch_tokens,
        estimate=estimate(
            source.checkpoint,
            planner_of(method, settings),
            target,
            tokens=source.tokens,
            seq_len=source.seq_len,
            dtype=source.dtype,
            in_loop=in_loop,
        ),
    )
