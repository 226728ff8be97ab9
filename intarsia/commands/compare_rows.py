"""The rows of a comparison: models in memory, measured by perplexity, tasks and speed; a line of a log for each.

A recipe's model shares every layer that it does not change with the original, and gives the numbers of the folder that
`intarsia build` would write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel

from intarsia import progress
from intarsia.building.assembled import assembled
from intarsia.commands.compare import CompareEval
from intarsia.commands.compare_ladders import HealedRung, Rung
from intarsia.commands.job import Job
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.evaluation.perplexity import perplexity
from intarsia.evaluation.results import TaskResults, retention
from intarsia.evaluation.speed import compare_speed
from intarsia.evaluation.tasks import TaskPlan, score_tasks
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.comparison import DENSE, Key
from intarsia.run_dir import Log

MEASURED = ("perplexity", "tasks", "speed")


class Rows:
    """The measured rows, and the measuring of new ones.

    Attributes:
        dense_key: of the original's row.
    """

    def __init__(
        self, job: Job, log: Log, texts: Mapping[str, Corpus], tasks: TaskPlan | None, evaluation: CompareEval
    ) -> None:
        """
        Args:
            log: a line for each row; of two about the same model the later one counts.
            texts: what perplexity is measured on, by name.
            tasks: what accuracy is measured on; None for nothing.
        """
        self.job, self.log, self.texts, self.tasks, self.evaluation = job, log, texts, tasks, evaluation
        self.rows = {_key(row): row for row in log.entries()}
        self.dense_key: Key = (DENSE, job.checkpoint.architecture.n_layers, "none")

    def has(self, key: Key) -> bool:
        """Whether a row is measured, with everything that is asked for."""
        return self._is_whole(self.rows.get(key))

    def add(self, row: Mapping[str, Any]) -> None:
        """Record a row."""
        self.log.append(row)
        self.rows[_key(row)] = dict(row)
        progress.current().say(text_of(row))

    def add_shared(self, layer_forwards: float) -> None:
        """Record the cost of the shared pass in the original's row; no method's row contains it."""
        dense = self.rows[self.dense_key]
        if layer_forwards > (dense["layer_forwards"] or 0.0):
            self.rows[self.dense_key] = {**dense, "layer_forwards": layer_forwards}
            self.log.append(self.rows[self.dense_key])

    def dense(self) -> dict[str, Any]:
        """The row of the original."""
        checkpoint = self.job.checkpoint
        row = _row(DENSE, checkpoint.architecture.n_layers, "none")
        row |= {"parameters": checkpoint.parameters, "bytes": checkpoint.nbytes}
        return row | self._measures(
            self.job.resident.model, self.job.model, checkpoint.architecture.n_layers, dense=None
        )

    def measured(self, method: str, rung: Rung, heal: str, healed: HealedRung) -> dict[str, Any]:
        """The row of a recipe's model; the measures of an equal model in an earlier row are reused."""
        checkpoint, recipe = self.job.checkpoint, healed.recipe
        layers = len(recipe.layers)
        row = _row(method, layers, heal, note=healed.note) | {
            "parameters": checkpoint.parameters - (recipe.depth - layers) * checkpoint.architecture.layer_parameters,
            "bytes": _built_bytes(recipe, self.job),
            "layer_forwards": rung.layer_forwards,
            "plan_seconds": rung.seconds,
            "heal_forwards": healed.forwards,
            "heal_seconds": healed.seconds,
            "recipe": healed.path.relative_to(self.log.path.parent).as_posix(),
            "recipe_sha256": schema.content_hash(recipe),
        }
        for other in self.rows.values():
            if other.get("recipe_sha256") == row["recipe_sha256"] and self._is_whole(other):
                return row | {name: other[name] for name in MEASURED}
        dense = self.rows[self.dense_key]
        return row | self._measures(assembled(recipe, self.job.resident), name_of(row), layers, dense=dense)

    def _wants_tasks(self, layers: int) -> bool:
        """Whether models of this depth are scored on tasks; the original is."""
        depths = self.evaluation.task_layers
        return self.tasks is not None and (depths is None or layers in (*depths, self.dense_key[1]))

    def _is_whole(self, row: Mapping[str, Any] | None) -> bool:
        if row is None:
            return False
        if row["recipe"] is None and row["method"] != DENSE:
            return True  # there is no such model
        tasks = row["tasks"] is not None or not self._wants_tasks(row["layers"])
        return tasks and (row["speed"] is not None or not self.evaluation.speed)

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
            "tasks": self._tasks(model, name, dense).to_dict() if self._wants_tasks(layers) else None,
            "speed": self._speed(model, dense) if self.evaluation.speed else None,
        }

    def _tasks(self, model: PreTrainedModel, name: str, dense: Mapping[str, Any] | None) -> TaskResults:
        assert self.tasks is not None
        found = score_tasks(self.tasks, model, self.job.tokenizer, name=name)
        if dense is None or dense["tasks"] is None:
            return found
        kept = TaskResults.from_dict(dense["tasks"])
        try:
            return replace(found, retention=retention(kept.scores, found.scores, against=self.job.model))
        except UserError as error:  # a metric that is no mean over items
            progress.current().say(f"no retention: {error}")
            return found

    def _speed(self, model: PreTrainedModel, dense: Mapping[str, Any] | None) -> dict[str, Any]:
        """Measured in turns with the original, so that other load on the machine affects both."""
        models = {"this": model, **({} if dense is None else {DENSE: self.job.resident.model})}
        speeds = compare_speed(models)
        found = asdict(speeds["this"])
        if DENSE in speeds:
            found["dense"] = asdict(speeds[DENSE])
        return found


def missed(method: str, rung: Rung, heal: str) -> dict[str, Any]:
    """The row of a depth that the method did not reach."""
    return _row(method, rung.layers, heal, note=rung.note)


def name_of(row: Mapping[str, Any]) -> str:
    """The name of a row's model."""
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


def _key(row: Mapping[str, Any]) -> Key:
    """What a row is about."""
    return row["method"], row["layers"], row["heal"]


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


def _built_bytes(recipe: Recipe, job: Job) -> int:
    """Bytes of the weights that a build writes."""
    checkpoint, architecture = job.checkpoint, job.checkpoint.architecture

    def layer(index: int) -> int:
        return sum(
            checkpoint.headers[architecture.tensor_name(index, local)].nbytes
            for local in architecture.layer_shapes(index)
        )

    outside = checkpoint.nbytes - sum(layer(index) for index in range(architecture.n_layers))
    return outside + sum(layer(op.sources[0].layer) for op in recipe.layers)
