"""Intarsia: make a large language model shallower, and keep what the removed layers knew.

    import intarsia
    from intarsia import Target

    result = intarsia.compress("demo", "out/demo-25", Target(layers=25))

Every verb of the command line is a function of the same name (`eval` is `evaluate_tasks`, `evaluate_perplexity` and
`evaluate_agreement`); its options are value objects. Input that cannot be used raises `UserError`. `intarsia.registry`
has the decorators for planners, heal stages, merge operators and search engines of your own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intarsia.commands.bench import BenchResult, bench
    from intarsia.commands.build import BuildResult, build
    from intarsia.commands.compare import CompareEval, CompareResult, Entrants, compare
    from intarsia.commands.compress import CompressResult, compress
    from intarsia.commands.evaluate import TaskSpec, evaluate_agreement, evaluate_perplexity, evaluate_tasks
    from intarsia.commands.export import ExportResult, export
    from intarsia.commands.heal import HealResult, TrainingText, heal
    from intarsia.commands.inspect import inspect
    from intarsia.commands.plan import PlanResult, plan
    from intarsia.commands.push import PushResult, push
    from intarsia.commands.report import ReportResult, report
    from intarsia.commands.tailor import TailorResult, tailor
    from intarsia.commands.verify import VerifyResult, verify
    from intarsia.errors import UserError
    from intarsia.evaluation.results import TaskResults
    from intarsia.inspection.own_code import trust_remote_code
    from intarsia.options import AnswerSpec, EvalSpec, ModelRef, Output, Runtime, Target, TextSpec
    from intarsia.recipe.recipe import Recipe

__version__ = "0.2.0"

_EXPORTS = {
    "commands.bench": "BenchResult bench",
    "commands.build": "BuildResult build",
    "commands.compare": "CompareEval CompareResult Entrants compare",
    "commands.compress": "CompressResult compress",
    "commands.evaluate": "TaskSpec evaluate_agreement evaluate_perplexity evaluate_tasks",
    "commands.export": "ExportResult export",
    "commands.heal": "HealResult TrainingText heal",
    "commands.inspect": "inspect",
    "commands.plan": "PlanResult plan",
    "commands.push": "PushResult push",
    "commands.report": "ReportResult report",
    "commands.tailor": "TailorResult tailor",
    "commands.verify": "VerifyResult verify",
    "errors": "UserError",
    "inspection.own_code": "trust_remote_code",
    "evaluation.results": "TaskResults",
    "options": "AnswerSpec EvalSpec ModelRef Output Runtime Target TextSpec",
    "recipe.recipe": "Recipe",
}
_MODULES = {name: f"intarsia.{module}" for module, names in _EXPORTS.items() for name in names.split()}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Load what is used, when it is first used: torch takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*_MODULES, "__version__"])
