"""The examples of docs/ARCHITECTURE.md: each is a file of its own that works through the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from intarsia.cli import main
from intarsia.recipe import schema
from tests import families
from tests.command import LITTLE

PAGE = Path(__file__).resolve().parents[1] / "docs" / "ARCHITECTURE.md"
EXAMPLES = {
    found[1]: found[0]
    for found in re.finditer(r"(?<=^```python\n)# ([a-z ]+)\n.*?(?=^```$)", PAGE.read_text(), re.M | re.S)
}
Run: TypeAlias = Callable[..., dict[str, Any]]
FAMILY = """
base: {base}
variants: {{math: {math}, code: {code}}}
target: {{layers: 4}}
operations: [remove, merge]
merge: {{methods: [{operator}]}}
objectives: [{{name: prose, loss: {text}, split: "0:0.5"}}]
search: {{engine: {engine}, trials: 6, min_budget: 2, max_budget: 4, eta: 2, warm_start: []}}
"""


pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command with an example as its plugin."""

    def called(example: str, *words: object) -> dict[str, Any]:
        file = tmp_path / f"{example.replace(' ', '_')}.py"
        file.write_text(EXAMPLES[example], encoding="utf-8")
        main.run([*map(str, words), "--plugin", str(file), "--device", "cpu", "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return called


@pytest.fixture
def family(tmp_path: Path, text_file: Path) -> Callable[[str, str], Path]:
    """Gives a family file with an operator and an engine, of three tiny models."""
    models = {
        name: families.save(families.make_model("llama", seed=seed), tmp_path / name)
        for seed, name in enumerate(("base", "math", "code"))
    }

    def written(operator: str, engine: str) -> Path:
        path = tmp_path / "family.yaml"
        path.write_text(FAMILY.format(**models, text=text_file, operator=operator, engine=engine), encoding="utf-8")
        return path

    return written


def test_every_kind_has_an_example() -> None:
    assert list(EXAMPLES) == ["planner", "heal stage", "merge operator", "engine"]


def compress(model: Path, out: Path, text: Path, *words: object) -> list[object]:
    fixed = ("--calibration", text, "--tokens", 512, "--seq-len", 32, *LITTLE)
    return ["compress", model, "--layers", 4, "-o", out, *fixed, *words]


def test_planner(run: Run, model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    chosen = ("--method", "guarded", "--guard", 3, "--heal", "none")
    run("planner", *compress(model_folder("llama"), tmp_path / "out", text_file, *chosen))
    recipe = schema.load(tmp_path / "out" / "recipe" / "recipe.yaml")
    assert recipe.provenance["method"] == "guarded" and recipe.provenance["settings"]["guard"] == 3
    assert [op.sources[0].layer for op in recipe.layers][:3] == [0, 1, 2] and len(recipe.layers) == 4


def test_heal_stage(run: Run, model_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    chosen = ("--heal", "closed-form,mine", "--gain", 1.05)
    run("heal stage", *compress(model_folder("llama"), tmp_path / "out", text_file, *chosen))
    heal = schema.load(tmp_path / "out" / "recipe" / "recipe.yaml").provenance["heal"]
    assert [row["stage"] for row in heal["stages"]] == ["pruned", "closed-form", "mine"]
    assert heal["settings"]["mine"] == {"gain": 1.05}


def test_merge_operator(run: Run, family: Callable[[str, str], Path], tmp_path: Path) -> None:
    words = ("-o", tmp_path / "run", "--no-score", "--no-build")
    found = run("merge operator", "tailor", family("consensus", "random"), *words)
    assert found["trials"] == 6 and found["failed"] == 0
    trials = (tmp_path / "run" / "trials.jsonl").read_text(encoding="utf-8")
    assert '"consensus"' in trials and '"strength"' in trials


def test_engine(run: Run, family: Callable[[str, str], Path], tmp_path: Path) -> None:
    words = ("-o", tmp_path / "run", "--no-score", "--no-build")
    found = run("engine", "tailor", family("task_arithmetic", "climb"), *words)
    assert found["trials"] == 6 and found["failed"] == 0
    trials = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()]
    assert "mutation" in {trial["origin"] for trial in trials}
