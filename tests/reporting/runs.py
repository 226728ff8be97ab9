"""Run folders made by hand, as the stages would have written them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intarsia.planning.run_folder import RunFolder
from intarsia.planning.told import describe
from intarsia.recipe.ops import Concat, Cut, LayerRef, Op
from intarsia.recipe.recipe import Recipe, Variant, identity
from intarsia.recipe.schema import content_hash

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
    """6 layers become 5 (2 and 3 joined) and 4 (what is behind them dropped)."""
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
    run = RunFolder.start(path, settings)
    run.pin("calibration", {"text": "notes.txt", "sha256": text, "tokens": 4096})
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
            "hash": content_hash(recipe),
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
            {"name": "mine", "metrics": {"acc_norm": {"value": value, "stderr": None}}, "chance": 0.25},
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
