"""SMAC3 as an engine: a random forest as surrogate, Hyperband for the budgets, ParEGO for several objectives.

Source: Lindauer et al., JMLR 23, 2022, in the setting of GPTailor (arXiv 2506.20480). SMAC is asked and told; its own
runner is not used, because that ends the search with the worker that dies and knows no resume. Settings of SMAC that
are not its defaults, and why:

- Incumbents are those of the greatest budget. With several objectives, incumbents of different budgets stop SMAC
  (an assertion in `update_incumbents`).
- A failed trial is no point of the surrogate. Hyperband must rank it all the same, and ranks it behind everything told
  so far; that number stands in no log.
- The acquisition function is maximised over 1000 random configurations and from 5 starts of local search: hundreds of
  hyperparameters make the default of 10,000 cost more than many a trial.
- The initial design is the warm start, filled up to 10 with random candidates of the space. SMAC's own random ones
  would come before the warm start.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from intarsia.errors import missing_package
from intarsia.tailoring.candidate import Candidate
from intarsia.tailoring.config_space import ConfigurationMap
from intarsia.tailoring.engine import Ask, Start
from intarsia.tailoring.history import Trial
from intarsia.tailoring.plain import from_plain, to_plain
from intarsia.tailoring.space import Space

NAME = "smac"
_FIRST = 10
_CHALLENGERS, _LOCAL_SEARCHES = 1000, 5
_NO_END = 10**9


def require_smac() -> None:
    """Refuse where SMAC is not installed.

    Raises:
        UserError: naming the extra that has it.
    """
    try:
        import smac  # noqa: F401
    except ImportError as error:
        instead = "choose --engine evolve"
        raise missing_package("smac", where="engine smac", extra="search", instead=instead, error=error) from error


class Smac:
    """The engine."""

    name = NAME

    def __init__(
        self,
        space: Space,
        budgets: Sequence[int],
        *,
        objectives: Sequence[str],
        eta: int,
        seed: int,
        starts: Sequence[Start] = (),
    ) -> None:
        """Set SMAC up.

        Raises:
            UserError: it is not installed.
        """
        require_smac()
        self._map = ConfigurationMap(space=space)
        self._configurations = self._map.configuration_space(seed)
        self._budgets = tuple(budgets)
        # A candidate has one configuration here, so that starts and heard trials are recognised.
        self._origins: dict[Candidate, str] = {}
        for start in starts:
            self._origins.setdefault(start.candidate, start.origin)
        # SMAC wants a folder for its own files; nothing in it is needed.
        self._folder = Path(tempfile.mkdtemp(prefix="intarsia-smac-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._facade = self._made(list(objectives), eta, seed)
        self._seed: int | None = None
        self._unheard: list[Trial] = []
        self._worst: list[float] = [1.0] * len(objectives)

    def _made(self, objectives: list[str], eta: int, seed: int) -> Any:
        from smac import MultiFidelityFacade, Scenario
        from smac.multi_objective.parego import ParEGO
        from smac.runhistory import StatusType
        from smac.runhistory.encoder import RunHistoryLogScaledEncoder

        logging.getLogger("smac").setLevel(logging.CRITICAL)
        levels, most = len(self._budgets), float(self._budgets[-1])
        scenario = Scenario(
            self._configurations,
            objectives=objectives if len(objectives) > 1 else objectives[0],
            deterministic=True,
            n_trials=_NO_END,  # what SMAC does next must not depend on how long the search goes on
            min_budget=most / eta ** (levels - 1) * 0.999 if levels > 1 else most,
            max_budget=most,
            seed=seed,
            output_directory=self._folder,
        )
        starts = [self._map.configuration(candidate, self._configurations) for candidate in self._first(seed)]
        facade = MultiFidelityFacade
        return facade(
            scenario,
            None,
            acquisition_maximizer=facade.get_acquisition_maximizer(
                scenario, challengers=_CHALLENGERS, local_search_iterations=_LOCAL_SEARCHES
            ),
            initial_design=facade.get_initial_design(scenario, n_configs=0, additional_configs=starts),
            intensifier=facade.get_intensifier(scenario, eta=eta, incumbent_selection="highest_budget"),
            multi_objective_algorithm=ParEGO(scenario) if len(objectives) > 1 else None,
            runhistory_encoder=RunHistoryLogScaledEncoder(scenario, considered_states=[StatusType.SUCCESS]),
            logging_level=False,
            overwrite=True,
        )

    def _first(self, seed: int) -> list[Candidate]:
        """The initial design. A small space may not have ten candidates."""
        found, rng = dict.fromkeys(self._origins), Random(seed)
        for _ in range(100 * _FIRST):
            if len(found) >= _FIRST:
                break
            found.setdefault(self._map.space.random(rng))
        return list(found)

    def ask(self) -> Ask | None:
        """SMAC's next trial; None where it finds no new configuration."""
        from smac.main.exceptions import ConfigurationSpaceExhaustedException

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of means of nothing
            try:
                info = self._facade.ask()
            except (StopIteration, ConfigurationSpaceExhaustedException):
                return None
        self._seed = info.seed
        for trial in self._unheard:
            self.hear(trial)
        self._unheard = []
        # ConfigSpace's words are numpy's, which print otherwise; a candidate from the log has plain ones.
        candidate = from_plain(to_plain(self._map.candidate(info.config)))
        budget = min(self._budgets, key=lambda budget: abs(budget - info.budget))
        known = self._origins.get(candidate)
        origin = "promotion" if budget > self._budgets[0] and self._seen(info) else known or str(info.config.origin)
        return Ask(engine=NAME, candidate=candidate, budget=budget, origin=origin, token=info)

    def _seen(self, info: Any) -> bool:
        return any(trial.budget < info.budget for trial in self._facade.runhistory.get_trials(info.config, False))

    def tell(self, ask: Ask, trial: Trial) -> None:
        """Into SMAC's run history."""
        self._enter(ask.token, trial)

    def hear(self, trial: Trial) -> None:
        """Into SMAC's run history too, at the budget that the trial had; failed ones say nothing to it.

        Before the first question SMAC would put what it hears into its first stage, so it waits until then.
        """
        from smac.runhistory import TrialInfo

        if trial.costs is None or trial.budget not in self._budgets:
            return
        if self._seed is None:
            self._unheard.append(trial)
            return
        config = self._map.configuration(trial.candidate, self._configurations)
        self._enter(TrialInfo(config=config, seed=self._seed, budget=self._own(trial.budget)), trial)

    def _own(self, budget: int) -> float:
        """A budget in SMAC's own numbers, which are not whole."""
        stages: list[float] = self._facade.intensifier._budgets_in_stage[0]
        return min(stages, key=lambda own: abs(own - budget))

    def _enter(self, info: Any, trial: Trial) -> None:
        from smac.runhistory import StatusType, TrialValue

        fine = trial.costs is not None
        if trial.costs is not None:
            self._worst = [max(pair) for pair in zip(self._worst, trial.costs, strict=True)]
        costs = list(trial.costs) if trial.costs is not None else [2.0 * abs(worst) + 1.0 for worst in self._worst]
        value = TrialValue(
            cost=costs if len(costs) > 1 else costs[0],
            time=0.0,  # no clock decides anything
            status=StatusType.SUCCESS if fine else StatusType.CRASHED,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._facade.tell(info, value, save=False)
