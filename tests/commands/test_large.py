"""Models larger than memory, from the command line: the same result, spilled files in the run folder, and refusals."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from intarsia.activations import hidden_store
from intarsia.activations.hidden_store import HiddenStore, MemoryBudget
from intarsia.commands.compare import CompareEval, Entrants, compare
from intarsia.commands.evaluate import evaluate_agreement, evaluate_perplexity
from intarsia.commands.heal import PerplexityTexts, TrainingText, heal
from intarsia.commands.job import Placement
from intarsia.errors import UserError
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.options import AnswerSpec, Runtime, TextSpec
from intarsia.pruning.ladder import Ladder
from intarsia.recipe.schema import content_hash
from tests import verbs
from tests.command import invoke
from tests.conftest import Folder

Sizes = dict[str, Any]


def spills(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that hidden states are spilled to, from now on."""
    found: list[Path] = []
    reserve = hidden_store.reserve

    def seen(path: Path, nbytes: int) -> None:
        found.append(path)
        reserve(path, nbytes)

    monkeypatch.setattr(hidden_store, "reserve", seen)
    return found


def test_a_streamed_compression_is_the_same(
    model_folder: Folder, sizes: Sizes, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(model_folder("llama"))
    common = {**sizes, "eval_text": str(text_file), "windows": 2, "layers": 4, "speed": True}
    whole = verbs.compress(model, tmp_path / "whole", **common)
    files = spills(monkeypatch)
    found = verbs.compress(model, tmp_path / "streamed", stream=True, memory="1", **common)
    assert found.recipe_sha256 == whole.recipe_sha256
    tensors, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("streamed", "whole"))
    assert tensors.keys() == wanted.keys() and all(tensors[name].equal(wanted[name]) for name in wanted)
    assert whole.before and whole.after and found.before and found.after
    assert found.before.perplexity is not None and whole.before.perplexity is not None
    assert found.before.perplexity.value == pytest.approx(whole.before.perplexity.value, rel=1e-6)
    assert found.before.prefill_per_s is None and (whole.before.prefill_per_s or 0) > 0
    assert whole.after.answers is not None and found.after.answers is None
    run = tmp_path / "streamed.run"
    assert any(run in path.parents for path in files)
    assert not list(run.glob("intarsia-hidden-*")), "spilled files go when the work is done"
    assert not any(path.exists() for path in files)


def test_agreement_of_streamed_models(model_folder: Folder, sizes: Sizes, text_file: Path, tmp_path: Path) -> None:
    """Along given answers, by every verb that measures it: the same number, and nothing that a model would write."""
    model, file = str(model_folder("llama")), tmp_path / "talks.jsonl"
    rows = [{"query": line[:9], "answer": line[9:30]} for line in text_file.read_text().splitlines() if len(line) > 30]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    common = {**sizes, "eval_text": str(text_file), "windows": 2, "prompts": str(file)}
    done = verbs.compress(model, tmp_path / "out", stream=True, layers=4, answers=3, **common)
    assert done.before is not None and done.after is not None and done.after.answers is not None
    found = done.after.answers
    assert (found.prompts, found.loops, found.examples) == (3, None, ()) and 0.0 < found.agreement.value < 1.0
    assert done.before.answers is not None and done.before.answers.agreement.value == 1.0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"tokens of 3 answers ({file}, with its answers)" in page and "<h3>Answers of both</h3>" not in page
    asked, runtime = AnswerSpec(answers=3, prompts=str(file)), Runtime(stream=True)
    again = evaluate_agreement(str(tmp_path / "out"), model, asked, runtime=runtime)
    assert again.agreement == found and again.original == done.before.answers
    assert [row.keys() for row in again.summary()["agreement"]] == [{"model", "agreement", "next_token_kl"}] * 2
    with pytest.raises(UserError, match="--stream is given without --prompts"):
        evaluate_agreement(str(tmp_path / "out"), model, runtime=runtime)

    recipe, text = tmp_path / "out" / "recipe" / "recipe.yaml", TrainingText(sources=(str(text_file),), seq_len=32)
    spec = PerplexityTexts(answers=3, prompts=str(file))
    healed = heal(recipe, tmp_path / "healed", replace(text, tokens=1024), evaluation=spec, runtime=runtime)
    assert healed.answers[1]["agreement"] == asdict(found.agreement) and "loops" not in healed.answers[1]

    entrants = Entrants(methods=("come",), layers=(4,), heal=("none", "closed-form"), models=(f"{tmp_path / 'out'}",))
    measured = tmp_path / "compare"
    evaluation = CompareEval(text=(str(text_file),), windows=(2,), answers=3, prompts=str(file))
    text = TextSpec(sources=(sizes["calibration"],), tokens=256, seq_len=32)
    compared = compare(model, measured, entrants, evaluation, text=text, runtime=runtime)
    assert compared.rows is not None
    for row in compared.rows[-2:]:  # as it is healed here, and the model that exists already
        assert row["agreement"] == asdict(found.agreement) and "answers that loop" not in row
    with pytest.raises(UserError, match="--tasks or --speed is given with --stream"):
        compare(model, measured, entrants, replace(evaluation, speed=True), text=text, runtime=runtime)
    page = (measured / "report.html").read_text(encoding="utf-8")
    assert "<h3>Answers</h3>" in page and "answers that end in a loop" not in page


def test_a_plan_that_was_killed_leaves_no_spilled_files(model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    """It may resume without --stream, with the same recipes."""
    model, run = str(model_folder("llama")), tmp_path / "run"
    verbs.plan(model, run, layers=5, stream=True, memory="1", **sizes)
    killed = run / "scratch" / "intarsia-hidden-killed"
    killed.mkdir(parents=True)
    (killed / "depth-0.bin").write_bytes(b"0" * 100)
    verbs.plan(model, run, layers=4, **sizes)
    assert not list(run.rglob("intarsia-hidden-*"))
    verbs.plan(model, tmp_path / "other", layers=4, **sizes)
    hashes = [content_hash(Ladder(folder).recipe(4)) for folder in (run, tmp_path / "other")]
    assert hashes[0] == hashes[1]


def test_a_full_disk_is_reported(
    model_folder: Folder, sizes: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, start: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden_store.os, "posix_fallocate", full)
    with pytest.raises(UserError, match="--memory") as caught:
        verbs.plan(str(model_folder("llama")), tmp_path / "run", layers=5, memory="1", **sizes)
    assert "full disk" in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)


def test_healing_streamed_is_the_same(model_folder: Folder, sizes: Sizes, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    verbs.plan(str(model_folder("llama")), run, layers=4, **sizes)
    text = TrainingText(sources=(str(text_file),), tokens=1024, seq_len=32)
    stages = ["closed-form", LayerwiseSettings(batch_tokens=256)]
    whole = heal(run, tmp_path / "whole", text, stages=stages)
    found = heal(run, tmp_path / "streamed", text, stages=stages, runtime=Runtime(stream=True, memory="1B"))
    assert found.recipe_sha256 == whole.recipe_sha256
    assert [row["held_out_perplexity"] for row in found.stages] == [row["held_out_perplexity"] for row in whole.stages]
    assert found.layers == whole.layers
    with pytest.raises(UserError, match="end-to-end"):
        heal(run, tmp_path / "no", text, stages="end-to-end", runtime=Runtime(stream=True))
    with pytest.raises(UserError, match="lets the model write"):
        heal(run, tmp_path / "no", "self", runtime=Runtime(stream=True))


def test_layers_over_two_devices_are_the_same(model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    model = str(model_folder("qwen2"))
    verbs.plan(model, tmp_path / "one", layers=4, **sizes)
    verbs.plan(model, tmp_path / "two", layers=4, devices=("cpu", "cpu"), **sizes)
    hashes = [content_hash(Ladder(tmp_path / name).recipe(4)) for name in ("one", "two")]
    assert hashes[0] == hashes[1]


def test_perplexity_streamed_is_the_same(model_folder: Folder, text_file: Path) -> None:
    model = str(model_folder("mistral"))
    whole = evaluate_perplexity(model, str(text_file), seq_len=32, windows=3)
    found = evaluate_perplexity(model, str(text_file), seq_len=32, windows=3, runtime=Runtime(stream=True, memory="1"))
    assert found.value == pytest.approx(whole.value, rel=1e-6) and found.tokens == whole.tokens


def test_what_does_not_go_together_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    refused: list[Sizes] = [
        {"device": "cpu", "devices": ("cpu", "cpu")},
        {"stream": True, "devices": ("cpu", "cpu")},
        {"devices": ("cpu", "nonsense")},
    ]
    for wrong in refused:
        with pytest.raises(UserError):
            Placement.of(Runtime(**wrong))
    with pytest.raises(UserError, match="lets the model write"):
        verbs.plan(str(model_folder("llama")), tmp_path / "run", layers=5, stream=True, tokens=64, seq_len=32)
    assert not (tmp_path / "run").exists()


def test_the_command_line(model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    words = ["--calibration", sizes["calibration"], "--tokens", "256", "--seq-len", "32", "--json"]
    model, place = str(model_folder("llama")), str(tmp_path / "run")
    call = invoke("plan", model, "--run", place, "--layers", "5", "--stream", "--memory", "1MB", *words)
    assert call.exit_code == 0, call.output
    result = json.loads(call.stdout)
    assert result["peak_memory_bytes"] > 0
    assert invoke("plan", model, "--run", place, "--layers", "5", "--memory", "much", *words).exit_code == 2
    assert invoke("plan", "--layers", "5", *words).exit_code == 2


def test_dropping_a_depth_gives_its_room_back(tmp_path: Path) -> None:
    import torch

    store = HiddenStore((2, 3, 4), torch.float32, memory_budget=MemoryBudget(96, tmp_path))
    store.put(0, 0, torch.ones(2, 3, 4))
    store.put(1, 0, torch.ones(2, 3, 4))
    assert [path.name for path in tmp_path.rglob("*.bin")] == ["depth-1.bin"]
    store.drop(0)
    store.put(2, 0, torch.ones(2, 3, 4))
    assert [path.name for path in tmp_path.rglob("*.bin")] == ["depth-1.bin"]
    store.close()
    assert list(tmp_path.iterdir()) == []
