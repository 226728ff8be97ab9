"""Judging the models of a comparison, all in memory: a row for each, with perplexities, tasks and speed.

A recipe's model shares every layer that it does not change with the original, and gives the numbers of the folder that
`intarsia build` would write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel

from intarsia.building.assembled import assembled
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.evaluation.perplexity import perplexity
from intarsia.evaluation.results import TaskResults, retention
from intarsia.evaluation.speed import compare_speed
from intarsia.evaluation.tasks import TaskPlan, score_tasks
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.comparison import DENSE
from intarsia.stages.compare_plans import Rung
from intarsia.stages.source import Source

MEASURED = ("perplexity", "tasks", "speed")


class Judge:
    """Makes rows.

    Attributes:
        wants_tasks, wants_speed: whether a model of so many layers is judged by them too.
    """

    def __init__(
        self,
        source: Source,
        texts: Mapping[str, Corpus],
        *,
        tasks: TaskPlan | None,
        task_layers: Sequence[int] | None,
        speed: bool,
    ) -> None:
        """
        Args:
            texts: what perplexity is measured on, by name.
            tasks: what accuracy is measured on; None for nothing.
            task_layers: the depths that are scored besides the original; None for all.
        """
        self.source, self.texts = source, texts
        self.tasks, self.task_layers = tasks, task_layers
        self.wants_speed = speed

    def wants_tasks(self, layers: int) -> bool:
        """Whether models of this depth are scored on tasks."""
        whole = self.source.checkpoint.architecture.n_layers
        return self.tasks is not None and (self.task_layers is None or layers in (*self.task_layers, whole))

    def is_whole(self, row: Mapping[str, Any] | None) -> bool:
        """Whether a row has everything that is wanted of it."""
        if row is None:
            return False
        if row["recipe"] is None and row["method"] != DENSE:
            return True  # there is no such model
        tasks = row["tasks"] is not None or not self.wants_tasks(row["layers"])
        return tasks and (row["speed"] is not None or not self.wants_speed)

    def dense(self) -> dict[str, Any]:
        """The row of the original."""
        checkpoint = self.source.checkpoint
        row = _row(DENSE, checkpoint.architecture.n_layers, "none")
        row |= {"parameters": checkpoint.parameters, "bytes": checkpoint.nbytes}
        model, name = self.source.resident.model, self.source.model
        return {**row, **self._measures(model, name, checkpoint.architecture.n_layers, dense=None)}

    def row(
        self,
        method: str,
        rung: Rung,
        recipe: Recipe,
        *,
        heal: str,
        where: str,
        rows: Sequence[Mapping[str, Any]],
    ) -> dict[str, Any]:
        """The row of a recipe's model. A model that an earlier row is about is not measured again.

        Args:
            recipe: the rung's, or what it was healed to.
            where: the recipe's file, as the row names it.
            rows: those there are, the original's among them.
        """
        checkpoint = self.source.checkpoint
        layers = len(recipe.layers)
        removed = recipe.depth - layers
        row = _row(method, layers, heal, note=rung.note) | {
            "parameters": checkpoint.parameters - removed * checkpoint.architecture.layer_parameters,
            "bytes": _built_bytes(recipe, self.source),
            "layer_forwards": rung.layer_forwards,
            "plan_seconds": rung.seconds,
            "recipe": where,
            "recipe_sha256": schema.content_hash(recipe),
        }
        for other in rows:
            if other.get("recipe_sha256") == row["recipe_sha256"] and self.is_whole(other):
                return row | {name: other[name] for name in MEASURED}
        dense = next(other for other in rows if other["method"] == DENSE)
        return row | self._measures(assembled(recipe, self.source.resident), name_of(row), layers, dense=dense)

    def _measures(
        self, model: PreTrainedModel, name: str, layers: int, dense: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        perplexities = {name: perplexity(model, corpus) for name, corpus in self.texts.items()}
        return {
            "perplexity": {
                name: {
                    "value": found.value,
                    "nll": found.nll,
                    "stderr": found.stderr if found.windows > 1 else None,  # one window has no scatter
                    "windows": found.windows,
                    "sha256": found.text_sha256,
                }
                for name, found in perplexities.items()
            },
            "tasks": self._tasks(model, name, dense).to_dict() if self.wants_tasks(layers) else None,
            "speed": self._speed(model, dense) if self.wants_speed else None,
        }

    def _tasks(self, model: PreTrainedModel, name: str, dense: Mapping[str, Any] | None) -> TaskResults:
        assert self.tasks is not None
        found = score_tasks(self.tasks, model, self.source.tokenizer, name=name)
        if dense is None or dense["tasks"] is None:
            return found
        kept = TaskResults.from_dict(dense["tasks"])
        try:
            return replace(found, retention=retention(kept.scores, found.scores, against=self.source.model))
        except UserError as error:  # a metric that is no mean over items
            self.source.progress.say(f"no retention: {error}")
            return found

    def _speed(self, model: PreTrainedModel, dense: Mapping[str, Any] | None) -> dict[str, Any]:
        """Beside the original's, measured in turns with it: whatever else the machine does meets both."""
        models = {"this": model, **({} if dense is None else {DENSE: self.source.resident.model})}
        speeds = compare_speed(models)
        found = asdict(speeds["this"])
        if DENSE in speeds:
            found["dense"] = asdict(speeds[DENSE])
        return found


def missed(method: str, rung: Rung, heal: str) -> dict[str, Any]:
    """The row of a model that the method did not come to."""
    return _row(method, rung.layers, heal, note=rung.note)


def name_of(row: Mapping[str, Any]) -> str:
    """What a row's model is called."""
    healed = "" if row["heal"] == "none" else f", {row['heal']}"
    return f"{row['method']}, {row['layers']} layers{healed}"


def text_of(row: Mapping[str, Any]) -> str:
    """A row as a line for a person."""
    words = []
    for text, found in row["perplexity"].items():
        digits = ".2f" if found["value"] < 1e5 else ".3g"
        words.append(f"{text} {found['value']:{digits}}" + (f" ± {found['stderr']:.2g}" if found["stderr"] else ""))
    if row["tasks"] is not None:
        words.append(f"mean accuracy {row['tasks']['mean']:.4f}")
    if row["speed"] is not None:
        words.append(f"{row['speed']['decode_tokens_per_s']:.1f} tokens/s")
    if row["note"]:
        words.append(row["note"])
    return f"{name_of(row)}: " + ", ".join(words)


def _row(method: str, layers: int, heal: str, *, note: str | None = None) -> dict[str, Any]:
    return {
        "method": method,
        "layers": layers,
        "heal": heal,
        "parameters": None,
        "bytes": None,
        "perplexity": {},
        "tasks": None,
        "speed": None,
        "layer_forwards": None,
        "plan_seconds": None,
        "heal_forwards": None,
        "heal_seconds": None,
        "recipe": None,
        "recipe_sha256": None,
        "note": note,
    }


def _built_bytes(recipe: Recipe, source: Source) -> int:
    """Bytes of the weights that a build writes."""
    checkpoint, architecture = source.checkpoint, source.checkpoint.architecture

    def layer(index: int) -> int:
        return sum(
            checkpoint.headers[architecture.tensor_name(index, local)].nbytes for local in architecture.layer_shapes()
        )

    outside = checkpoint.nbytes - sum(layer(index) for index in range(architecture.n_layers))
    return outside + sum(layer(op.sources[0].layer) for op in recipe.layers)
