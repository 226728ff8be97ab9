"""What every part of the benchmark shares: the family, the text that is shown, the folders, and rows that are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from intarsia.building.materialize import materialize
from intarsia.disk import write_whole
from intarsia.evaluation.task_file import Question, Target, read_items
from intarsia.progress import Progress
from intarsia.recipe.recipe import LayerRef, Recipe, Select, derive_spans
from intarsia.tailoring.family import Family, open_family
from intarsia.tailoring.family_file import BASE, MemberSpec

SEEN = "0:0.33"
"""The part of a task that searches, planners and fits may see; the rest scores."""
SEEN_NEWS = "0:0.9"
VARIANTS = {"math": "smollm2-135m-math-lora", "science": "smollm2-135m-science-lora"}
METHODS = ("linear", "slerp", "task_arithmetic", "ties")
ABLATION = {
    "remove": ("remove",),
    "select": ("remove", "select"),
    "merge": ("remove", "select", "merge"),
    "half": ("remove", "select", "merge", "half-layers"),
    "concat": ("remove", "select", "merge", "concat"),
}
"""What each row of the ablation may do: one operation more each time, and half layers or concatenation last."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What was asked for.

    Attributes:
        data, models: folders of texts and tasks, and of the variants.
        base: the base model, `layers` of whose layers are to stay.
        budgets: the least and the greatest of a search.
        tokens: of text, for planners, for the closed form, and for the sensitivities of pieces in a search.
        items: unseen items of each task that models are scored on, at most; `windows` of WikiText-2 and of news.
    """

    data: Path
    models: Path
    out: Path
    base: str
    layers: int
    trials: int
    budgets: tuple[int, int]
    tokens: tuple[int, int, int]
    items: int
    windows: tuple[int, int]
    progress: Progress

    def task(self, name: str) -> str:
        """A task file."""
        return str(self.data / "tasks" / f"{name}.jsonl")

    def text(self, name: str) -> str:
        """A text file."""
        return str(self.data / "text" / f"{name}.txt")

    @cached_property
    def calibration(self) -> list[str]:
        """What the objectives show: the seen third of both tasks, and news without its last tenth, as much of each."""
        questions = read_items(f"{self.task('arc_easy')}#{SEEN}", Question)[1]
        targets = read_items(f"{self.task('math_cot')}#{SEEN}", Target)[1]
        texts = [f"{question.query} {question.choices[question.gold]}" for question in questions]
        texts += [f"{target.query} {target.target}" for target in targets]
        path = self.out / "calibration.jsonl"
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
        return [str(path), f"{self.text('abc_news')}#{SEEN_NEWS}"]

    @cached_property
    def family(self) -> Family:
        """The base and its variants."""
        variants = {name: MemberSpec(model=str(self.models / folder)) for name, folder in VARIANTS.items()}
        return open_family({BASE: MemberSpec(model=self.base), **variants})

    def whole(self, member: str) -> Recipe:
        """A member as it is."""
        depth = self.family.architecture.n_layers
        layers = [Select(source=LayerRef(variant=member, layer=layer)) for layer in range(depth)]
        used = tuple(variant for variant in self.family.variants() if variant.name in (BASE, member))
        return Recipe(variants=used, base=BASE, depth=depth, layers=tuple(layers), spans=derive_spans(layers, depth))

    def folder(self, member: str) -> str:
        """A member as a model that a planner can read: the base's own name, or a folder with the adapter merged."""
        if member == BASE:
            return self.base
        folder = self.out / "members" / member
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            materialize(self.whole(member), self.family.checkpoints(), folder)
        return str(folder)

    def family_file(
        self,
        name: str,
        operations: Sequence[str],
        engine: str,
        seed: int,
        starts: Sequence[str],
        *,
        heal: str = "none",
    ) -> Path:
        """Write the family file of a search."""
        third = {"split": SEEN}
        data: dict[str, Any] = {
            "base": self.base,
            "variants": {variant: str(self.models / folder) for variant, folder in VARIANTS.items()},
            "target": {"layers": self.layers},
            "operations": list(operations),
            "objectives": [
                {"name": "science", "task": self.task("arc_easy"), **third},
                {"name": "prose", "loss": self.text("abc_news"), "split": SEEN_NEWS},
                {"name": "math", "loss": self.task("math_cot"), **third},
            ],
            "search": {
                "engine": engine,
                "trials": self.trials,
                "min_budget": self.budgets[0],
                "max_budget": self.budgets[1],
                "eta": 3,
                "seed": seed,
                "warm_start": list(starts),
            },
            "heal": heal,
        }
        if "merge" in operations:
            data["merge"] = {"methods": list(METHODS), "scale": [0.0, 1.5]}
        path = self.out / "families" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(data, indent=2) + "\n")  # JSON is YAML
        return path


class Rows:
    """What was measured, by name, on the disk after every row. Several processes may write."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __contains__(self, key: str) -> bool:
        return key in self.all()

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.all()[key]

    def all(self) -> dict[str, dict[str, Any]]:
        """Every row."""
        found: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}
        return found

    def put(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps({**self.all(), key: dict(row)}, indent=2) + "\n")
