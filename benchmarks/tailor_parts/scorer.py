"""The score of a model, the same for every row of the benchmark.

Five measures on what neither searches nor planners nor fits have seen: accuracy (length-normalised) on the last two
thirds of arc_easy and of piqa, and the perplexity of the solutions in math_cot (last two thirds), of the last tenth of
the news and of WikiText-2 (test). Each becomes the share that is kept of the unpruned base's: accuracy divided by its
accuracy; its perplexity divided by the perplexity, which is the share of a token's probability (geometric mean). The
mean score is the plain mean of the five. More than 1 is more than the base.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import cached_property

from benchmarks.tailor_parts.setting import Rows, Setting
from intarsia.activations.batches import Batches
from intarsia.activations.loop import Loop
from intarsia.commands.job import Job, load_tokenizer
from intarsia.data.corpus import Corpus
from intarsia.evaluation.perplexity import Chain, eval_corpus, perplexity
from intarsia.healing.closed_form import fit
from intarsia.healing.teacher import TeacherStates
from intarsia.options import Runtime, TextSpec
from intarsia.recipe.algebra import reference_layers
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.evaluator import Evaluator
from intarsia.tailoring.family_file import BASE, ObjectiveSpec, read_family_file

TASKS = ("arc_easy", "piqa")
TEXTS = ("math_cot", "news", "WikiText-2")
_UNSEEN = (0.33, 1.0)
_CACHES = 256 * 2**20


class Scorer:
    """Scores recipes over the family, and keeps the rows."""

    def __init__(self, setting: Setting, rows: Rows) -> None:
        self._setting, self._rows = setting, rows

    def has(self, key: str, **facts: int) -> bool:
        """Whether there is such a row, and it is of these facts."""
        return key in self._rows and all(self._rows[key].get(name) == value for name, value in facts.items())

    def row(self, key: str, recipe: Recipe, **facts: int) -> None:
        """Score a recipe, if that was not done before; the row keeps the facts."""
        if self.has(key, **facts):
            return
        started = time.process_time()
        outcome = self._evaluator.evaluate(recipe, min(self._setting.items, self._evaluator.most))
        found = dict(zip(self._evaluator.objectives, outcome.costs, strict=True))
        measures = {task: 1.0 - found[task] for task in TASKS} | {"math_cot": math.exp(found["math_cot"])}
        chain = Chain(recipe, self._evaluator.model)
        for name, corpus in self._texts.items():
            measures[name] = perplexity(chain, corpus).value
        measures["cpu_seconds"] = time.process_time() - started
        self._rows.put(key, measures | facts)
        print(key, {name: round(value, 4) for name, value in measures.items()}, flush=True)

    def healed(self, recipe: Recipe) -> Recipe:
        """The recipe with its output projections fitted on the objectives' text, toward the same blend unpruned."""
        resident = self._evaluator.model
        layers = [resident.module(op) for op in reference_layers(recipe)]
        with TeacherStates(Loop(resident, Batches(self._corpus, resident.device)), layers=layers) as teacher:
            return fit(recipe, teacher)[0]

    @cached_property
    def _corpus(self) -> Corpus:
        """The text of the closed form."""
        spec = TextSpec(sources=tuple(self._setting.calibration), tokens=self._setting.tokens[1], seq_len=512)
        return Job(self._setting.base, spec).text.calibration

    @cached_property
    def _evaluator(self) -> Evaluator:
        setting = self._setting
        file = read_family_file(setting.family_file("score", ("remove", "select"), "random", 0, ()))
        objectives = [
            ObjectiveSpec(name=task, task=setting.task(task), split=_UNSEEN, metric="accuracy") for task in TASKS
        ]
        objectives.append(ObjectiveSpec(name="math_cot", loss=setting.task("math_cot"), split=_UNSEEN))
        search = file.search.model_copy(update={"min_budget": setting.items, "max_budget": setting.items})
        file = file.model_copy(update={"objectives": tuple(objectives), "search": search})
        return Evaluator(setting.family, file, Runtime(memory=str(_CACHES)), probe=False)

    @cached_property
    def _texts(self) -> Mapping[str, Corpus]:
        tokenizer = load_tokenizer(self._setting.family.checkpoints()[BASE])
        wikitext, news = self._setting.windows
        return {
            "news": eval_corpus(f"{self._setting.text('abc_news')}#0.9:1", tokenizer, windows=news),
            "WikiText-2": eval_corpus(self._setting.text("wikitext2.test.raw"), tokenizer, windows=wikitext),
        }


def kept(row: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """What a model keeps of the base in the measures of the mean."""
    found = {task: row[task] / base[task] for task in TASKS}
    return found | {text: base[text] / row[text] for text in TEXTS}


def mean(row: Mapping[str, float], base: Mapping[str, float]) -> float:
    """The mean score."""
    shares = kept(row, base)
    return sum(shares.values()) / len(shares)
