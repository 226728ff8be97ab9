"""Intarsia: make a large language model shallower, and keep what the removed layers knew.

    import intarsia

    result = intarsia.compress("demo", "out/demo-25", layers=25)

Every stage of the command line is a function of the same name: `plan`, `build`, `heal`, `inspect`, `verify`, `export`,
`evaluate_perplexity`, `evaluate_tasks`, and `compress`, which is the main job. Input that cannot be used raises
`UserError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intarsia.commands.compress import CompressResult, compress
    from intarsia.commands.heal import HealResult
    from intarsia.commands.plan import PlanResult, plan
    from intarsia.commands.tailor import TailorResult, tailor
    from intarsia.errors import UserError
    from intarsia.evaluation.task_results import TaskResults
    from intarsia.pruning.methods.come import ComeSettings
    from intarsia.recipe.recipe import Recipe
    from intarsia.stages.bench import BenchResult, bench
    from intarsia.stages.build import BuildResult, build
    from intarsia.stages.compare import CompareResult, compare
    from intarsia.stages.evaluate import evaluate_perplexity
    from intarsia.stages.evaluate_tasks import evaluate_tasks
    from intarsia.stages.export import ExportResult, export
    from intarsia.stages.heal import heal
    from intarsia.stages.inspect import inspect
    from intarsia.stages.push import PushResult, push
    from intarsia.stages.report import ReportResult, report
    from intarsia.stages.verify import VerifyResult, verify

__version__ = "0.1.0"

_PLACES = {
    "BenchResult": "intarsia.stages.bench",
    "BuildResult": "intarsia.stages.build",
    "ComeSettings": "intarsia.pruning.methods.come",
    "CompareResult": "intarsia.stages.compare",
    "CompressResult": "intarsia.commands.compress",
    "ExportResult": "intarsia.stages.export",
    "HealResult": "intarsia.commands.heal",
    "PlanResult": "intarsia.commands.plan",
    "PushResult": "intarsia.stages.push",
    "Recipe": "intarsia.recipe.recipe",
    "ReportResult": "intarsia.stages.report",
    "TailorResult": "intarsia.commands.tailor",
    "TaskResults": "intarsia.evaluation.task_results",
    "UserError": "intarsia.errors",
    "VerifyResult": "intarsia.stages.verify",
    "bench": "intarsia.stages.bench",
    "build": "intarsia.stages.build",
    "compare": "intarsia.stages.compare",
    "compress": "intarsia.commands.compress",
    "evaluate_perplexity": "intarsia.stages.evaluate",
    "evaluate_tasks": "intarsia.stages.evaluate_tasks",
    "export": "intarsia.stages.export",
    "heal": "intarsia.commands.heal",
    "inspect": "intarsia.stages.inspect",
    "plan": "intarsia.commands.plan",
    "push": "intarsia.stages.push",
    "report": "intarsia.stages.report",
    "tailor": "intarsia.commands.tailor",
    "verify": "intarsia.stages.verify",
}

__all__ = [
    "BenchResult",
    "BuildResult",
    "ComeSettings",
    "CompareResult",
    "CompressResult",
    "ExportResult",
    "HealResult",
    "PlanResult",
    "PushResult",
    "Recipe",
    "ReportResult",
    "TailorResult",
    "TaskResults",
    "UserError",
    "VerifyResult",
    "bench",
    "build",
    "compare",
    "compress",
    "evaluate_perplexity",
    "evaluate_tasks",
    "export",
    "heal",
    "inspect",
    "plan",
    "push",
    "report",
    "tailor",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load what is asked for, and nothing before: torch takes seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
