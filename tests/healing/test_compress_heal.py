"""`compress` with the closed form in it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import intarsia
from intarsia.building import loaded_model
from intarsia.checkpoint.reader import Checkpoint
from intarsia.cli import main
from intarsia.commands import measures
from intarsia.errors import UserError
from intarsia.healing import closed_form
from intarsia.progress import Progress, reporting_to
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from tests import families, verbs

Compress = Callable[..., Any]


@pytest.fixture
def compress(learned: tuple[Path, Recipe], text_file: Path, tmp_path: Path) -> Compress:
    """Compresses a model that has learnt a little to four layers; everything happens in `tmp_path`."""

    def run(out: str = "out", **changes: Any) -> Any:
        given = {"layers": 4, "calibration": f"{text_file}#0:0.8", "tokens": 8192, "seq_len": 32, "windows": 8}
        given |= {"eval_text": f"{text_file}#0.8:1", "run": tmp_path / "run", **changes}
        return verbs.compress(str(learned[0]), tmp_path / out, **given)

    return run


class Listening(Progress):
    """Keeps what is said to the user."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def no_fit(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("fitted again")


def test_healed_is_better_and_says_so(compress: Compress, text_file: Path, tmp_path: Path) -> None:
    healed = compress()
    cut = compress("cut", heal="none")
    assert healed.healed["method"] == "closed-form" and healed.healed["taken"]
    assert healed.healed["fitted_output_projections"] > 0
    # All three perplexities are those of models that can be had.
    before, without, after = (
        healed.before.perplexity,
        healed.after.perplexity_without_heal,
        healed.after.perplexity,
    )
    assert without.value == pytest.approx(cut.after.perplexity.value, rel=1e-5)
    alone = intarsia.evaluate_perplexity(str(tmp_path / "out"), f"{text_file}#0.8:1", seq_len=32, windows=8)
    assert after.value == pytest.approx(alone.value)
    assert before.value < after.value < without.value
    gap = (np.log(without.value) - np.log(after.value)) / (np.log(without.value) - np.log(before.value))
    assert healed.healed["gap_closed"] == pytest.approx(gap) and 0.2 < gap < 1
    assert cut.healed is None and cut.after.perplexity_without_heal is None
    # The ladder is the same, and stays unhealed.
    rung = schema.load(tmp_path / "run" / "ladder" / "layers-004.yaml")
    assert schema.content_hash(rung) == cut.recipe_sha256 != healed.recipe_sha256
    carried = schema.load(tmp_path / "out" / "recipe" / "recipe.yaml")
    assert carried.layers == rung.layers and carried.fitted
    facts = carried.provenance["heal"]
    assert facts["settings"]["closed-form"]["weighting"] == "relative"
    assert facts["text"]["sha256"] == carried.provenance["calibration"]["sha256"]
    assert [row["stage"] for row in facts["stages"]] == ["pruned", "closed-form"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "least squares" in card and "- Healing: stages `closed-form`" in card
    titles = [line.split("|")[1].strip() for line in card.splitlines() if line.startswith("|")]
    assert titles.index("perplexity before healing") == titles.index("perplexity") + 1
    assert "ealing" not in (tmp_path / "cut" / "README.md").read_text(encoding="utf-8")
    json.dumps(healed.to_dict(), allow_nan=False)
    # The recipe alone rebuilds it, with the same card but for the measures.
    intarsia.build(tmp_path / "out" / "recipe" / "recipe.yaml", tmp_path / "again")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    assert "- Healing: stages `closed-form`" in (tmp_path / "again" / "README.md").read_text(encoding="utf-8")


def test_a_finished_fit_is_only_read(compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compress()
    kept = {path.name for path in (tmp_path / "run" / "healed-004").iterdir()}
    assert {"1-closed-form.json", "1-closed-form.safetensors", "1-closed-form.yaml"} <= kept
    monkeypatch.setattr(closed_form, "fit", no_fit)
    second = compress("second")
    assert second.recipe_sha256 == first.recipe_sha256
    assert second.healed == first.healed
    with pytest.raises(AssertionError, match="fitted again"):  # other settings are another fit
        compress("third", heal="closed-form[fit_changed=mlp]")


@pytest.mark.parametrize(
    "where", ["while", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in ("before", "after"))]
)
def test_stopped_and_continued(where: str, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = compress("undisturbed", run=tmp_path / "undisturbed.run")
    run = tmp_path / "stopped.run"

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if where == "before":
            patched.setattr(closed_form, "fit", stop)
        elif where == "while":  # the tensors are there, their recipe is not
            write = schema.to_yaml_text

            def half(recipe: Recipe, **more: Any) -> Any:
                text, tensors = write(recipe, **more)
                if recipe.fitted:
                    schema.write_tensors(tensors, run / "healed-004" / more["side_file"])
                    stop()
                return text, tensors

            patched.setattr(schema, "to_yaml_text", half)
        else:
            patched.setattr("intarsia.commands.measures.compare_speed", stop)
        with pytest.raises(KeyboardInterrupt):
            compress(run=run, speed=where == "after")
    if where == "after":
        monkeypatch.setattr(closed_form, "fit", no_fit)
    found = compress(run=run, speed=where == "after")
    assert found.recipe_sha256 == wanted.recipe_sha256
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "undisturbed")]
    assert weights[0] == weights[1]


def test_a_fit_that_makes_it_worse_is_not_taken(
    compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(recipe: Recipe, *args: Any, **kwargs: Any) -> Any:
        zeros = np.zeros((families.WIDTH, families.CHANNELS), dtype=np.float32)
        row = {"layer": 0, "module": "mlp.down_proj", "ridge": 1.0, "error_before": 1.0, "error_after": 0.5}
        return replace(recipe, fitted={0: {"mlp.down_proj.weight": zeros}}), [row]

    monkeypatch.setattr(closed_form, "fit", worse)
    progress = Listening()
    with reporting_to(progress):
        result = compress()
    assert not result.healed["taken"] and result.healed["fitted_output_projections"] == 0
    assert any("no better" in text for text in progress.said)
    assert schema.load(tmp_path / "out" / "recipe" / "recipe.yaml").fitted == {}
    assert result.after.perplexity_without_heal is None
    assert "ealing" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("heal", ["closed-form", "none"])
def test_every_model_is_loaded_once(heal: str, compress: Compress, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = loaded_model.load_model

    def counted(checkpoint: Any, **more: Any) -> Any:
        loaded.append(checkpoint.architecture.n_layers)
        return load(checkpoint, **more)

    monkeypatch.setattr(loaded_model, "load_model", counted)
    monkeypatch.setattr(measures, "load_model", counted)
    compress(heal=heal, speed=True)
    assert loaded == [6, 4]
    # Where they do not fit into memory together, the first one is let go of before the second one comes, and comes back
    # to read what the second one wrote.
    monkeypatch.setattr(measures, "free_bytes", lambda device: 0)
    result = compress(heal=heal, overwrite=True, speed=True)
    assert loaded == [6, 4, 6, 4, 6]
    assert result.before.decode_per_s > 0 and result.after.decode_per_s > 0


def test_text_of_the_models_own(learned: tuple[Path, Recipe], tmp_path: Path) -> None:
    result = verbs.compress(str(learned[0]), tmp_path / "out", layers=4, tokens=2048, seq_len=32)
    assert result.healed is not None and result.healed["tokens"] == 2048
    assert result.after.perplexity is not None


@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_healing_costs_every_family(family: str, model_folder: Any, text_file: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"calibration": str(text_file), "tokens": 2048, "seq_len": 32, "layers": 3}
    model = str(model_folder(family))
    dry = verbs.compress(model, tmp_path / "out", dry_run=True, **given)
    # The teacher, and two for each pass over a layer that one output projection takes; a mixture is scored once more.
    architecture = Checkpoint.open(Path(model), model=model).architecture
    one = (
        2
        if architecture.n_experts and not architecture.parallel
        else 1
        if architecture.norm_after("mlp") is None
        else 3
    )
    assert dry.estimate.heal_passes_at_most == 1 + 2 * one
    assert verbs.compress(model, tmp_path / "out", dry_run=True, heal="none", **given).estimate == (
        verbs.plan(model, tmp_path / "run", dry_run=True, **given).estimate
    )
    assert list(tmp_path.iterdir()) == []


MINE = """
from dataclasses import replace

import numpy as np

from intarsia.registry import heal_stage


@heal_stage("mine")
def mine(context, recipe):
    weight = context.resident.layers[0].mlp.down_proj.weight.detach().float().numpy()
    return replace(recipe, fitted={**recipe.fitted, 0: {"mlp.down_proj.weight": weight * np.float32(0.01)}})
"""


def test_on_the_command_line_with_a_stage_of_ones_own(
    learned: tuple[Path, Recipe],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    own_registry: None,
) -> None:
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    words = f"compress {learned[0]} -o {tmp_path / 'out'} --layers 4 --calibration {text_file} --tokens 2048 "
    words += f"--seq-len 32 --eval-text {text_file} --eval-windows 4 --plugin {tmp_path / 'mine.py'}"
    main.run([*words.split(), "--heal", "closed-form,mine"])
    said = capsys.readouterr().out
    assert "perplexity" in said and "report" in said and len(said.splitlines()) <= 15
    stages = schema.load(tmp_path / "out" / "recipe" / "recipe.yaml").provenance["heal"]["stages"]
    assert [(row["stage"], row["taken"]) for row in stages] == [
        ("pruned", True),
        ("closed-form", True),
        ("mine", False),
    ]
    with pytest.raises(SystemExit) as caught:
        main.run([*words.split(), "--heal", "magic"])
    assert caught.value.code == 2


def test_a_full_disk(compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = schema.save

    def full(recipe: Recipe, path: Path) -> None:
        if path.parent.name == "healed-004":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(recipe, path)

    with monkeypatch.context() as patched:
        patched.setattr(schema, "save", full)
        with pytest.raises(UserError, match="run"):
            compress()
    assert not (tmp_path / "out").exists()
    assert compress().healed["taken"]
