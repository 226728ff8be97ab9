"""The report of what the stages really write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import intarsia
from intarsia.cli.app import app
from intarsia.errors import UserError
from intarsia.planning.settings import ComeSettings
from tests import families
from tests.conftest import Folder

Sizes = dict[str, Any]


@pytest.fixture
def compressed(model_folder: Folder, sizes: Sizes, tmp_path: Path) -> Path:
    """The folder of a model that was compressed, its run beside it."""
    result = intarsia.compress(str(model_folder("llama")), tmp_path / "out", layers=4, **sizes)
    assert result.report == tmp_path / "out" / "report.html"
    assert result.to_dict()["report"] == str(result.report)
    return tmp_path / "out"


def test_compress_ends_with_the_report(compressed: Path) -> None:
    text = (compressed / "report.html").read_text(encoding="utf-8")
    for heading in ("The puzzle", "Before and after", "Healing", "What was measured", "The ladder"):
        assert f"<h3>{heading}</h3>" in text
    facts = json.loads((compressed / "recipe" / "measures.json").read_text())
    assert (facts["before"]["layers"], facts["after"]["layers"]) == (6, 4)
    assert facts["run"] == "out.run" and len(facts["evaluation"]["sha256"]) == 64
    assert f"{facts['after']['perplexity']['value']:.4g}" in text
    assert '"5": [' in text and '"4": [' in text  # every depth of the run, to leaf through
    assert "fit of mlp.down_proj" in text
    assert f"--layers 4 --calibration {Path(facts['evaluation']['text'].split()[-1]).parent}" in text
    assert AutoModelForCausalLM.from_pretrained(compressed).config.num_hidden_layers == 4


def test_a_model_without_its_run_is_shown_with_less(compressed: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "out.run")
    found = intarsia.report(compressed, out=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert found.bytes == len(text.encode()) and found.written == 0
    assert "Before and after" in text and "<h3>The ladder</h3>" not in text


def test_a_run_of_another_model_is_not_taken_for_its_own(
    compressed: Path, model_folder: Folder, sizes: Sizes, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "out.run")
    intarsia.plan(str(model_folder("llama")), tmp_path / "out.run", layers=4, method="reverse", **sizes)
    intarsia.report(compressed, out=tmp_path / "r.html")
    assert "<h3>The ladder</h3>" not in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_built_and_healed_models_have_reports_too(
    model_folder: Folder, sizes: Sizes, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    intarsia.plan(str(model_folder("llama")), run, layers=4, settings=ComeSettings(merge=3), **sizes)
    intarsia.build(run, tmp_path / "built")
    intarsia.heal(tmp_path / "built", tmp_path / "healed", data=str(text_file), tokens=256, seq_len=32)
    result = intarsia.report(run, tmp_path / "built", tmp_path / "healed", out=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert result.runs == (str(run), str(tmp_path / "built"), str(tmp_path / "healed"))
    assert text.count("<h3>The puzzle</h3>") == 3 and text.count("<h3>Healing</h3>") == 1
    assert text.count("--merge 3") == 1


@pytest.mark.parametrize("chat", [False, True])
def test_both_models_write(chat: bool, sizes: Sizes, tmp_path: Path) -> None:
    model = families.save(families.make_model("llama"), tmp_path / "dense", chat=chat)
    run = tmp_path / "run"
    intarsia.plan(str(model), run, layers=5, method="reverse", **sizes)
    intarsia.build(run, tmp_path / "small")
    prompts = ("roti sa", "a <b> & c")
    found = intarsia.report(tmp_path / "small", out=tmp_path / "r.html", generate=True, prompts=prompts, new_tokens=5)
    assert found.written == 2
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h3>Written by both</h3>" in text and "a &lt;b&gt; &amp; c" in text
    assert "<h5>original</h5>" in text and "<h5>5 layers</h5>" in text


def test_answers_are_the_likeliest_tokens(sizes: Sizes, tmp_path: Path) -> None:
    model = families.make_model("llama")
    tokenizer = families.make_tokenizer()
    ids = tokenizer("roti sa", return_tensors="pt")["input_ids"]
    wanted = model.generate(input_ids=ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :]
    families.save(model, tmp_path / "dense")
    intarsia.plan(str(tmp_path / "dense"), tmp_path / "run", layers=5, method="reverse", **sizes)
    intarsia.build(tmp_path / "run", tmp_path / "small")
    from intarsia.stages import report as stage

    opened = stage.open_checkpoint(str(tmp_path / "dense"))
    loaded = stage.load_model(opened, device=stage.device_of("cpu"))
    answer = stage._answer(loaded, opened, "roti sa", 5)
    assert answer == (tokenizer.decode(wanted, skip_special_tokens=True).strip() or "(nothing)")


def test_wrong_input_is_refused_before_any_work(compressed: Path, tmp_path: Path) -> None:
    run = tmp_path / "out.run"
    with pytest.raises(UserError, match="there already"):
        intarsia.report(run, out=compressed / "report.html")
    with pytest.raises(UserError, match="a folder"):
        intarsia.report(run, out=tmp_path, overwrite=True)
    with pytest.raises(UserError, match="no such folder"):
        intarsia.report(run, out=tmp_path / "no" / "r.html")
    with pytest.raises(UserError, match="--generate"):
        intarsia.report(run, out=tmp_path / "r.html", generate=True)
    with pytest.raises(UserError, match="0 new tokens"):
        intarsia.report(compressed, out=tmp_path / "r.html", generate=True, new_tokens=0)
    (compressed / "recipe" / "measures.json").write_text("{")
    with pytest.raises(UserError, match=r"measures\.json"):
        intarsia.report(compressed, out=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_command_line(compressed: Path, tmp_path: Path) -> None:
    words = ["report", str(tmp_path / "out.run"), str(compressed), "-o", str(tmp_path / "r.html")]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["bytes"] == (tmp_path / "r.html").stat().st_size
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "--overwrite" in again.output
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0
