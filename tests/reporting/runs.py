"""Run folders written by hand, as the commands would have written them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intarsia.pruning.step import describe
from intarsia.recipe import schema
from intarsia.recipe.recipe import Concat, Cut, LayerRef, Merge, Op, Recipe, Select, Variant, derive_spans, identity
from intarsia.tailoring.candidate import Candidate, single
from intarsia.tailoring.run import History, Trial
from tests.pruning.by_hand import ladder_in

INFLUENCE = [0.9, 0.05, 0.02, 0.03, 0.06, 0.3]
GROUPS, CHANNELS = 4, 40


def joined(first: int, second: int, groups: int, channels: int) -> Op:
    """The first `groups` KV groups and `channels` channels of one layer, the rest of another."""

    def cut(layer: int, kv: range, mlp: range) -> Cut:
        weights = {"attention": len(kv) / GROUPS, "mlp": len(mlp) / CHANNELS}
        ref = LayerRef(variant="base", layer=layer)
        return Cut(source=ref, kv_groups=tuple(kv), channels=tuple(mlp), weights=weights)  # type: ignore[arg-type]

    return Concat(
        cuts=(cut(first, range(groups), range(channels)), cut(second, range(groups, GROUPS), range(channels, CHANNELS)))
    )


def ladder() -> list[tuple[Recipe, int, Op | None]]:
    """6 layers become 5 (2 and 3 joined) and 4 (the next one dropped)."""
    whole = identity(Variant(name="base", model="some/model", sha256="ab" * 32), 6)
    op = joined(2, 3, 1, 30)
    five = whole.with_layers((*whole.layers[:2], op, *whole.layers[4:]))
    four = five.with_layers((*five.layers[:3], five.layers[4]))
    return [(five, 2, op), (four, 3, None)]


def plan_run(path: Path, **changes: Any) -> Path:
    """The folder of a finished plan; `changes` are settings, `text` the hash of the calibration tokens."""
    text = changes.pop("text", "cd" * 32)
    steps = changes.pop("steps", 2)
    settings = {
        "model": "some/model",
        "revision": None,
        "sha256": "ab" * 32,
        "method": "come",
        "calibration": "notes.txt",
        "tokens": 4096,
        "seq_len": 512,
        "seed": 0,
        "dtype": None,
        "device": "cpu",
        "batch_tokens": None,
        "planner": {"merge": 2, "sharpness": 0.5, "no_repeat": True, "racing": True},
        "target": None,
        **changes,
    }
    run = ladder_in(path, settings)
    run.run.pin("calibration", {"text": "notes.txt", "sha256": text, "tokens": 4096})
    for number, (recipe, start, op) in enumerate(ladder()[:steps]):
        evidence: dict[str, Any] = {
            "influence": INFLUENCE,
            "span_choice": "sbi",
            "span_scores": {str(layer): 0.1 + layer / 100 for layer in range(5 - number)},
            "prior_ratios": [0.4, 0.6],
        }
        if number == 0:
            evidence["sensitivity"] = {"kv_groups": [[1.0, 2.0, 3.0, 4.0]] * 6, "channels": [[0.5, 1.0, 9.0]] * 6}
        entry = {
            "layers": len(recipe.layers),
            "merged": [start, start + 2],
            "op": None if op is None else describe(op),
            "evidence": evidence,
            "loss": 2.0 + number,
            "layer_forwards": 6.0,
            "seconds": 1.5,
            "recipe": f"layers-{len(recipe.layers):03d}.yaml",
            "hash": schema.content_hash(recipe),
        }
        run.append(entry, recipe)
    return path


def row(method: str, layers: int, heal: str, value: float, **more: Any) -> dict[str, Any]:
    """A row of a comparison, with its perplexity on one text."""
    return {
        "method": method,
        "layers": layers,
        "heal": heal,
        "parameters": layers * 1000,
        "bytes": layers * 2000,
        "perplexity": {"news": {"value": value, "nll": 1.0, "stderr": value / 10, "windows": 4, "sha256": "ef" * 32}},
        **more,
    }


def scores(value: float) -> dict[str, Any]:
    """Results on two tasks, the second without a standard error."""
    return {
        "mean": value,
        "scores": [
            {"name": "piqa", "primary": "acc", "metrics": {"acc": {"value": value, "stderr": 0.02}}, "chance": 0.5},
            {
                "name": "mine",
                "primary": "acc_norm",
                "metrics": {"acc_norm": {"value": value, "stderr": None}},
                "chance": 0.25,
            },
        ],
        "retention": {
            "mean": {
                "n": 20,
                "accuracy": {"value": 0.9, "low": 0.8, "high": 0.95},
                "above_chance": {"value": 0.7, "low": None, "high": None},
            }
        },
    }


def comparison(path: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """The folder of a comparison on one text."""
    path.mkdir()
    facts: Mapping[str, Any] = {
        "kind": "compare",
        "model": "some/model",
        "base_sha256": "ab" * 32,
        "settings": {"tokens": 4096},
        "eval_texts": [{"name": "news", "spec": "news.txt", "sha256": "ef" * 32, "windows": 4, "seq_len": 512}],
        "tasks": [],
        **changes,
    }
    (path / "compare.json").write_text(json.dumps(facts))
    (path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


BASE = Variant(name="base", model="demo", sha256="a" * 64)
MATH = Variant(name="math", model="lora", sha256="b" * 64)


def of(layer: int, variant: str = "base") -> LayerRef:
    return LayerRef(variant=variant, layer=layer)


JOINED = Concat(
    cuts=(
        Cut(source=of(3), kv_groups=(0,), channels=(0, 1, 2), weights={"attention": 0.5, "mlp": 0.75}),
        Cut(source=of(4, "math"), kv_groups=(1,), channels=(3,), weights={"attention": 0.5, "mlp": 0.25}),
    )
)
MERGED = Merge(sources=(of(1, "math"),), weights=(0.3,), method="task_arithmetic", base=of(1), scale=0.9, params={})


def recipe(*layers: Op) -> Recipe:
    return Recipe(variants=(BASE, MATH), base="base", depth=6, layers=layers, spans=derive_spans(layers, 6))


def trial(number: int, costs: tuple[float, float] | None, budget: int = 12, **more: Any) -> Trial:
    candidate = Candidate(positions=(0, 1, 2, number), choices=(single("base"),) * 4)
    status: Any = "failed" if costs is None else "ok"
    reason = "NaN in <prose>" if costs is None else None
    given = {"engine": "evolve", "origin": "mutation", "seconds": 2.0, "layer_forwards": 3.0, **more}
    return Trial(
        number=number,
        candidate=candidate,
        recipe=f"{number:064d}",
        budget=budget,
        seed=0,
        status=status,
        costs=costs,
        reason=reason,
        examples=(budget, budget),
        **given,
    )


TRIALS = (
    trial(0, (1.5, 4.0), 4),
    trial(1, (1.3, 4.0)),
    trial(2, (1.2, 5.0), origin="crossover"),
    trial(3, None),
    trial(4, (1.4, 3.5), engine="smac"),
    trial(5, (1.5, 4.5)),
    trial(6, (9.0, 30.0)),
)
"""Of those at 12 examples, 1, 2 and 4 are the front."""


def search(folder: Path, *, trials: tuple[Trial, ...] = TRIALS, wanted: int = 7, evaluated: bool = True) -> Path:
    """A run folder, as `intarsia tailor` leaves it."""
    (folder / "front").mkdir(parents=True)
    settings = {
        "kind": "tailor",
        "members": {v.name: {"model": v.model, "revision": None, "sha256": v.sha256} for v in (BASE, MATH)},
        "space": {"kind": "prune", "depth": 6, "target": 4, "log10_size": 11.7},
        "budgets": [4, 12],
        "base": {"science": 1.0, "prose": 3.0},
        "objectives": [
            {"name": "science", "kind": "task", "source": "arc.jsonl", "metric": "likelihood", "sha256": "c" * 64},
            {"name": "prose", "kind": "loss", "source": "news.txt", "metric": None, "sha256": "d" * 64},
        ],
        "engine": "smac",
        "seed": 0,
        "heal": "none",
        "device": None,
        "dtype": None,
        "versions": {"torch": "2.13"},
    }
    (folder / "tailor.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "family.yaml").write_text("base: demo  # <the base>\n", encoding="utf-8")
    (folder / "wanted.json").write_text(json.dumps({"trials": wanted}), encoding="utf-8")
    history = History(folder / "trials.jsonl")
    for each in trials:
        history.append(each)
    if not trials:
        return folder
    rows: list[dict[str, Any]] = [
        {
            "model": "base",
            "science": {"value": 1.1, "stderr": 0.05},
            "accuracy": {"science": {"value": 0.5, "stderr": 0.02}},
        },
        {
            "model": "incumbent",
            "science": {"value": 1.25, "stderr": 0.04},
            "accuracy": {"science": {"value": 0.4, "stderr": 0.02}},
            "kept": {"science": 0.8},
            "mean_kept": 0.8,
        },
    ]
    found = {"rows": [{"layers": 4, **row} for row in rows], "examples": {"science": 40}, "without": ["prose"]}
    (folder / "front.json").write_text(json.dumps({"evaluated": found} if evaluated else {}), encoding="utf-8")
    whole = [Select(source=of(layer)) for layer in (0, 1, 2, 5)]
    for number, layers in ((1, (whole[0], MERGED, JOINED, Select(source=of(5, "math")))), (2, whole), (4, whole)):
        schema.save(recipe(*layers), folder / "front" / f"trial-{number:05d}.yaml")
    return folder
