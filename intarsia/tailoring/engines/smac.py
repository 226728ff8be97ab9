"""SMAC (Lindauer et al., JMLR 23, 2022): a random forest proposes, Hyperband promotes, ParEGO joins objectives.

The search space is written as a ConfigSpace.

Each layer of the base has a flag, `kept` or `removed`, so that the surrogate model sees the subset as such. Choices for
a layer are active only if it is kept, settings of a method only if it is chosen, and so on. Flags that remove too many
or too few layers are corrected, as are merges of too few members: `candidate` is defined for every configuration, and
`configuration` gives the exact one of a candidate.

Names: `012.op` is the op of layer 12, `012.mlp.method` the method for its MLP, `012b.op` that of its second copy in a
stack.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

from intarsia.errors import check, missing_package
from intarsia.registry import engine
from intarsia.tailoring.candidate import Blend, Candidate, Choice, Join, Keep, from_plain, to_plain
from intarsia.tailoring.engine import Ask, Task
from intarsia.tailoring.space import Space

if TYPE_CHECKING:
    from ConfigSpace import Configuration, ConfigurationSpace


_KEPT = {"prune": ("kept", "removed"), "stack": ("once", "twice")}
_YES, _NO = "yes", "no"
_CONCAT, _HALVES = "concat", "half-layers"
_ENDLESS = 10**9
Condition: TypeAlias = tuple[Any, Sequence[str]]
"""A hyperparameter, and the values at which another one is active."""


@dataclass(frozen=True, kw_only=True)
class ConfigurationMap:
    """Translates between configurations and candidates of a space."""

    space: Space

    def configuration_space(self, seed: int = 0) -> ConfigurationSpace:
        """The space as a ConfigSpace."""
        from ConfigSpace import ConfigurationSpace

        found, writer = ConfigurationSpace(seed=seed), _Writer(self.space)
        for position in self.space.starts:
            writer.position(position)
        # All at once: ConfigSpace sorts everything on every addition.
        found.add(*writer.parameters, *writer.conditions)
        return found

    def candidate(self, configuration: Mapping[str, Any]) -> Candidate:
        """The candidate of a configuration."""
        values, space = dict(configuration), self.space
        changed = self._changed(values)
        slots = [(position, 0) for position in space.starts]
        slots += [(position, 1) for position in changed if space.kind == "stack"]
        return space.arrange(changed, {slot: self._choice(_name(*slot), values) for slot in slots})

    def configuration(self, candidate: Candidate, space: ConfigurationSpace) -> Configuration:
        """A candidate as a configuration of `space`, which `configuration_space` made."""
        from ConfigSpace import Configuration

        values: dict[str, Any] = {}
        if self.space.changes:
            usual, other = _KEPT[self.space.kind]
            changed = self.space.changed(candidate.positions)
            values = {f"{_name(at)}.layer": other if at in changed else usual for at in range(self.space.depth)}
        for slot, choice in candidate.by_slot().items():
            name = _name(*slot)
            if isinstance(choice, Join):
                values |= {f"{name}.op": _HALVES if choice.share is None else _CONCAT, f"{name}.variant": choice.first}
                values |= {f"{name}.second": choice.second, f"{name}.share": choice.share}
                continue
            values |= {**self._blend_values(name, choice.attention), f"{name}.scale": choice.scale}
            if choice.mlp is None:
                values[f"{name}.mlp.op"] = "same"
            else:
                values |= self._blend_values(f"{name}.mlp", choice.mlp)
        known = {name: value for name, value in values.items() if name in space and value is not None}
        return Configuration(space, values=known)

    def _changed(self, values: Mapping[str, Any]) -> list[int]:
        """The flagged layers; corrected at random, but reproducibly, if they are too many or too few."""
        if not self.space.changes:
            return []
        other = _KEPT[self.space.kind][1]
        flagged = [layer for layer in range(self.space.depth) if values.get(f"{_name(layer)}.layer") == other]
        rng = Random(int.from_bytes(hashlib.sha256(repr(flagged).encode()).digest()[:8], "little"))
        if len(flagged) > self.space.changes:
            return sorted(rng.sample(flagged, self.space.changes))
        rest = [layer for layer in range(self.space.depth) if layer not in flagged]
        return sorted([*flagged, *rng.sample(rest, self.space.changes - len(flagged))])

    def _choice(self, name: str, values: Mapping[str, Any]) -> Choice:
        op = values.get(f"{name}.op", "select")
        if op in (_CONCAT, _HALVES):
            share = float(values[f"{name}.share"]) if op == _CONCAT else None
            return Join(first=values[f"{name}.variant"], second=values[f"{name}.second"], share=share)
        attention = self._blend(name, op, values)
        other = values.get(f"{name}.mlp.op", "same")
        mlp = None if other == "same" else self._blend(f"{name}.mlp", other, values)
        scale = float(values.get(f"{name}.scale", 1.0))
        return Keep(attention=attention, mlp=None if mlp == attention else mlp, scale=scale)

    def _blend(self, name: str, op: str, values: Mapping[str, Any]) -> Blend:
        menu = self.space.menu
        if op == "select":
            return Blend(members=(values.get(f"{name}.variant", menu.members[0]),))
        method = values[f"{name}.method"]
        members = [member for member in menu.members if values.get(f"{name}.with.{member}", _NO) == _YES]
        given = {key: float(values[f"{name}.{key}"]) for key in menu.grids[method] if f"{name}.{key}" in values}
        return menu.nearest(members, method, given)

    def _blend_values(self, name: str, blend: Blend) -> dict[str, Any]:
        if blend.method is None:
            return {f"{name}.op": "select", f"{name}.variant": blend.members[0]}
        pool = self.space.menu.sizes(blend.method)[0]
        return {
            f"{name}.op": "merge",
            f"{name}.method": blend.method,
            **{f"{name}.with.{member}": _YES if member in blend.members else _NO for member in pool},
            **{f"{name}.{key}": value for key, value in blend.values},
        }


def _name(position: int, occurrence: int = 0) -> str:
    return f"{position:03d}{'b' if occurrence else ''}"


class _Writer:
    """Collects the hyperparameters of a space, and the conditions under which each is active."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.parameters: list[Any] = []
        self.conditions: list[Any] = []

    def position(self, position: int) -> None:
        """Add the hyperparameters of one layer (or group)."""
        name = _name(position)
        if not self.space.changes:
            self.layer(name, position, None)
            return
        usual, other = _KEPT[self.space.kind]
        share = self.space.changes / self.space.depth
        flag = self.category(f"{name}.layer", [usual, other], weights=[1.0 - share, share])
        self.layer(name, position, (flag, [usual]) if self.space.kind == "prune" else None)
        if self.space.kind == "stack":
            self.layer(_name(position, 1), position, (flag, [other]))

    def layer(self, name: str, position: int, condition: Condition | None) -> None:
        """Add the choice of one layer."""
        space, singles = self.space, self.space.menu.singles
        runs = range(1, min(space.changes, space.depth - 1 - position) + 1)
        shares = {share for run in runs for share in space.joins(position, [position + run + 1])}
        joins = [op for op, possible in ((_CONCAT, shares - {None}), (_HALVES, None in shares)) if possible]
        kept = ["select", *(["merge"] if space.menu.methods else [])]
        op = self.category(f"{name}.op", [*kept, *joins], condition)
        self.blend(name, op, ["select", *joins])
        if joins:
            self.category(f"{name}.second", singles, (op, joins))
        if _CONCAT in joins:
            self.ordinal(f"{name}.share", space.shares, (op, [_CONCAT]))
        if space.separate:
            mlp = self.category(f"{name}.mlp.op", ["same", *kept], (op, kept))
            self.blend(f"{name}.mlp", mlp, ["select"])
        if len(space.scales) > 1:
            self.ordinal(f"{name}.scale", space.scales, (op, kept), default=1.0)

    def blend(self, name: str, op: Any, whole: list[str]) -> None:
        """Add the members of a blend, and how they are merged."""
        menu = self.space.menu
        self.category(f"{name}.variant", menu.singles, (op, whole))
        if not menu.methods:
            return
        method = self.category(f"{name}.method", menu.methods, (op, ["merge"]))
        for member in menu.members:
            taking = [other for other in menu.methods if member in menu.sizes(other)[0]]
            if taking:
                self.category(f"{name}.with.{member}", [_YES, _NO], (method, taking))
        for key in dict.fromkeys(key for other in menu.methods for key in menu.grids[other]):
            having = [other for other in menu.methods if key in menu.grids[other]]
            # A value that only another method has becomes the nearest one.
            grid = {value for other in having for value in menu.grids[other][key]}
            values = sorted(value for value in grid if not (key == "lambda" and value == 0.0))
            self.ordinal(f"{name}.{key}", values, (method, having))

    def category(self, name: str, words: Sequence[str], condition: Condition | None = None, **more: Any) -> Any:
        """Add a choice between names; the first is the default."""
        from ConfigSpace import CategoricalHyperparameter

        return self.add(CategoricalHyperparameter(name, list(words), default_value=words[0], **more), condition)

    def ordinal(self, name: str, grid: Sequence[float], condition: Condition, default: float | None = None) -> None:
        """Add a choice between ordered numbers; the middle one is the default."""
        from ConfigSpace import OrdinalHyperparameter

        middle = grid[len(grid) // 2] if default is None else default
        self.add(OrdinalHyperparameter(name, list(grid), default_value=middle), condition)

    def add(self, parameter: Any, condition: Condition | None) -> Any:
        """Add a hyperparameter that is active if its parent has one of these values."""
        from ConfigSpace import InCondition

        self.parameters.append(parameter)
        if condition is not None:
            self.conditions.append(InCondition(parameter, condition[0], list(condition[1])))
        return parameter


@dataclass(frozen=True, kw_only=True)
class SmacSettings:
    """Options of SMAC."""

    # Candidates of the initial design.
    initial: int = 10
    # Configurations that the surrogate model ranks for each proposal.
    challengers: int = 1000
    # Local searches for each proposal.
    local_searches: int = 5

    def __post_init__(self) -> None:
        numbers = {"initial": self.initial, "challengers": self.challengers, "local-searches": self.local_searches}
        check(
            *(
                (n >= 1, f"--{name} is {n}; it must be at least 1.", "Give a larger number.")
                for name, n in numbers.items()
            )
        )


@engine("smac", settings=SmacSettings)
class Smac:
    """SMAC3 with multi-fidelity and ParEGO, as published."""

    def __init__(self, task: Task, settings: SmacSettings) -> None:
        """Set up SMAC.

        Raises:
            UserError: SMAC is not installed.
        """
        self.check()
        from smac import MultiFidelityFacade, Scenario
        from smac.intensifier.hyperband_utils import determine_HB
        from smac.multi_objective.parego import ParEGO
        from smac.runhistory import StatusType
        from smac.runhistory.encoder import RunHistoryLogScaledEncoder

        logging.getLogger("smac").setLevel(logging.CRITICAL)
        self._map = ConfigurationMap(space=task.space)
        self._configurations = self._map.configuration_space(task.seed)
        self._origins = {start.candidate: start.origin for start in reversed(task.starts)}
        # Trials of SMAC without a result, by candidate and budget.
        self._open: dict[tuple[Candidate, int], list[Any]] = {}
        # Trials of an earlier search; held until SMAC's first proposal, because earlier they would fill its first
        # stage.
        self._early: list[tuple[Candidate, int, tuple[float, ...]]] = []
        self._seed: int | None = None
        self._worst = [1.0] * len(task.objectives)
        # SMAC needs a folder for its own files, which nothing reads.
        folder = Path(tempfile.mkdtemp(prefix="intarsia-smac-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        objectives, levels, most = list(task.objectives), len(task.budgets), float(task.budgets[-1])
        least = most / task.eta ** (levels - 1) * 0.999 if levels > 1 else most
        self._budgets = task.budgets
        # SMAC's budgets, which are not whole numbers.
        self._stages: list[float] = determine_HB(least, most, task.eta)["budgets_in_stage"][0]
        scenario = Scenario(
            self._configurations,
            objectives=objectives if len(objectives) > 1 else objectives[0],
            deterministic=True,
            n_trials=_ENDLESS,  # proposals must not depend on the length of the search
            min_budget=least,
            max_budget=most,
            seed=task.seed,
            output_directory=folder,
        )
        # Each candidate has one configuration, so that SMAC recognises starts and reported costs.
        starts = [self._map.configuration(each, self._configurations) for each in self._first(task, settings.initial)]
        facade = MultiFidelityFacade
        self._facade: Any = facade(
            scenario,
            None,
            acquisition_maximizer=facade.get_acquisition_maximizer(
                scenario, challengers=settings.challengers, local_search_iterations=settings.local_searches
            ),
            initial_design=facade.get_initial_design(scenario, n_configs=0, additional_configs=starts),
            intensifier=facade.get_intensifier(scenario, eta=task.eta, incumbent_selection="highest_budget"),
            multi_objective_algorithm=ParEGO(scenario) if len(objectives) > 1 else None,
            runhistory_encoder=RunHistoryLogScaledEncoder(scenario, considered_states=[StatusType.SUCCESS]),
            logging_level=False,
            overwrite=True,
        )

    @staticmethod
    def check() -> None:
        """Check that SMAC is installed.

        Raises:
            UserError: it is not; the hint names the extra to install.
        """
        try:
            import smac  # noqa: F401
        except ImportError as error:
            instead = "choose --engine evolve"
            raise missing_package("smac", where="engine smac", extra="search", instead=instead, error=error) from error

    def _first(self, task: Task, count: int) -> list[Candidate]:
        """The initial design: starts, then random candidates; a small space may have fewer."""
        found, rng = dict.fromkeys(start.candidate for start in task.starts), Random(task.seed)
        for _ in range(100 * count):
            if len(found) >= count:
                break
            found.setdefault(task.space.random(rng))
        return list(found)

    def ask(self, n: int) -> list[Ask]:
        """SMAC's next trials; fewer if it finds no new configuration."""
        return list(islice(iter(self._next, None), n))

    def _next(self) -> Ask | None:
        from smac.main.exceptions import ConfigurationSpaceExhaustedException

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns about means of empty arrays
            try:
                info = self._facade.ask()
            except (StopIteration, ConfigurationSpaceExhaustedException):
                return None
        self._seed = info.seed
        early, self._early = self._early, []
        for trial in early:
            self.tell(*trial)
        # ConfigSpace gives numpy strings, which print differently from the plain ones in the log.
        candidate = from_plain(to_plain(self._map.candidate(info.config)))
        budget = min(self._budgets, key=lambda budget: abs(budget - info.budget))
        earlier = self._facade.runhistory.get_trials(info.config, False)
        origin = self._origins.get(candidate) or str(info.config.origin)
        if budget > self._budgets[0] and any(trial.budget < info.budget for trial in earlier):
            origin = "promotion"
        self._open.setdefault((candidate, budget), []).append(info)
        return Ask(candidate=candidate, budget=budget, origin=origin)

    def tell(self, candidate: Candidate, budget: int, costs: tuple[float, ...] | None) -> None:
        """Add a result to SMAC's run history; one it did not ask for counts if it succeeded at one of the budgets."""
        from smac.runhistory import StatusType, TrialInfo, TrialValue

        waiting = self._open.get((candidate, budget))
        if waiting:
            info = waiting.pop(0)
        elif costs is None or budget not in self._budgets:
            return
        elif self._seed is None:
            self._early.append((candidate, budget, costs))
            return
        else:
            own = min(self._stages, key=lambda stage: abs(stage - budget))
            config = self._map.configuration(candidate, self._configurations)
            info = TrialInfo(config=config, seed=self._seed, budget=own)
        # A failure costs a little more than the worst: SMAC scales by the range of all costs.
        found = [2.0 * abs(worst) + 1.0 for worst in self._worst] if costs is None else list(costs)
        if costs is not None:
            self._worst = [max(pair) for pair in zip(self._worst, costs, strict=True)]
        value = TrialValue(
            cost=found if len(found) > 1 else found[0],
            time=0.0,  # no result depends on a clock
            status=StatusType.CRASHED if costs is None else StatusType.SUCCESS,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._facade.tell(info, value, save=False)
