"""Intarsia: make a large language model shallower, and keep what the removed layers knew.

    import intarsia

    result = intarsia.compress("demo", "out/demo-25", layers=25)

Every stage of the command line is a function of the same name: `plan`, `build`, `heal`, `inspect`,
`evaluate_perplexity`, and `compress`, which is the main job. Input that cannot be used raises `UserError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intarsia.errors import UserError
    from intarsia.planning.settings import ComeSettings
    from intarsia.recipe.recipe import Recipe
    from intarsia.stages.build import BuildResult, build
    from intarsia.stages.compress import CompressResult, compress
    from intarsia.stages.evaluate import evaluate_perplexity
    from intarsia.stages.heal import HealResult, heal
    from intarsia.stages.inspect import inspect
    from intarsia.stages.plan import PlanResult, plan

__version__ = "0.1.0"

_PLACES = {
    "BuildResult": "intarsia.stages.build",
    "ComeSettings": "intarsia.planning.settings",
    "CompressResult": "intarsia.stages.compress",
    "HealResult": "intarsia.stages.heal",
    "PlanResult": "intarsia.stages.plan",
    "Recipe": "intarsia.recipe.recipe",
    "UserError": "intarsia.errors",
    "build": "intarsia.stages.build",
    "compress": "intarsia.stages.compress",
    "evaluate_perplexity": "intarsia.stages.evaluate",
    "heal": "intarsia.stages.heal",
    "inspect": "intarsia.stages.inspect",
    "plan": "intarsia.stages.plan",
}

__all__ = [
    "BuildResult",
    "ComeSettings",
    "CompressResult",
    "HealResult",
    "PlanResult",
    "Recipe",
    "UserError",
    "build",
    "compress",
    "evaluate_perplexity",
    "heal",
    "inspect",
    "plan",
]


def __getattr__(name: str) -> Any:
    """Load what is asked for, and nothing before: torch takes seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
