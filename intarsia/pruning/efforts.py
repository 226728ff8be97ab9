"""How much work a compression may take: a method, heal stages and text, the best measured at their cost
(docs/RESULTS.md)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from intarsia.errors import check
from intarsia.options import TextSpec
from intarsia.registry import Chosen, heal_stages, planners


class Effort(NamedTuple):
    """The choices of an effort, as values of `--method`, `--heal` and `--tokens`."""

    method: str
    heal: str
    # Tokens of text.
    tokens: int = TextSpec().length


EFFORTS: dict[str, Effort] = {
    "quick": Effort("shortgpt[plan-tokens=5120,blocks=1]", "closed-form"),
    "standard": Effort(
        "shortgpt[plan-tokens=16384,blocks=3]",
        "closed-form,end-to-end[evaluations=4,epochs=2]",
    ),
    "thorough": Effort(
        "shortgpt[plan-tokens=16384,blocks=3]",
        "closed-form[fit-tokens=65536],end-to-end[evaluations=4]",
        tokens=262_144,
    ),
}


def method_of(method: Any, effort: str | None) -> Chosen:
    """The method that was asked for by name, or that of an effort; the standard one where neither is given.

    Raises:
        UserError: both are given, or there is no such method.
    """
    both = method is not None and effort is not None
    check((not both, "--method and --effort are both given.", "Give one: an effort chooses the method."))
    chosen: Chosen = planners.choose(EFFORTS[effort or "standard"].method if method is None else method)
    return chosen


def heal_of(heal: Any, method: Any, effort: str | None) -> tuple[Chosen, ...]:
    """The heal stages that were asked for; or those of the effort, and of a method asked for by name the closed form.

    Raises:
        UserError: there is no such stage.
    """
    if heal is None:
        heal = EFFORTS[effort or "standard"].heal if method is None else "closed-form"
    return heal_stages.choose_all(heal)


def text_of(text: TextSpec, effort: str | None) -> TextSpec:
    """The text that was asked for, with the tokens of the effort where no number was given."""
    return replace(text, tokens=EFFORTS[effort or "standard"].tokens) if text.tokens is None else text
