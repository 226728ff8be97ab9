"""How much work a plan may take: methods with their settings, each the best measured at its cost (docs/RESULTS.md)."""

from __future__ import annotations

from typing import Any

from intarsia.errors import check
from intarsia.registry import Chosen, planners

METHODS: dict[str, str] = {
    "quick": "shortgpt[plan-tokens=5120,blocks=1]",
    "standard": "come-p[spans=3,granularity=5,removals=true,plan-tokens=16384,blocks=3]",
    "thorough": "come-p[spans=5,granularity=5,removals=true,heal-in-loop=true,finalists=4,blocks=5]",
}


def method_of(method: Any, effort: str | None) -> Chosen:
    """The method that was asked for by name, or that of an effort; the standard one where neither is given.

    Raises:
        UserError: both are given, or there is no such method.
    """
    both = method is not None and effort is not None
    check((not both, "--method and --effort are both given.", "Give one: an effort chooses the method."))
    chosen: Chosen = planners.choose(METHODS[effort or "standard"] if method is None else method)
    return chosen
