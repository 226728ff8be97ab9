"""Engines on costs that are known: what they ask for, what they promote, and that they find what is good."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from intarsia.errors import UserError
from intarsia.recipe.recipe import Recipe
from intarsia.recipe.schema import content_hash
from intarsia.registry import engines
from intarsia.tailoring.candidate import Candidate, Join, single
from intarsia.tailoring.engine import Engine, Stage, Staged, Start, Task, budget_ladder, expected_trials
from intarsia.tailoring.recipes import Translator
from intarsia.tailoring.run import History
from intarsia.tailoring.search import InProcess, Search
from intarsia.tailoring.space import Space
from tests.tailoring.conftest import make_translator
from tests.tailoring.known_costs import OBJECTIVES, Known, noise, true_costs

needs_smac = pytest.mark.skipif(importlib.util.find_spec("smac") is None, reason="smac is not installed")
BUDGETS = (4, 12, 36)
Make = Callable[[Space], Engine]


def made(
    name: str, space: Space, *, seed: int = 0, starts: Sequence[Start] = (), budgets: tuple[int, ...] = BUDGETS
) -> Engine:
    task = Task(space=space, budgets=budgets, objectives=OBJECTIVES, seed=seed, starts=tuple(starts))
    engine: Engine = engines.choose(name).create(task)
    return engine


def run(engine: Engine, translator: Translator, path: Path, trials: int, scorer: Known | None = None) -> History:
    history = History(path)
    task = Task(space=translator.space, budgets=BUDGETS, objectives=OBJECTIVES)
    workers = InProcess((scorer or Known()).evaluate)
    Search(
        engine=engine,
        task=task,
        history=history,
        workers=workers,
        trials=trials,
        name="x",
        recipe_of=translator.recipe,
    ).run()
    return history


ENGINES = [
    "random",
    "evolve",
    pytest.param("smac", marks=needs_smac),
]


@pytest.mark.parametrize(
    ("least", "most", "eta", "budgets"),
    [
        (16, 256, 3, (28, 85, 256)),
        (1, 27, 3, (1, 3, 9, 27)),
        (10, 10, 3, (10,)),
        (10, 19, 2, (19,)),
        (10, 20, 2, (10, 20)),
        (1, 1000, 10, (1, 10, 100, 1000)),
    ],
)
def test_budgets(least: int, most: int, eta: int, budgets: tuple[int, ...]) -> None:
    assert budget_ladder(least, most, eta) == budgets


def test_expected_trials() -> None:
    assert expected_trials((1, 3, 9), 130, 3) == {1: 90, 3: 30, 9: 10}
    assert sum(expected_trials((28, 85, 256), 200, 3).values()) == 200


def test_one_of_eta_goes_on() -> None:
    """One objective, costs as they come: the best of three is promoted, of the next three the best that is left."""
    space = make_translator().space
    rng = random.Random(0)
    candidates = [space.random(rng) for _ in range(12)]
    costs = dict(zip(candidates, [5, 3, 4, 1, 9, 2, 8, 7, 6, 0, 10, 11], strict=True))
    queue = list(candidates)

    class Listed(Staged):
        def propose(self, stages: Sequence[Stage], rng: random.Random) -> tuple[Candidate, str]:
            return queue.pop(0), "listed"

    engine = Listed("listed", Task(space=space, budgets=(1, 3, 9), objectives=("one",)))
    asked: list[tuple[float, int]] = []
    for _ in range(17):
        (ask,) = engine.ask(1)
        asked.append((costs[ask.candidate], ask.budget))
        engine.tell(ask.candidate, ask.budget, (float(costs[ask.candidate]),))
    assert asked == [
        *((5, 1), (3, 1), (4, 1), (3, 3)),
        *((1, 1), (9, 1), (2, 1), (1, 3)),
        *((8, 1), (7, 1), (6, 1), (2, 3), (1, 9)),
        *((0, 1), (10, 1), (11, 1), (0, 3)),
    ]


def test_failed_candidates_never_go_on() -> None:
    space = make_translator().space
    engine = made("random", space)
    failed = set()
    for number in range(60):
        (ask,) = engine.ask(1)
        assert ask.candidate not in failed
        fine = number % 2 == 0
        if not fine:
            failed.add(ask.candidate)
        engine.tell(ask.candidate, ask.budget, (1.0, 1.0) if fine else None)


def test_what_was_heard_of_a_greater_budget_alone_keeps_nobody_back() -> None:
    """Another engine begins at the second budget: those are no promotions of the first."""
    space = make_translator().space
    engine = made("random", space, budgets=(1, 3, 9))
    rng = random.Random(1)
    for number in range(4):
        engine.tell(space.random(rng), 3, (float(number), 1.0))
    asked = []
    for number in range(4, 9):
        (ask,) = engine.ask(1)
        asked.append((ask.origin, ask.budget))
        engine.tell(ask.candidate, ask.budget, (9.0 - number, 1.0))
    # One of the four that were scored is promoted first, as one of three does.
    assert asked == [("promotion", 9), *[("random", 1)] * 3, ("promotion", 3)]


@pytest.mark.parametrize("name", ENGINES)
def test_engines_ask_for_what_the_space_has(name: str, tmp_path: Path) -> None:
    translator = make_translator(half_layers=True)
    trials = 30 if name == "smac" else 60  # its forests take a while
    history = run(made(name, translator.space), translator, tmp_path / "log", trials)
    assert any(isinstance(choice, Join) and choice.share is None for t in history for choice in t.candidate.choices)
    assert History(tmp_path / "log").trials == history.trials
    assert len(history) == trials
    assert all(translator.space.has(trial.candidate) for trial in history)
    assert {trial.budget for trial in history} == set(BUDGETS)
    assert len({trial.key for trial in history}) == trials
    counts = [sum(trial.budget == budget for trial in history) for budget in BUDGETS]
    assert counts[0] > counts[1] >= counts[2] > 0 or name == "smac"


@pytest.mark.parametrize("name", ["random", "evolve", pytest.param("smac", marks=[needs_smac, pytest.mark.exhaustive])])
def test_the_same_seed_gives_the_same_log(name: str, tmp_path: Path) -> None:
    translator = make_translator()
    logs = [
        run(made(name, translator.space, seed=seed), translator, tmp_path / f"log{place}", 45).trials
        for place, seed in enumerate([0, 0, 1])
    ]
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        *((name, cut) for name in ("random", "evolve") for cut in (1, 20, 44)),
        pytest.param("smac", 13, marks=needs_smac),
    ],
)
def test_killed_anywhere_and_started_again(name: str, cut: int, tmp_path: Path) -> None:
    translator = make_translator()
    starts = [Start(candidate=translator.space.plain((1, 2)), origin="warm start: x")]

    def fails(recipe: Recipe, budget: int) -> str | None:
        return "NaN" if int(content_hash(recipe)[:4], 16) % 7 == 0 else None

    def engine() -> Engine:
        return made(name, translator.space, starts=starts)

    trials = 16 if name == "smac" else 45
    undisturbed = run(engine(), translator, tmp_path / "whole", trials, Known(fails=fails))
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    (tmp_path / "killed").write_text("".join(lines[:cut]) + lines[cut][:50])
    scorer = Known(fails=fails)
    again = run(engine(), translator, tmp_path / "killed", trials, scorer)
    assert again.trials == undisturbed.trials
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    fresh = list(undisturbed.trials[cut:])
    assert len(scorer.scored) == len(fresh) + sum(trial.status == "failed" for trial in fresh)  # tried twice


@pytest.mark.parametrize("name", ENGINES)
def test_warm_start_comes_first(name: str, tmp_path: Path) -> None:
    translator = make_translator()
    starts = [Start(candidate=translator.space.plain(gone), origin="warm start: x") for gone in ((0, 1), (4, 5))]
    history = run(made(name, translator.space, starts=starts), translator, tmp_path / "log", 14)
    warm = {trial.candidate for trial in history if trial.origin == "warm start: x"}
    assert warm == {start.candidate for start in starts}


@needs_smac
def test_smac_and_what_it_did_not_ask_for() -> None:
    """Trials of an earlier search leave its first stage to new candidates; a failed one costs little more than any."""
    space = make_translator().space
    engine, rng = made("smac", space), random.Random(7)
    earlier = [space.random(rng) for _ in range(12)]
    for number, candidate in enumerate(earlier):
        engine.tell(candidate, BUDGETS[0], (1.0 + number / 10, 3.0))
    for _ in range(5):
        (ask,) = engine.ask(1)
        assert ask.budget == BUDGETS[0] and ask.candidate not in earlier
        engine.tell(ask.candidate, ask.budget, None)
    history = engine._facade.runhistory  # type: ignore[attr-defined]
    assert sorted(value.cost for value in history.values())[-5:] == [[2 * 2.1 + 1, 2 * 3.0 + 1]] * 5
    assert len(history) == 12 + 5


def best_sum(engine: Engine, trials: int) -> float:
    """The least sum of two costs that an engine finds: wrong members of early layers, and of late ones.

    Also what is removed costs: nothing, for layers of the middle.
    """

    def costs(candidate: Candidate) -> tuple[float, float]:
        gone = [layer for layer in range(20) if layer not in candidate.positions]
        wrong = [
            position
            for position, choice in candidate.items()
            if choice != single("math" if position % 2 == 0 else "code")
        ]
        early = sum(layer < 7 for layer in gone) + 0.1 * sum(layer < 10 for layer in wrong)
        late = sum(layer > 12 for layer in gone) + 0.1 * sum(layer >= 10 for layer in wrong)
        return early, late

    best = float("inf")
    for _ in range(trials):
        (ask,) = engine.ask(1)
        found = costs(ask.candidate)
        best = min(best, sum(found))
        engine.tell(ask.candidate, ask.budget, found)
    return best


@pytest.mark.exhaustive
def test_evolution_beats_random_search() -> None:
    """At 300 trials, for each of three seeds."""
    menu = make_translator().space.menu
    space = Space(depth=20, target=15, menu=menu)
    for seed in range(3):
        random_sum = best_sum(made("random", space, seed=seed), 300)
        assert best_sum(made("evolve", space, seed=seed), 300) < random_sum - 0.2


@pytest.mark.parametrize("seed", range(4))
def test_evolution_spreads_over_the_front(seed: int) -> None:
    """Both ends are found: what removes the last layers and what removes the first."""
    translator = make_translator(shares=())
    engine = made("evolve", translator.space, seed=seed)
    top = set()
    for _ in range(500):
        (ask,) = engine.ask(1)
        recipe = translator.recipe(ask.candidate)
        engine.tell(ask.candidate, ask.budget, tuple(cost + noise(recipe, ask.budget) for cost in true_costs(recipe)))
        if ask.budget == BUDGETS[-1]:
            top.add(translator.space.changed(ask.candidate.positions))
    assert {(0, 1), (4, 5)} <= top


def test_a_space_that_is_exhausted(tmp_path: Path) -> None:
    """Remove alone, one of six: six candidates at three budgets, and then there is nothing new."""
    translator = make_translator()
    space = Space(
        depth=6, target=5, menu=translator.space.menu.__class__(members=("base",), select=True, methods=(), grids={})
    )
    small = Translator(
        space=space, architecture=translator.architecture, variants=translator.variants[:1], scores=translator.scores
    )
    history = History(tmp_path / "log")
    task = Task(space=space, budgets=BUDGETS, objectives=OBJECTIVES)
    engine, workers = made("evolve", space), InProcess(Known().evaluate)
    stopped = Search(
        engine=engine,
        task=task,
        history=history,
        workers=workers,
        trials=50,
        name="evolve",
        recipe_of=small.recipe,
    ).run()
    assert stopped is not None
    assert len(history) == 18
    assert len({trial.key for trial in history}) == 18


def test_smac_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    usual = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "smac":
            raise ImportError("No module named 'smac'")
        return usual(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError) as caught:
        made("smac", make_translator().space)
    assert "intarsia[search]" in caught.value.problems[0].hint
