"""The stage `heal`, from files to files; and the same as several processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import intarsia
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.cli import main
from intarsia.commands import heal as verb
from intarsia.commands.build import read_recipe
from intarsia.commands.heal import HealResult, TrainingText
from intarsia.commands.job import load_tokenizer
from intarsia.data.corpus import Corpus
from intarsia.data.text import draw
from intarsia.errors import UserError
from intarsia.healing.training import own_device, read_curve
from intarsia.options import PerplexityTexts, TextSpec
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from tests import families
from tests.conftest import Folder
from tests.healing.conftest import LAYERWISE, WHOLE, Cut, heal

ROOT = Path(__file__).resolve().parents[2]
ALL = ("closed-form", "layerwise", "end-to-end")


@pytest.fixture
def recipe_file(learned: tuple[Path, Recipe], tmp_path: Path) -> Path:
    _, recipe = learned
    schema.save(recipe, tmp_path / "cut.yaml")
    return tmp_path / "cut.yaml"


def test_all_stages(recipe_file: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    out = tmp_path / "healed"
    given: dict[str, Any] = {"tokens": 8192, "data": str(text_file), "eval_text": [f"{text_file}#0.9:1"]}
    found = heal(recipe_file, out, stages=ALL, **given)
    rows = found.to_dict()["stages"]
    assert [row["stage"] for row in rows] == ["pruned", *ALL]
    assert all(row["taken"] for row in rows)
    perplexities = [row["held_out_perplexity"] for row in rows]
    assert perplexities == sorted(perplexities, reverse=True)
    assert [row["error_before"] < 1e-9 for row in found.layers] == [True, True, False, False]
    assert sum(row["error_after"] for row in found.layers) < sum(row["error_before"] for row in found.layers)
    assert set(found.details) == set(ALL)
    json.dumps(found.to_dict(), allow_nan=False)
    # The model that is built is the one that was measured, and carries the recipe that rebuilds it.
    measured = intarsia.evaluate_perplexity(str(out), f"{text_file}#0.9:1", seq_len=32, windows=4)
    name = next(key for key in rows[-1] if key.startswith("perplexity of"))
    assert measured.value == pytest.approx(rows[-1][name], rel=1e-4)
    intarsia.build(out / "recipe" / "recipe.yaml", tmp_path / "again")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "again")]
    assert weights[0] == weights[1]
    recipe = schema.load(out / "recipe" / "recipe.yaml")
    assert [row["stage"] for row in recipe.provenance["heal"]["stages"]] == ["pruned", *ALL]
    # A healed model can be healed again, and a finished run is only read.
    assert schema.content_hash(read_recipe(out)) == found.recipe_sha256
    again = heal(recipe_file, tmp_path / "copy", run=tmp_path / "healed.heal", stages=ALL, **given)
    assert again.stages == found.stages and again.recipe_sha256 == found.recipe_sha256


@pytest.mark.parametrize("talk", [True, False])
def test_losses_on_the_assistants_tokens(talk: bool, learned: tuple[Path, Recipe], tmp_path: Path) -> None:
    """Conversations as text, answers to questions of a file before and after, and what is refused."""
    folder, recipe = learned
    model = shutil.copytree(folder, tmp_path / "chat")
    families.make_tokenizer(chat=talk).save_pretrained(model)
    schema.save(replace(recipe, variants=(replace(recipe.variants[0], model=str(model)),)), tmp_path / "r.yaml")
    lines = families.sample_text(4000).splitlines()
    rows = [{"prompt": line[:12], "response": line[12:]} for line in lines if len(line) > 20]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = (replace(LAYERWISE, loss_on="assistant"), replace(WHOLE, loss_on="assistant"))
    text = TrainingText(sources=(str(tmp_path / "talks.jsonl"),), tokens=2048, seq_len=32)
    asked = PerplexityTexts(answers=3, answer_tokens=4, prompts=str(tmp_path / "talks.jsonl"))

    def run() -> HealResult:
        return verb.heal(tmp_path / "r.yaml", tmp_path / "out", text, stages=trained, evaluation=asked)

    if not talk:
        with pytest.raises(UserError, match="--loss-on assistant needs a chat template"):
            run()
        assert not (tmp_path / "out.heal").exists()
        return
    found = run()
    assert (tmp_path / "out" / "config.json").is_file()
    taken = any(stage["taken"] for stage in found.stages[1:])
    assert [row["model"] for row in found.answers] == ["original", "as it came", *(["healed"] if taken else [])]
    assert found.answers[0]["agreement"]["value"] == 1.0 and found.answers[1]["next_token_kl"]["value"] > 0.0
    assert [row["perplexity"]["value"] for row in found.answers[1:]] == [
        stage["held_out_perplexity"] for stage in (found.stages[0], found.stages[-1])[: 1 + taken]
    ]
    # The same as of the folder; the card and the report say it.
    alone = intarsia.evaluate_agreement(tmp_path / "out", str(model), asked).agreement
    last = found.answers[-1]
    assert {name: last[name] for name in alone.measures()} == alone.measures()
    card, page = ((tmp_path / "out" / name).read_text() for name in ("README.md", "report.html"))
    assert f"| agreement | 1 ± 0 | {alone.agreement.value:.4g} ±" in card
    assert "| perplexity | " in card and "<h3>Answers of both</h3>" in page and "<td>as it came</td>" in page
    assert found.report == tmp_path / "out" / "report.html"
    plain = [replace(stage, loss_on="all") for stage in trained]
    other = verb.heal(tmp_path / "r.yaml", tmp_path / "all", text, stages=plain, evaluation=PerplexityTexts(answers=0))
    assert other.answers == ()
    for stage in ("layerwise", "end-to-end"):
        ours, theirs = (each.details[stage][0] for each in (found, other))
        assert ours["loss_after"] < ours["loss_before"] and ours["loss_before"] != theirs["loss_before"]


def test_what_is_held_out_comes_after_what_was_fitted_on(recipe_file: Path, text_file: Path, tmp_path: Path) -> None:
    """Of the same text: a fit on a sequence makes the model look better on it than it is."""
    given: dict[str, Any] = {"data": str(text_file), "stages": ("closed-form",)}
    heal(recipe_file, tmp_path / "fitted", **given)
    recipe = read_recipe(tmp_path / "fitted")
    assert recipe.fitted
    calibration = {"text": str(text_file), "tokens": 1024, "seq_len": 32, "seed": 0}
    tokenizer = load_tokenizer(open_checkpoint(recipe.variants[0].model))
    text = draw(TextSpec(sources=(str(text_file),), tokens=2048, seq_len=32), tokenizer).calibration
    for name, facts, rows in (
        ("same", calibration, slice(32, 34)),
        ("fewer", {**calibration, "tokens": 512}, slice(30, 32)),
        ("other", {**calibration, "seed": 1}, slice(30, 32)),
    ):
        schema.save(replace(recipe, provenance={"calibration": facts}), tmp_path / f"{name}.yaml")
        heal(tmp_path / f"{name}.yaml", tmp_path / name, run=tmp_path / f"{name}.run", **given)
        facts = json.loads((tmp_path / f"{name}.run" / "text.json").read_text())
        expected = Corpus.of(text.input_ids[rows], mask=None, description="", documents=1)
        assert facts["held_out"] == {"sha256": expected.sha256, "tokens": 64}, name


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(family: str, cut: Cut, text_file: Path, tmp_path: Path) -> None:
    _, recipe = cut(family)
    schema.save(recipe, tmp_path / "cut.yaml")
    found = heal(tmp_path / "cut.yaml", tmp_path / "out", data=str(text_file), stages=("layerwise",))
    assert found.stages[1]["held_out_perplexity"] <= found.stages[0]["held_out_perplexity"]


def test_a_worse_stage_is_not_taken(recipe_file: Path, text_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from dataclasses import replace

    from intarsia.healing import layerwise

    def worse(recipe: Any, *args: Any, **kwargs: Any) -> Any:
        zeros = np.zeros((families.WIDTH, families.CHANNELS), dtype=np.float32)
        return replace(recipe, fitted={0: {"mlp.down_proj.weight": zeros}}), []

    monkeypatch.setattr(layerwise, "train", worse)
    found = heal(recipe_file, tmp_path / "out", data=str(text_file), stages=("layerwise",))
    assert not found.stages[1]["taken"]
    assert found.stages[1]["held_out_perplexity"] == found.stages[0]["held_out_perplexity"]
    assert schema.load(tmp_path / "out" / "recipe" / "recipe.yaml").fitted == {}


def test_settings_that_differ_are_listed(recipe_file: Path, text_file: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": str(text_file), "stages": ("layerwise",), "run": tmp_path / "run"}
    heal(recipe_file, tmp_path / "first", **given)
    other = {"seed": 3, "tokens": 2048, "stages": [replace(LAYERWISE, seed=3)]}
    with pytest.raises(UserError) as caught:
        heal(recipe_file, tmp_path / "second", **{**given, **other})
    where = [problem.message.split(" with ")[1].split(" ")[0] for problem in caught.value.problems]
    assert where == ["layerwise.seed", "seed", "tokens"]
    assert not (tmp_path / "second").exists()


def test_a_config_that_changed_under_a_run(cut: Cut, text_file: Path, tmp_path: Path) -> None:
    """The recipe's own model's, and that of a teacher. Neither changes what the recipe says: that is of the models."""
    checkpoint, recipe = cut("llama")
    model = Path(shutil.copytree(checkpoint.folder, tmp_path / "model"))
    teacher = families.save(families.make_model("llama", seed=1), tmp_path / "teacher")
    variants = tuple(replace(variant, model=str(model)) for variant in recipe.variants)
    schema.save(replace(recipe, variants=variants), tmp_path / "cut.yaml")
    given: dict[str, Any] = {"data": str(text_file), "stages": ("layerwise",), "run": tmp_path / "run"}
    heal(tmp_path / "cut.yaml", tmp_path / "first", teacher=str(teacher), **given)
    settings = schema.load(tmp_path / "first" / "recipe" / "recipe.yaml").provenance["heal"]["settings"]
    assert "teacher" in settings and not {"config", "teacher_config"} & set(settings)
    for folder in (model, teacher):
        plain = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**plain, "rms_norm_eps": 0.01, "attention_dropout": 0.5}))
    with pytest.raises(UserError) as caught:
        heal(tmp_path / "cut.yaml", tmp_path / "second", teacher=str(teacher), **given)
    where = [problem.message.split(" with ")[1].split(" ")[0] for problem in caught.value.problems]
    assert where == ["config.rms_norm_eps", "teacher_config.rms_norm_eps"]


def test_bad_input(recipe_file: Path, model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(match: str, source: Path = recipe_file, **more: Any) -> None:
        with pytest.raises(UserError, match=match):
            heal(source, out, **{"data": str(text_file), "stages": ("layerwise",), **more})
        assert not out.exists() and not (tmp_path / "out.heal" / "stages").exists()

    refused("closed-form, end-to-end, layerwise", stages=("layerwise", "magic"))
    refused("once", stages=("layerwise", "layerwise"))
    refused("no heal stage", stages=())
    refused("without a recipe", source=model_folder("llama"))
    refused("such file", source=tmp_path / "none.yaml")
    refused("at least", tokens=10**7)
    refused("to hold some out", tokens=32)
    shallow = families.save(families.make_model("llama", num_hidden_layers=5, vocab_size=330), tmp_path / "shallow")
    refused(r"(?s)vocabulary.*number of layers", teacher=str(shallow))
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UserError, match="--overwrite"):
        heal(recipe_file, out, data=str(text_file))


def test_another_teacher(recipe_file: Path, text_file: Path, tmp_path: Path) -> None:
    other = families.save(families.make_model("llama", seed=1), tmp_path / "other")
    found = heal(recipe_file, tmp_path / "out", data=str(text_file), teacher=str(other), stages=("layerwise",))
    own = heal(recipe_file, tmp_path / "own", data=str(text_file), stages=("layerwise",))
    assert found.details["layerwise"][0]["loss_before"] != own.details["layerwise"][0]["loss_before"]


def test_no_longer_sequences_than_the_model_has_positions(
    cut: Cut, learned: tuple[Path, Recipe], text_file: Path, tmp_path: Path
) -> None:
    most = open_checkpoint(learned[1].variants[0].model).architecture.config["max_position_embeddings"]
    schema.save(learned[1], tmp_path / "cut.yaml")
    with pytest.raises(UserError, match=f"--seq-len is {most + 1}; the model has {most} positions"):
        heal(tmp_path / "cut.yaml", tmp_path / "out", str(text_file), seq_len=most + 1, tokens=8 * most)
    assert not (tmp_path / "out.heal").exists()


def test_settings_keep_their_own_seed(recipe_file: Path, text_file: Path, tmp_path: Path) -> None:
    """The text's seed is another one."""
    seeded = replace(LAYERWISE, seed=5)
    heal(recipe_file, tmp_path / "out", str(text_file), stages=[seeded], seed=0)
    said = schema.load(tmp_path / "out" / "recipe" / "recipe.yaml").provenance["heal"]["settings"]
    assert (said["layerwise"]["seed"], said["seed"]) == (5, 0)


MINE = """
from dataclasses import dataclass, replace

import numpy as np

from intarsia.registry import heal_stage


@dataclass(frozen=True, kw_only=True)
class DampSettings:
    # What the first layer's MLP is multiplied by.
    damp: float = 1.0


@heal_stage("mine", settings=DampSettings)
def mine(context, recipe, settings):
    weight = context.resident.layers[0].mlp.down_proj.weight.detach().float().numpy()
    context.details.append({"layer": 0, "damp": settings.damp})
    return replace(recipe, fitted={**recipe.fitted, 0: {"mlp.down_proj.weight": weight * np.float32(settings.damp)}})
"""


def test_a_stage_of_ones_own(
    recipe_file: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    own_registry: None,
) -> None:
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    words = f"heal {recipe_file} --data {text_file} --tokens 1k --seq-len 32 --json --plugin {tmp_path / 'mine.py'}"
    asked = [*words.split(), "--stages", "closed-form,mine", "--layer-lr", "1"]
    with pytest.raises(SystemExit) as caught:
        main.run([*asked, "-o", str(tmp_path / "out")])
    assert caught.value.code == 2 and "--layer-lr is an option of layerwise" in capsys.readouterr().err
    main.run([*asked[:-2], "--damp", "0.01", "-o", str(tmp_path / "out")])
    found = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in found["stages"]] == ["pruned", "closed-form", "mine"]
    assert [row["taken"] for row in found["stages"]] == [True, True, False]
    assert found["details"]["mine"] == [{"layer": 0, "damp": 0.01}]
    assert (tmp_path / "out" / "model.safetensors").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from intarsia.healing import {module}
from tests.healing.conftest import heal

save, saved = {module}.{function}, []

def stops(*args, **kwargs):
    saved.append(save(*args, **kwargs))
    if len(saved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

{module}.{function} = stops
recipe, out, text = sys.argv[1:]
heal(Path(recipe), Path(out), data=text, stages=("{stage}",))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("stage", "module", "function"),
    [("layerwise", "layerwise", "save_state"), ("end-to-end", "end_to_end", "save_snapshot")],
)
def test_killed_and_started_again(
    stage: str, module: str, function: str, recipe_file: Path, text_file: Path, tmp_path: Path
) -> None:
    if stage == "end-to-end":
        pytest.importorskip("accelerate")
    code = KILLED.format(stage=stage, module=module, function=function)
    words = [str(recipe_file), str(tmp_path / "killed"), str(text_file)]
    done = run([sys.executable, "-c", code, *words])
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = heal(recipe_file, tmp_path / "killed", data=str(text_file), stages=(stage,))
    wanted = heal(recipe_file, tmp_path / "whole", data=str(text_file), stages=(stage,))
    assert found.recipe_sha256 == wanted.recipe_sha256


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.exhaustive
def test_two_processes_are_as_one(recipe_file: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    verb = [
        *["-m", "intarsia", "heal", str(recipe_file), "--data", str(text_file), "--tokens", "1024", "--seq-len", "32"],
        *["--stages", "layerwise,end-to-end", "--layer-batch-tokens", "128", "--step-tokens", "128", "--lr", "1e-3"],
        *["--micro-tokens", "32", "--lora", "none", "--evaluations", "3", "--device", "cpu", "--json"],
    ]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "--num_cpu_threads_per_process",
        "1",
    ]
    two = run([*launch, *verb, "-o", str(tmp_path / "two")])
    assert two.returncode == 0, two.stderr
    one = run([sys.executable, *verb, "-o", str(tmp_path / "one")])
    assert one.returncode == 0, one.stderr
    found, wanted = (json.loads(done.stdout)["stages"] for done in (two, one))
    assert [row["held_out_perplexity"] for row in found] == pytest.approx(
        [row["held_out_perplexity"] for row in wanted], rel=1e-4
    )
    curves = [
        read_curve(tmp_path / f"{name}.heal" / "stages" / "2-end-to-end" / "curve.jsonl") for name in ("two", "one")
    ]
    assert len(curves[0]) == len(curves[1]) > 6
    for ours, theirs in zip(*curves, strict=True):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-3)


def test_every_launched_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert own_device(gpu) == gpu
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device(gpu) == torch.device("cuda", 1) and own_device(cpu) == cpu
