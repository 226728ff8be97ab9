"""What a trial of a search costs.

First: trials at the highest budget, each a candidate made from an earlier one by one move of the search. A trial runs
the layers that it does not share with them, the final norm and the head; what it takes beside these (making merged
layers, normalising logits, batches, caches) is the overhead. Processor seconds, on the CPU.

Then the same search as a plain way would run it: the model is built into a folder, loaded, and scored on all examples
of the budget, each choice of a question in a row of its own (as lm-eval does), or with contexts shared as
`intarsia evaluate` does. A plain trial's time does not depend on the candidate, so it is measured on one candidate a
budget. Both ways must give the same costs; that is checked.

    python -m benchmarks tailor_trial recipes/tailor-demo.yaml --most 45
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from intarsia.building.loaded_model import default_device
from intarsia.building.materialize import materialize
from intarsia.data.corpus import Corpus
from intarsia.evaluation.likelihood import score_requests
from intarsia.evaluation.perplexity import perplexity
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.engine import budget_ladder, expected_trials
from intarsia.tailoring.engines.evolve import mutate
from intarsia.tailoring.evaluator import Evaluator
from intarsia.tailoring.family import Family, open_family
from intarsia.tailoring.family_file import FamilyFile, read_family_file
from intarsia.tailoring.objective import Objective
from intarsia.tailoring.recipes import Translator
from intarsia.tailoring.space import space_of


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds on the clock, and seconds of the processor, which a busy machine disturbs less."""

    wall: float
    cpu: float


class Stopwatch:
    """From its start."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> Spent:
        """What was spent."""
        return Spent(wall=time.perf_counter() - self._wall, cpu=time.process_time() - self._cpu)


def candidates(file: FamilyFile, family: Family, count: int) -> list[Recipe]:
    """The base without middle layers, then each a move away from one before it."""
    space = space_of(file, family.architecture, family.parameters)
    variants = family.variants()
    words = Translator(
        space=space, architecture=family.architecture, variants=variants, scores={}, seed=file.search.seed
    )
    rng = Random(file.search.seed)
    found = [space.random_middle(rng)]
    while len(found) < count:
        new = mutate(space, rng.choice(found), rng)
        if new not in found:
            found.append(new)
    return [words.recipe(candidate) for candidate in found]


class Meter:
    """Processor seconds inside the layers, the final norm and the head while trials run."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.seconds = 0.0
        stream = evaluator.runner.stream
        for name in ("run", "logits"):
            setattr(stream, name, self._timed(getattr(stream, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.process_time()
            found = function(*args)
            self.seconds += time.process_time() - started
            return found

        return timed


def overhead(evaluator: Evaluator, recipes: Sequence[Recipe], budget: int) -> None:
    """Print what trials take beside the forward pass of what is new in them."""
    depth = len(recipes[0].layers)
    print(f"| trial | layers run, of {depth} | trial, CPU s | forward alone, CPU s | overhead | trial, s | reused |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    meter, whole = Meter(evaluator), 0.0
    for number, recipe in enumerate(recipes):
        before, watch = meter.seconds, Stopwatch()
        outcome = evaluator.evaluate(recipe, budget)
        spent, forward = watch.stop(), meter.seconds - before
        whole += spent.cpu
        print(
            f"| {number} | {outcome.layer_forwards:.1f} | {spent.cpu:.2f} | {forward:.2f} "
            f"| {spent.cpu / forward - 1:+.1%} | {spent.wall:.1f} | {outcome.details['reused']:.0%} |",
            flush=True,
        )
    print(f"| all | | {whole:.2f} | {meter.seconds:.2f} | {whole / meter.seconds - 1:+.1%} | | |\n")


def plain_costs(
    recipe: Recipe, family: Family, objectives: Sequence[Objective], budget: int, *, pack: bool
) -> tuple[float, ...]:
    """Build a folder, load it, and score it."""
    with tempfile.TemporaryDirectory(prefix="intarsia-bench-") as folder:
        materialize(recipe, family.checkpoints(), Path(folder) / "model")
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype="auto").eval()
    model.to(default_device())
    costs = []
    for objective in objectives:
        examples = objective.examples[:budget]
        if objective.measure == "loss" and objective.source.partition("#")[0].endswith(".txt"):
            rows = [[*example.requests[0].context, *example.requests[0].continuation] for example in examples]
            corpus = Corpus.of(torch.tensor(rows), description=objective.source, documents=1)
            costs.append(perplexity(model, corpus).nll)
            continue
        requests = [request for example in examples for request in example.requests]
        found = score_requests(model, requests, pack=None if pack or not objective.asks else False)
        costs.append(objective.cost(objective.scores(found.sums_R.numpy()))[0])
    return tuple(costs)


def against_plain(evaluator: Evaluator, recipes: Sequence[Recipe], family: Family, file: FamilyFile) -> None:
    """Print both ways' times for a search with staged budgets: the best of each stage go on to the next."""
    ladder = budget_ladder(file.search.min_budget, file.search.max_budget, file.search.eta)
    counts = expected_trials(ladder, len(recipes), file.search.eta)
    print("| budget | trials | s a trial | plain, contexts shared | plain, a row a choice |")
    print("|---:|---:|---:|---:|---:|")
    waiting = list(recipes[: counts[ladder[0]]])
    sums, trials, row = np.zeros(3), 0, [0.0]
    for budget in ladder:
        count = max(counts[budget], 1)
        watch = Stopwatch()
        outcomes = [(evaluator.evaluate(recipe, budget), recipe) for recipe in waiting[:count]]
        row = [watch.stop().wall / len(outcomes)]
        outcome, recipe = outcomes[0]
        for pack in (True, False):
            watch = Stopwatch()
            costs = plain_costs(recipe, family, evaluator.measured, budget, pack=pack)
            row.append(watch.stop().wall)
            assert np.allclose(costs, outcome.costs, rtol=0.02), (costs, outcome.costs)
        sums += np.array(row) * len(outcomes)
        print(f"| {budget} | {len(outcomes)} | " + " | ".join(f"{seconds:.1f}" for seconds in row) + " |", flush=True)
        waiting = [recipe for _, recipe in sorted(outcomes, key=lambda entry: sum(entry[0].costs))]
        trials += len(outcomes)
    print(f"| all | {trials} | {sums[0]:.0f} in all | {sums[1]:.0f} | {sums[2]:.0f} |")
    print(f"| times as many trials an hour | | | {sums[1] / sums[0]:.1f} | {sums[2] / sums[0]:.1f} |")
    # A plain search has no stages either: every trial is scored on the highest budget.
    whole = trials * np.array(row[1:])
    print(f"| the same, plain trials all at {budget} | | | {whole[0] / sums[0]:.1f} | {whole[1] / sums[0]:.1f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path, nargs="?", default=Path("recipes/tailor-demo.yaml"))
    parser.add_argument("--base", help="another folder of the base")
    parser.add_argument("--trials", type=int, nargs=2, default=[5, 9], metavar=("OVERHEAD", "SEARCH"))
    parser.add_argument("--least", type=int, default=5)
    parser.add_argument("--most", type=int, default=45)
    given = parser.parse_args()
    file = read_family_file(given.family)
    operations = tuple(operation for operation in file.operations if operation != "concat")
    search = file.search.model_copy(update={"min_budget": given.least, "max_budget": given.most})
    base = file.base.model_copy(update={"model": given.base or file.base.model})
    file = file.model_copy(update={"base": base, "operations": operations, "search": search})
    family = open_family(file.members)
    print(
        f"{torch.get_num_threads()} thread(s), {default_device()}; {', '.join(family.names)}; budgets to {given.most}\n"
    )
    recipes = candidates(file, family, sum(given.trials))
    evaluator = Evaluator(family, file)
    assert evaluator.base is not None
    print(f"base: {dict(zip(evaluator.objectives, evaluator.base.costs, strict=True))}\n")
    overhead(evaluator, recipes[: given.trials[0]], given.most)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory so far {peak / 1e9:.2f} GB\n")
    # The search does not start with what earlier trials left.
    evaluator.close()
    if given.trials[1]:
        against_plain(evaluator, recipes[given.trials[0] :], family, file)


if __name__ == "__main__":
    main()
