"""Trials in this process and in workers: tried again, given up, counted once, and stopped where all fail."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace
from pathlib import Path

import pytest

from intarsia.errors import UserError
from intarsia.options import Runtime
from intarsia.recipe.methods import METHODS as KINDS
from intarsia.recipe.recipe import Concat, Cut, LayerRef, Merge, Recipe
from intarsia.recipe.schema import content_hash
from intarsia.tailoring import search
from intarsia.tailoring.candidate import Blend, Join, Keep, single
from intarsia.tailoring.engine import Start, Task
from intarsia.tailoring.engines.random import RandomSearch
from intarsia.tailoring.evaluator import Outcome
from intarsia.tailoring.family_file import FamilyFile, MemberSpec, ObjectiveSpec, TargetSpec
from intarsia.tailoring.run import EARLIER, Front, History, TailorRun, leading
from intarsia.tailoring.search import (
    Done,
    InProcess,
    OnDask,
    Opener,
    OpenScorer,
    Search,
    Workers,
    check_scheduler,
    dask_workers,
    words,
)
from intarsia.tailoring.warm_start import WarmStart, from_recipe, from_search, random_middles
from tests.tailoring.conftest import METHODS, make_translator
from tests.tailoring.known_costs import OBJECTIVES, Known, OpenDeadly, OpenKnown

BUDGETS = (4, 12, 36)


def run(
    path: Path,
    workers: Workers,
    *,
    trials: int = 20,
    starts: tuple[Start, ...] = (),
    earlier: WarmStart | None = None,
    fronts: list[Front] | None = None,
    on_trial: Callable[[Set[str]], None] = lambda recipes: None,
    seed: int = 0,
) -> History:
    translator = make_translator()
    history = History(path)
    history.take_over(() if earlier is None else earlier.earlier)
    task = Task(space=translator.space, budgets=BUDGETS, objectives=OBJECTIVES, seed=seed, starts=starts)
    Search(
        engine=RandomSearch(task),
        task=task,
        history=history,
        workers=workers,
        trials=trials,
        name="random",
        recipe_of=translator.recipe,
        on_front=lambda front: fronts.append(front) if fronts is not None else None,
        on_trial=on_trial,
    ).run()
    return history


def test_a_trial_that_fails_once(tmp_path: Path) -> None:
    seen: set[str] = set()

    def fails(recipe: Recipe, budget: int) -> str | None:
        sha256 = content_hash(recipe)
        first = sha256 not in seen
        seen.add(sha256)
        return "not now" if first else None

    history = run(tmp_path / "log", InProcess(Known(fails=fails).evaluate), trials=3)
    assert [(trial.status, trial.attempts) for trial in history] == [("ok", 2)] * 3


def test_a_trial_that_fails_twice_is_no_score(tmp_path: Path) -> None:
    count = iter(range(1000))
    fronts: list[Front] = []
    scorer = Known(fails=lambda recipe, budget: "NaN in early" if next(count) in (4, 5) else None)
    history = run(tmp_path / "log", InProcess(scorer.evaluate), trials=12, fronts=fronts)
    failed = [trial for trial in history if trial.status == "failed"]
    assert [(trial.number, trial.costs, trial.reason, trial.attempts) for trial in failed] == [
        (4, None, "NaN in early", 2)
    ]
    assert all(point.costs is not None for front in fronts for point in front.points)


def test_an_error_of_a_library_is_a_failed_trial(tmp_path: Path) -> None:
    class Breaks(Known):
        def evaluate(self, recipe: Recipe, budget: int) -> Outcome:
            if len(self.scored) in (2, 3):
                self.scored.append(("", 0))
                raise RuntimeError("CUDA error:\n  an illegal memory access")
            return super().evaluate(recipe, budget)

    history = run(tmp_path / "log", InProcess(Breaks().evaluate), trials=6)
    assert history.trials[2].reason == "RuntimeError: CUDA error: an illegal memory access"
    assert [trial.status for trial in history].count("failed") == 1


def test_where_all_fail_the_search_stops(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path / "log", InProcess(Known(fails=lambda recipe, budget: "NaN in late").evaluate))
    assert "all failed: NaN in late" in str(caught.value)
    assert len(History(tmp_path / "log")) == 5
    with pytest.raises(UserError):  # and it stays stopped
        run(tmp_path / "log", InProcess(Known().evaluate))
    assert len(History(tmp_path / "log")) == 5


def test_nothing_is_scored_twice(tmp_path: Path) -> None:
    scorer = Known()
    start = Start(candidate=make_translator().space.plain((0, 1)), origin="x")
    history = run(tmp_path / "log", InProcess(scorer.evaluate), trials=40, starts=(start, start))
    assert len(set(scorer.scored)) == len(scorer.scored) == len(history) == 40


def test_fronts_are_reported_as_they_change(tmp_path: Path) -> None:
    fronts: list[Front] = []
    history = run(tmp_path / "log", InProcess(Known().evaluate), trials=30, fronts=fronts)
    assert fronts[0].points == (history.trials[0],)
    newest = [max(point.number for point in front.points) for front in fronts]
    assert newest == sorted(set(newest))
    assert fronts[-1].budget == 36 and fronts[-1].top


def test_fits_of_running_and_leading_trials_stay(tmp_path: Path) -> None:
    tailor_run = TailorRun(tmp_path)
    tailor_run.fits.mkdir()

    class Three(InProcess):
        """Three workers at a time; each trial leaves a fit."""

        count = 3

        def next(self) -> Done:
            (tailor_run.fits / f"{self._waiting[0][0][0]}.yaml").touch()
            # As if a worker were done with the next one too.
            (tailor_run.fits / f"{self._waiting[-1][0][0]}.yaml").touch()
            return super().next()

    workers = Three(Known().evaluate)
    made: set[str] = set()

    def on_trial(recipes: Set[str]) -> None:
        running = {key[0] for key, _, _ in workers._waiting}
        assert recipes == leading(History(tmp_path / "log")) | running
        made.update(path.stem for path in tailor_run.fits.iterdir())
        tailor_run.keep_fits(recipes)
        assert {path.stem for path in tailor_run.fits.iterdir()} == made & recipes

    history = run(tmp_path / "log", workers, trials=30, on_trial=on_trial)
    assert 0 < len([*tailor_run.fits.iterdir()]) < len({trial.recipe for trial in history})


def test_words(tmp_path: Path) -> None:
    assert words((), None) == "no score yet"
    fronts: list[Front] = []
    history = run(tmp_path / "log", InProcess(Known().evaluate), trials=1, fronts=fronts)
    costs = history.trials[0].costs
    assert costs is not None
    assert words(history.trials, fronts[0]) == f"best early {costs[0]:.4g}, late {costs[1]:.4g}; front 1 at budget 4"


# Warm start


def test_earlier_trials_are_heard_and_kept(tmp_path: Path) -> None:
    translator = make_translator()
    old = run(tmp_path / "old", InProcess(Known().evaluate), trials=11)
    found = from_search(old.trials, None, translator, "old", same=True)
    assert [trial.recipe for trial in found.earlier] == [trial.recipe for trial in old]
    foreign = replace(old.trials[0], recipe="0" * 64)
    assert from_search([foreign], None, translator, "old", same=True).earlier == ()
    assert from_search(old.trials, None, translator, "old", same=False).earlier == ()
    scorer = Known()
    new = run(tmp_path / "new", InProcess(scorer.evaluate), trials=6, earlier=found)
    assert [trial.engine for trial in new] == [EARLIER] * 11 + ["random"] * 6
    assert not {trial.key for trial in old} & set(scorer.scored)
    # Nine at the least budget and two at the next: a third one is promoted, because imported trials count.
    assert new.trials[11].origin == "promotion"


def test_warm_starts_come_back(tmp_path: Path) -> None:
    translator = make_translator()
    old = run(tmp_path / "old", InProcess(Known().evaluate), trials=3)
    whole = WarmStart(starts=tuple(random_middles(translator.space, 0)), earlier=old.trials)
    whole.save(tmp_path / "warm.json")
    assert WarmStart.load(tmp_path / "warm.json") == whole
    (tmp_path / "warm.json").write_text("{")
    with pytest.raises(UserError):
        WarmStart.load(tmp_path / "warm.json")


def test_a_ladder_as_a_start() -> None:
    translator = make_translator()
    space = translator.space
    plain = space.plain((1, 4))
    starts = from_recipe(translator.recipe(plain), space, "sleb")
    assert starts[0] == Start(candidate=plain, origin="warm start: sleb")
    origins = ["on math", "on code", *(f"merged by {method}" for method in METHODS)]
    assert [start.origin for start in starts[1:]] == [f"warm start: sleb {how}" for how in origins]
    recipe = translator.recipe(starts[1].candidate)
    assert [str(op.sources[0].variant) for op in recipe.layers] == ["math"] * 4
    assert [op.sources[0].layer for op in recipe.layers] == [0, 2, 3, 5]
    merged = {start.origin.split()[-1]: translator.recipe(start.candidate).layers for start in starts[3:]}
    for method, layers in merged.items():
        for op, layer in zip(layers, (0, 2, 3, 5), strict=True):
            assert isinstance(op, Merge) and op.method == method
            assert op.sources == (LayerRef(variant="math", layer=layer), LayerRef(variant="code", layer=layer))
            assert op.base == (LayerRef(variant="base", layer=layer) if KINDS[method].base else None)
    assert merged["linear"][0].weights == (0.5, 0.5)
    assert merged["task_arithmetic"][0].weights == (1.0, 1.0)
    assert merged["ties"][0].params == {"density": 0.6, "lambda": 1.0}
    assert from_recipe(translator.recipe(plain), make_translator(target=8).space, "sleb") == []
    # Joined layers stand where most of them is from; fitted tensors do not count.
    pieces = {"kv_groups": (0,), "weights": {"attention": 0.5, "mlp": 0.5}}
    cuts = tuple(
        Cut(source=LayerRef(variant="base", layer=at), channels=tuple(range(n)), **pieces)  # type: ignore[arg-type]
        for at, n in ((1, 8), (2, 12))
    )
    joined = translator.recipe(plain)
    joined = replace(joined, layers=(joined.layers[0], Concat(cuts=cuts), *joined.layers[2:]), fitted={0: {}})
    assert from_recipe(joined, space, "come") == [
        Start(candidate=start.candidate, origin=start.origin.replace("sleb", "come")) for start in starts
    ]


def test_half_layers_of_a_ladder() -> None:
    """Where the space has them, and what is removed is all that is between the two halves."""
    translator = make_translator(half_layers=True)
    space, half = translator.space, Join(first="base", second="base")
    candidate = space.arrange((2, 5), {(1, 0): half, (4, 0): half})
    recipe = translator.recipe(candidate)
    starts = from_recipe(recipe, space, "sleb")
    assert starts[0] == Start(candidate=candidate, origin="warm start: sleb")
    choices = {start.origin.split()[-1]: start.candidate.choices for start in starts}
    assert choices["math"] == (
        single("math"),
        Join(first="math", second="math"),
        single("math"),
        Join(first="math", second="math"),
    )
    assert [choice for choice in choices["ties"] if isinstance(choice, Join)] == [half, half]
    # Without half layers it is the layer of the MLP; so it is where that is not the last one removed.
    (plain, *_) = from_recipe(recipe, make_translator().space, "sleb")
    assert plain.candidate == space.plain((1, 4))
    shorter = replace(recipe, layers=(*recipe.layers[:2], recipe.layers[3]))
    three = make_translator(half_layers=True, target=3)
    assert from_recipe(shorter, three.space, "evolve")[0].candidate == three.space.arrange((1, 3, 5), {(4, 0): half})


def test_where_a_method_takes_more_members_the_base_is_merged_too() -> None:
    """One variant: it is averaged with the base, or part of its difference to the base is taken."""
    translator = make_translator()
    menu = replace(
        translator.space.menu, members=("base", "math"), methods=("linear", "task_arithmetic", "model_stock")
    )
    space = replace(translator.space, menu=menu)
    plain = space.plain((1, 4))
    starts = from_recipe(translator.recipe(plain), space, "sleb")
    # All of one difference would be the variant itself, and model stock needs two.
    assert [start.origin for start in starts] == [
        "warm start: sleb",
        "warm start: sleb on math",
        "warm start: sleb merged by linear",
        "warm start: sleb merged by task_arithmetic",
    ]
    halves = [set(start.candidate.choices) for start in starts[2:]]
    assert halves == [
        {Keep(attention=Blend(members=("base", "math"), method="linear", values=(("lead", 0.5),)))},
        {Keep(attention=Blend(members=("math",), method="task_arithmetic", values=(("lambda", 0.5),)))},
    ]


# Workers


@pytest.mark.parametrize(("numbered", "device"), [(True, "cuda:1"), (False, "cuda")])
def test_only_workers_of_our_own_choose_a_gpu(numbered: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "Evaluator", lambda family, file, runtime, **settings: runtime.device)
    monkeypatch.setattr(search, "open_family", lambda members: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    file = FamilyFile(
        base=MemberSpec(model="base"), target=TargetSpec(layers=4), objectives=(ObjectiveSpec(name="a", loss="b.txt"),)
    )
    assert OpenScorer(file=file, runtime=Runtime(device="cuda"), numbered=numbered)("3") == device


distributed = pytest.importorskip("distributed")


@pytest.mark.exhaustive
def test_two_workers(tmp_path: Path) -> None:
    """The trials of one worker, with the same costs, in whatever order."""
    starts = tuple(random_middles(make_translator().space, 0))[:6]
    with dask_workers(OpenKnown(), scheduler=None, count=2) as workers:
        assert workers.count == 2
        many = run(tmp_path / "many", workers, trials=30, starts=starts)
    one = run(tmp_path / "one", InProcess(Known().evaluate), trials=30, starts=starts)
    assert len(many) == 30
    assert {trial.worker for trial in many} == {"0", "1"}
    assert [trial.number for trial in many] == list(range(30))
    known = {trial.key: trial.costs for trial in one}
    both = [trial for trial in many if trial.key in known]
    assert len(both) >= len(starts) == 6
    assert all(trial.costs == known[trial.key] for trial in both)
    again = run(tmp_path / "many", InProcess(Known().evaluate), trials=34, starts=starts)
    assert len({trial.key for trial in again}) == 34


def deadly(tmp_path: Path, *, always: bool) -> tuple[str, Opener]:
    translator = make_translator()
    victim = content_hash(translator.recipe(translator.space.plain((2, 3))))
    return victim, OpenDeadly(recipe=victim, mark=tmp_path / "mark", always=always)


@pytest.mark.exhaustive
@pytest.mark.parametrize("always", [False, True])
def test_a_worker_that_dies_loses_its_trial_only(tmp_path: Path, always: bool) -> None:
    victim, opener = deadly(tmp_path, always=always)
    starts = tuple(
        Start(candidate=make_translator().space.plain(gone), origin="x") for gone in ((0, 1), (2, 3), (4, 5), (1, 5))
    )
    with dask_workers(opener, scheduler=None, count=2) as workers:
        history = run(tmp_path / "log", workers, trials=8, starts=starts)
    assert (tmp_path / "mark").exists()
    assert len(history) == 8
    hit = [trial for trial in history if trial.recipe == victim and trial.budget == 4]
    assert [trial.status for trial in hit] == ["failed" if always else "ok"]
    if always:
        assert "died" in str(hit[0].reason) and hit[0].costs is None
    assert all(trial.status == "ok" for trial in history if trial.recipe != victim)


def test_an_existing_scheduler(tmp_path: Path) -> None:
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, silence_logs=50
    ) as cluster:
        check_scheduler(cluster.scheduler_address)
        with dask_workers(OpenKnown(), scheduler=cluster.scheduler_address, count=None) as workers:
            assert isinstance(workers, OnDask) and workers.count == 1
            assert len(run(tmp_path / "log", workers, trials=5)) == 5


def test_without_workers_the_search_waits_a_while_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_PATIENCE", 2)
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, silence_logs=50
        ) as cluster,
        dask_workers(OpenKnown(), scheduler=cluster.scheduler_address, count=None) as workers,
    ):
        cluster.scale(0)
        with pytest.raises(UserError, match="no worker for 2 seconds"):
            run(tmp_path / "log", workers, trials=5)


def test_a_scheduler_that_is_not_there() -> None:
    with pytest.raises(UserError) as caught:
        check_scheduler("nowhere:xyz")
    assert "--scheduler nowhere:xyz" in str(caught.value)
