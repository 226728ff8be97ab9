"""SMAC (Lindauer et al., JMLR 23, 2022): a random forest proposes, Hyperband promotes, ParEGO joins objectives.

The search space is given to it in the terms of ConfigSpace.

Each layer of the base has a flag, `kept` or `removed`, so that the surrogate model sees the subset as such; what is
chosen for a layer is active only where the layer is kept, a method's settings only where the method is chosen, and so
on. Flags that remove too many or too few layers are corrected, as are merges of too few members: `candidate` is defined
for every configuration, and `configuration` gives the one that says exactly what a candidate is.

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
from intarsia.tailoring.candidate import Blend, Candidate, Choice, Join, Keep, Slot, from_plain, to_plain
from intarsia.tailoring.engine import Ask, Task
from intarsia.tailoring.space import Space

if TYPE_CHECKING:
    from ConfigSpace import Configuration, ConfigurationSpace


_KEPT = {"cut": ("kept", "removed"), "stack": ("once", "twice")}
_YES, _NO = "yes", "no"
Condition: TypeAlias = tuple[Any, Sequence[str]]
"""A hyperparameter, and the values of it at which another one means something."""


@dataclass(frozen=True, kw_only=True)
class ConfigurationMap:
    """Between configurations and the candidates of a space."""

    space: Space

    def configuration_space(self, seed: int = 0) -> ConfigurationSpace:
        """The space for ConfigSpace.

        Raises:
            UserError: ConfigSpace is not installed.
        """
        try:
            import ConfigSpace
        except ImportError as error:
            raise missing_package("ConfigSpace", where="search", extra="search", error=error) from error
        found = ConfigSpace.ConfigurationSpace(seed=seed)
        writer = _Writer(self.space, ConfigSpace)
        for position in self.space.starts:
            writer.position(position)
        # All at once: ConfigSpace sorts everything anew whenever something is added.
        found.add(*writer.parameters, *writer.conditions)
        return found

    def candidate(self, configuration: Mapping[str, Any]) -> Candidate:
        """The candidate that a configuration means."""
        values = dict(configuration)
        changed = self._changed(values)
        choices: dict[Slot, Choice] = {}
        for position in self.space.starts:
            choices[position, 0] = self._choice(_name(position), values)
            if position in changed and self.space.kind == "stack":
                choices[position, 1] = self._choice(_name(position, 1), values)
        return self.space.arrange(changed, choices)

    def configuration(self, candidate: Candidate, space: ConfigurationSpace) -> Configuration:
        """A candidate in the words of `space`, which `configuration_space` has made."""
        from ConfigSpace import Configuration

        values: dict[str, Any] = {}
        if self.space.changes:
            usual, other = _KEPT[self.space.kind]
            changed = self.space.changed(candidate.positions)
            values |= {
                f"{_name(layer)}.layer": other if layer in changed else usual for layer in range(self.space.depth)
            }
        for slot, choice in candidate.by_slot().items():
            values |= self._values(_name(*slot), choice)
        return Configuration(space, values={name: value for name, value in values.items() if name in space})

    # Reading

    def _changed(self, values: Mapping[str, Any]) -> list[int]:
        """The flagged layers; if they are too many or too few, some are drawn, the same for the same flags."""
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
        base = self.space.menu.members[0]
        op = values.get(f"{name}.op", "select")
        if op == "concat":
            first = values.get(f"{name}.variant", base)
            return Join(first=first, second=values[f"{name}.second"], share=float(values[f"{name}.share"]))
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

    # Writing

    def _values(self, name: str, choice: Choice) -> dict[str, Any]:
        if isinstance(choice, Join):
            return {
                f"{name}.op": "concat",
                f"{name}.variant": choice.first,
                f"{name}.second": choice.second,
                f"{name}.share": choice.share,
            }
        values = {**self._blend_values(name, choice.attention), f"{name}.scale": choice.scale}
        if choice.mlp is None:
            return {**values, f"{name}.mlp.op": "same"}
        return {**values, **self._blend_values(f"{name}.mlp", choice.mlp)}

    def _blend_values(self, name: str, blend: Blend) -> dict[str, Any]:
        if blend.method is None:
            return {f"{name}.op": "select", f"{name}.variant": blend.members[0]}
        members = self.space.menu.pool(blend.method)
        return {
            f"{name}.op": "merge",
            f"{name}.method": blend.method,
            **{f"{name}.with.{member}": _YES if member in blend.members else _NO for member in members},
            **{f"{name}.{key}": value for key, value in blend.values},
        }


def _name(position: int, occurrence: int = 0) -> str:
    return f"{position:03d}{'b' if occurrence else ''}"


class _Writer:
    """Collects the hyperparameters of a space, and the conditions under which each means something."""

    def __init__(self, space: Space, module: Any) -> None:
        self.space, self.module = space, module
        self.parameters: list[Any] = []
        self.conditions: list[Any] = []

    def position(self, position: int) -> None:
        """Everything about one layer (or group)."""
        name = _name(position)
        if not self.space.changes:
            self.layer(name, position, None)
            return
        usual, other = _KEPT[self.space.kind]
        share = self.space.changes / self.space.depth
        flag = self.category(f"{name}.layer", [usual, other], weights=[1.0 - share, share])
        self.layer(name, position, (flag, [usual]) if self.space.kind == "cut" else None)
        if self.space.kind == "stack":
            self.layer(_name(position, 1), position, (flag, [other]))

    def layer(self, name: str, position: int, condition: Condition | None) -> None:
        """What a layer is."""
        space, singles = self.space, self.space.menu.singles
        joins = ["concat"] if space.joinable(position) else []
        kept = ["select", *(["merge"] if space.menu.usable else [])]
        op = self.category(f"{name}.op", [*kept, *joins], condition)
        self.blend(name, op, ["select", *joins])
        if joins:
            self.category(f"{name}.second", singles, (op, joins))
            self.ordinal(f"{name}.share", space.shares, (op, joins))
        if space.separate:
            mlp = self.category(f"{name}.mlp.op", ["same", *kept], (op, kept))
            self.blend(f"{name}.mlp", mlp, ["select"])
        if len(space.scales) > 1:
            self.ordinal(f"{name}.scale", space.scales, (op, kept), default=1.0)

    def blend(self, name: str, op: Any, whole: list[str]) -> None:
        """Which members, and how they are merged."""
        menu = self.space.menu
        self.category(f"{name}.variant", menu.singles, (op, whole))
        if not menu.usable:
            return
        method = self.category(f"{name}.method", menu.usable, (op, ["merge"]))
        for member in menu.members:
            taking = [other for other in menu.usable if member in menu.pool(other)]
            if taking:
                self.category(f"{name}.with.{member}", [_YES, _NO], (method, taking))
        for key in dict.fromkeys(key for other in menu.usable for key in menu.grids[other]):
            having = [other for other in menu.usable if key in menu.grids[other]]
            # A value that another method alone has becomes the nearest one.
            grid = {value for other in having for value in menu.grids[other][key]}
            values = sorted(value for value in grid if not (key == "lambda" and value == 0.0))
            self.ordinal(f"{name}.{key}", values, (method, having))

    def category(self, name: str, words: Sequence[str], condition: Condition | None = None, **more: Any) -> Any:
        """A choice between words; the first one is the default."""
        made = self.module.CategoricalHyperparameter(name, list(words), default_value=words[0], **more)
        return self.add(made, condition)

    def ordinal(self, name: str, grid: Sequence[float], condition: Condition, default: float | None = None) -> Any:
        """A choice between numbers that have an order; the middle one is the default."""
        middle = grid[len(grid) // 2] if default is None else default
        return self.add(self.module.OrdinalHyperparameter(name, list(grid), default_value=middle), condition)

    def add(self, parameter: Any, condition: Condition | None) -> Any:
        """Add a hyperparameter that is active where its parent has one of these values."""
        self.parameters.append(parameter)
        if condition is not None:
            self.conditions.append(self.module.InCondition(parameter, *condition))
        return parameter


_ENDLESS = 10**9


@dataclass(frozen=True, kw_only=True)
class SmacSettings:
    """Options of SMAC."""

    # Candidates of the initial design.
    initial: int = 10
    # Configurations that its model looks at for each proposal.
    challengers: int = 1000
    # Local searches for each proposal.
    local_searches: int = 5

    def __post_init__(self) -> None:
        numbers = {"initial": self.initial, "challengers": self.challengers, "local-searches": self.local_searches}
        check(
            *((n >= 1, f"--{name} is {n}; it is at least 1.", "Give a larger number.") for name, n in numbers.items())
        )


@engine("smac", settings=SmacSettings)
class Smac:
    """SMAC3 with multi-fidelity and ParEGO, as published."""

    def __init__(self, task: Task, settings: SmacSettings) -> None:
        """Set SMAC up.

        Raises:
            UserError: it is not installed.
        """
        self.check()
        self._map = ConfigurationMap(space=task.space)
        self._configurations = self._map.configuration_space(task.seed)
        self._budgets = task.budgets
        # A candidate has one configuration here, so that starts and reported costs are recognised.
        self._origins: dict[Candidate, str] = {}
        for start in task.starts:
            self._origins.setdefault(start.candidate, start.origin)
        # SMAC wants a folder for its own files; nothing in it is needed.
        self._folder = Path(tempfile.mkdtemp(prefix="intarsia-smac-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        # Questions of SMAC without an answer, by candidate and budget.
        self._open: dict[tuple[Candidate, int], list[Any]] = {}
        # Costs reported before its first question, which SMAC would put into its first stage.
        self._early: list[tuple[Candidate, int, tuple[float, ...]]] = []
        self._seed: int | None = None
        self._worst: list[float] = [1.0] * len(task.objectives)
        self._facade = self._made(task, settings)

    @staticmethod
    def check() -> None:
        """Check that SMAC is installed.

        Raises:
            UserError: naming the extra that has it.
        """
        try:
            import smac  # noqa: F401
        except ImportError as error:
            instead = "choose --engine evolve"
            raise missing_package("smac", where="engine smac", extra="search", instead=instead, error=error) from error

    def _made(self, task: Task, settings: SmacSettings) -> Any:
        from smac import MultiFidelityFacade, Scenario
        from smac.intensifier.hyperband_utils import determine_HB
        from smac.multi_objective.parego import ParEGO
        from smac.runhistory import StatusType
        from smac.runhistory.encoder import RunHistoryLogScaledEncoder

        logging.getLogger("smac").setLevel(logging.CRITICAL)
        objectives, levels, most = list(task.objectives), len(task.budgets), float(task.budgets[-1])
        least = most / task.eta ** (levels - 1) * 0.999 if levels > 1 else most
        # Its own budgets, which are not whole numbers.
        self._stages: list[float] = determine_HB(least, most, task.eta)["budgets_in_stage"][0]
        scenario = Scenario(
            self._configurations,
            objectives=objectives if len(objectives) > 1 else objectives[0],
            deterministic=True,
            n_trials=_ENDLESS,  # what SMAC does next must not depend on how long the search is
            min_budget=least,
            max_budget=most,
            seed=task.seed,
            output_directory=self._folder,
        )
        first = self._first(task.seed, settings.initial)
        starts = [self._map.configuration(candidate, self._configurations) for candidate in first]
        facade = MultiFidelityFacade
        return facade(
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

    def _first(self, seed: int, count: int) -> list[Candidate]:
        """The initial design. A small space may have fewer candidates."""
        found, rng = dict.fromkeys(self._origins), Random(seed)
        for _ in range(100 * count):
            if len(found) >= count:
                break
            found.setdefault(self._map.space.random(rng))
        return list(found)

    def ask(self, n: int) -> list[Ask]:
        """SMAC's next trials; fewer where it finds no new configuration."""
        return list(islice(iter(self._next, None), n))

    def _next(self) -> Ask | None:
        from smac.main.exceptions import ConfigurationSpaceExhaustedException

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of means of nothing
            try:
                info = self._facade.ask()
            except (StopIteration, ConfigurationSpaceExhaustedException):
                return None
        self._seed = info.seed
        early, self._early = self._early, []
        for trial in early:
            self.tell(*trial)
        # ConfigSpace's words are numpy's, which print otherwise; a candidate from the log has plain ones.
        candidate = from_plain(to_plain(self._map.candidate(info.config)))
        budget = min(self._budgets, key=lambda budget: abs(budget - info.budget))
        known = self._origins.get(candidate)
        origin = "promotion" if budget > self._budgets[0] and self._seen(info) else known or str(info.config.origin)
        self._open.setdefault((candidate, budget), []).append(info)
        return Ask(candidate=candidate, budget=budget, origin=origin)

    def _seen(self, info: Any) -> bool:
        return any(trial.budget < info.budget for trial in self._facade.runhistory.get_trials(info.config, False))

    def tell(self, candidate: Candidate, budget: int, costs: tuple[float, ...] | None) -> None:
        """Into SMAC's run history. What it did not ask for counts where it succeeded at one of the budgets."""
        from smac.runhistory import TrialInfo

        waiting = self._open.get((candidate, budget))
        if waiting:
            self._enter(waiting.pop(0), costs)
        elif costs is not None and budget in self._budgets:
            if self._seed is None:
                self._early.append((candidate, budget, costs))
                return
            config = self._map.configuration(candidate, self._configurations)
            own = min(self._stages, key=lambda stage: abs(stage - budget))
            self._enter(TrialInfo(config=config, seed=self._seed, budget=own), costs)

    def _enter(self, info: Any, costs: tuple[float, ...] | None) -> None:
        from smac.runhistory import StatusType, TrialValue

        if costs is not None:
            self._worst = [max(pair) for pair in zip(self._worst, costs, strict=True)]
        found = list(costs) if costs is not None else [2.0 * abs(worst) + 1.0 for worst in self._worst]
        value = TrialValue(
            cost=found if len(found) > 1 else found[0],
            time=0.0,  # no clock decides anything
            status=StatusType.SUCCESS if costs is not None else StatusType.CRASHED,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._facade.tell(info, value, save=False)
