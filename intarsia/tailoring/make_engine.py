"""The engine that a family file names."""

from __future__ import annotations

from collections.abc import Sequence

from intarsia.tailoring import family_file
from intarsia.tailoring.engine import Engine, Start
from intarsia.tailoring.engines.evolve import evolve
from intarsia.tailoring.engines.random_search import random_search
from intarsia.tailoring.engines.smac import Smac, require_smac
from intarsia.tailoring.family_file import SearchSpec
from intarsia.tailoring.space import Space


def check_engine(name: family_file.Engine) -> None:
    """Refuse an engine whose packages are not installed.

    Raises:
        UserError: naming the extra that has them.
    """
    if name == "smac":
        require_smac()


def make_engine(
    spec: SearchSpec, space: Space, budgets: Sequence[int], objectives: Sequence[str], starts: Sequence[Start]
) -> Engine:
    """A new engine.

    Raises:
        UserError: its packages are not installed.
    """
    if spec.engine == "random":
        return random_search(space, budgets, eta=spec.eta, seed=spec.seed, starts=starts)
    if spec.engine == "evolve":
        return evolve(space, budgets, eta=spec.eta, seed=spec.seed, starts=starts)
    return Smac(space, budgets, objectives=objectives, eta=spec.eta, seed=spec.seed, starts=starts)
