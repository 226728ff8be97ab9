"""Every stage on a tiny model, from a text file to a smaller model that loads."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import intarsia
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from intarsia.options import AnswerSpec, NewModel
from intarsia.progress import Progress, reporting_to
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.methods.come import ComeSettings
from intarsia.pruning.methods.laco import LacoSettings
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.run_dir import RunDir
from tests import families, verbs
from tests.command import LITTLE, invoke
from tests.conftest import Folder
from tests.pruning.by_hand import METHODS
from tests.recipes_by_hand import recipe_of, select, shared

Sizes = dict[str, Any]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# LaCo merges several layers at once, and the evolutionary search goes to its target in one step; the plus variants drop
# none of the first four and last two layers.
ANY_DEPTH = [method for method in METHODS if method not in ("laco", "evolve", "taylor+", "magnitude+")]
MEASURED = ("come", "come-p", "sleb")


@pytest.mark.parametrize("method", ANY_DEPTH)
def test_plan_then_build_any_depth(method: str, model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    model = str(model_folder("llama"))
    run = tmp_path / "run"
    chosen = "come-p[granularity=4]" if method == "come-p" else method
    planned = verbs.plan(model, run, layers=3, method=chosen, **sizes)
    assert (planned.layers, planned.target, planned.depths, planned.stopped) == (6, 3, (5, 4, 3), None)
    assert names(run) == {"settings.json", "calibration.json", "wanted.json", "log.jsonl", "ladder", ".lock"}
    if method in MEASURED:
        assert all(math.isfinite(loss) for loss in planned.losses)
    else:
        assert planned.losses == (None, None, None)
    assert planned.layer_forwards <= planned.estimate.passes_at_most * 6 + 1e-9

    for layers in (4, 3):
        built = intarsia.build(run, tmp_path / f"out-{layers}", layers=layers)
        assert built.layers == layers
        loaded = AutoModelForCausalLM.from_pretrained(built.out)
        assert loaded.config.num_hidden_layers == layers
        assert built.parameters == sum(parameter.numel() for parameter in loaded.parameters())
        assert built.bytes == (built.out / "model.safetensors").stat().st_size
        assert AutoTokenizer.from_pretrained(built.out)("roti")["input_ids"]
        assert "README.md" in names(built.out)
    assert intarsia.build(run, tmp_path / "least").layers == 3


def test_laco_goes_to_the_target_in_large_steps(model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    model, run = str(model_folder("llama")), tmp_path / "run"
    settings = LacoSettings(merge=3)
    planned = verbs.plan(model, run, layers=3, method="laco", settings=settings, **sizes)
    assert planned.depths == (4, 3)
    assert planned.layer_forwards <= planned.estimate.passes_at_most * 6 + 1e-9
    assert all(math.isfinite(loss) for loss in planned.losses)
    assert intarsia.build(run, tmp_path / "out", layers=3).layers == 3
    with pytest.raises(UserError, match="target"):  # the last merge took fewer, so another end is another run
        verbs.plan(model, run, layers=2, method="laco", settings=settings, **sizes)


@pytest.mark.parametrize("method", ["taylor+", "magnitude+"])
def test_protected_layers_are_kept(method: str, model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    planned = verbs.plan(str(model_folder("llama")), tmp_path / "run", layers=5, method=method, **sizes)
    assert planned.depths == () and planned.stopped is not None and "never drops" in planned.stopped


def test_the_calibration_loss_is_that_of_the_built_model(model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    """The last recipe's loss, measured anew on the built model in a run of its own."""
    planned = verbs.plan(str(model_folder("qwen3")), tmp_path / "run", layers=4, **sizes)
    built = intarsia.build(tmp_path / "run", tmp_path / "out")
    again = verbs.plan(str(built.out), tmp_path / "again", layers=3, method="shortgpt", **sizes)
    assert again.layers == 4
    model = AutoModelForCausalLM.from_pretrained(built.out).eval()
    from intarsia.data.text import draw
    from intarsia.options import TextSpec

    text = TextSpec(sources=(sizes["calibration"],), tokens=256, seq_len=32)
    corpus = draw(text, AutoTokenizer.from_pretrained(built.out)).calibration
    with torch.no_grad():
        loss = model(corpus.input_ids, labels=corpus.input_ids).loss
    assert planned.losses[-1] == pytest.approx(float(loss), rel=1e-5)


def test_a_finished_plan_is_only_read_and_a_deeper_one_goes_on(
    model_folder: Folder, sizes: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = str(model_folder("llama")), tmp_path / "run"
    verbs.plan(model, run, layers=4, **sizes)
    deeper = verbs.plan(model, run, layers=2, **sizes)
    assert deeper.depths == (5, 4, 3, 2)
    monkeypatch.setattr("intarsia.commands.job.LoadedModel", None)  # nothing is loaded for what is there
    shallower = verbs.plan(model, run, layers=3, **sizes)
    assert shallower.depths == (5, 4, 3, 2) and shallower.target == 3


def test_other_settings_in_a_run_folder(model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    model, run = str(model_folder("llama")), tmp_path / "run"
    verbs.plan(model, run, layers=5, **sizes)
    with pytest.raises(UserError) as caught:
        verbs.plan(model, run, layers=4, **{**sizes, "tokens": 512}, seed=3, settings=ComeSettings(norm="average"))
    places = [problem.message.split()[5] for problem in caught.value.problems]
    assert places == ["planner.norm", "seed", "tokens"]


def test_a_runtime_option_may_be_another_when_a_run_is_resumed(
    model_folder: Folder, sizes: Sizes, tmp_path: Path
) -> None:
    """After out-of-memory the hint is a smaller batch, which the same run folder takes."""
    model, run = str(model_folder("llama")), tmp_path / "run"
    verbs.plan(model, run, layers=5, **sizes)
    other: Sizes = {"batch_tokens": 32, "memory": "1MB", "device": "cpu", "dtype": "float32"}
    assert verbs.plan(model, run, layers=4, **other, **sizes).depths == (5, 4)
    assert verbs.plan(model, run, layers=3, stream=True, **sizes).depths == (5, 4, 3)


def test_two_processes_do_not_share_a_run_folder(model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    model, run = str(model_folder("llama")), tmp_path / "run"
    verbs.plan(model, run, layers=5, **sizes)
    with RunDir(run).opened(), pytest.raises(UserError, match="Another process works in the run folder"):
        verbs.plan(model, run, layers=4, **sizes)
    with RunDir(tmp_path / "out.run").opened({}), pytest.raises(UserError):
        verbs.compress(model, tmp_path / "out", layers=4, **sizes)
    assert not (tmp_path / "out").exists()
    assert verbs.plan(model, run, layers=4, **sizes).depths == (5, 4)


def test_an_unfinished_plan_is_reported_as_such(
    model_folder: Folder, sizes: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between its steps to 5 and to 4 layers, on the way down to 3."""
    model, run = str(model_folder("llama")), tmp_path / "run"

    def stops(self: Ladder, entry: Mapping[str, Any], recipe: Recipe) -> None:
        if entry["layers"] == 4:
            raise KeyboardInterrupt
        append(self, entry, recipe)

    append = Ladder.append
    with monkeypatch.context() as patched:
        patched.setattr(Ladder, "append", stops)
        with pytest.raises(KeyboardInterrupt):
            verbs.plan(model, run, layers=3, **sizes)
    facts = intarsia.inspect(str(run)).facts
    assert (facts["target"], facts["not_finished"]) == (3, "it has reached 5 layers on the way down to 3")
    with pytest.raises(UserError, match="--layers") as caught:
        intarsia.build(run, tmp_path / "out")
    assert caught.value.problems[0].hint.endswith("with --layers: 5.")
    with pytest.raises(UserError, match="not finished"):
        intarsia.build(run, tmp_path / "out", layers=3)
    assert not (tmp_path / "out").exists()
    assert intarsia.build(run, tmp_path / "five", layers=5).layers == 5
    verbs.plan(model, run, layers=3, **sizes)
    facts = intarsia.inspect(str(run)).facts
    assert facts["target"] == 3 and "not_finished" not in facts
    assert intarsia.build(run, tmp_path / "out").layers == 3


@pytest.mark.parametrize("name", ["compare.json", "tailor.json"])
def test_inspect_sends_other_folders_to_the_report(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        intarsia.inspect(str(tmp_path))
    (problem,) = caught.value.problems
    assert name in problem.message and f"intarsia report {tmp_path}" in problem.hint


def test_inspect(model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    model = str(model_folder("qwen3"))
    found = intarsia.inspect(model)
    assert found.kind == "model"
    assert (found.facts["layers"], found.facts["width"], found.facts["parameters"]) == (6, 32, 99424)
    assert found.facts["layer_types"] == "full_attention: 4, sliding_attention: 2"
    assert found.facts["not_exact_when_merged"]
    verbs.plan(model, tmp_path / "run", layers=4, **sizes)
    run = intarsia.inspect(str(tmp_path / "run"))
    assert run.kind == "run"
    assert [step["layers"] for step in run.facts["steps"]] == [5, 4]
    recipe = intarsia.inspect(str(tmp_path / "run" / "ladder" / "layers-004.yaml"))
    assert recipe.kind == "recipe"
    assert recipe.facts["depth"] == "4 of 6 layers"
    assert len(recipe.facts["output_layers"]) == 4
    built = intarsia.build(tmp_path / "run", tmp_path / "out")
    carried = intarsia.inspect(str(tmp_path / "out"))
    assert carried.facts["recipe"]["sha256"] == recipe.facts["sha256"] == built.recipe_sha256
    assert carried.summary()["made_by"] == "come: 4 of 6 layers" and len(carried.summary()) <= 10
    for result in (found, run, recipe, carried):
        json.dumps(result.to_dict())


class Listener(Progress):
    """Hears every line."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_pieces_of_a_mixture_are_called_experts(model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    listener = Listener()
    with reporting_to(listener):
        verbs.plan(str(model_folder("mixtral")), tmp_path / "run", layers=5, **sizes)
    (step,) = (line for line in listener.said if line.startswith("5 layers: "))
    assert re.search(r"joined from \d+ \(KV groups \d+, experts \d+\)", step) and "channels" not in step
    run = intarsia.inspect(str(tmp_path / "run"))
    recipe = intarsia.inspect(str(tmp_path / "run" / "ladder" / "layers-005.yaml"))
    (joined,) = (row["made_of"] for row in recipe.facts["output_layers"] if " + " in row["made_of"])
    for words in (joined, run.facts["steps"][0]["made_of"]):
        assert "experts" in words and "channels" not in words


def test_perplexity_by_hand(model_folder: Folder, text_file: Path) -> None:
    folder = model_folder("opt")
    found = intarsia.evaluate_perplexity(str(folder), str(text_file), seq_len=24, windows=5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"][: 5 * 24]).reshape(5, 24)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert found.nll == pytest.approx(float(loss), rel=1e-5)
    assert found.value == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert (found.windows, found.tokens) == (5, 5 * 23)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_compress(family: str, model_folder: Folder, sizes: Sizes, text_file: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(model_folder(family), model=family)
    share = 1.5 * source.architecture.layer_parameters / source.parameters
    measuring: Sizes = {"eval_text": str(text_file), "windows": 4, "answers": 4, "speed": family == "llama"}
    result = verbs.compress(str(source.folder), tmp_path / "out", sparsity=share, **measuring, **sizes)
    assert result.target == 4 and result.before is not None and result.after is not None
    assert (result.before.layers, result.after.layers) == (6, 4)
    assert result.before.parameters == source.parameters
    assert result.after.parameters == source.parameters - 2 * source.architecture.layer_parameters
    assert result.before.bytes - result.after.bytes == 2 * 4 * source.architecture.layer_parameters
    for measures, folder in ((result.before, source.folder), (result.after, tmp_path / "out")):
        assert measures.perplexity is not None
        alone = intarsia.evaluate_perplexity(str(folder), str(text_file), seq_len=32, windows=4)
        assert measures.perplexity.value == pytest.approx(alone.value)
        assert family != "llama" or (measures.decode_per_s > 0 and measures.prefill_per_s > 0)
    agreed = intarsia.evaluate_agreement(str(tmp_path / "out"), str(source.folder), AnswerSpec(answers=4))
    assert (result.before.answers, result.after.answers) == (agreed.original, agreed.agreement)
    assert agreed.original.agreement.value == 1.0 and agreed.original.examples[0]["same_tokens"] > 0
    assert agreed.agreement.prompts == 4 and agreed.agreement.kl.value > 0.0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h3>Answers of both</h3>" in page and 'class="same"' in page
    assert ("<mark>" in page) == any(each["new"][1] for each in agreed.agreement.examples)
    assert result.run == tmp_path / "out.run"
    assert names(tmp_path / "out") >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", "recipe"}
    assert names(tmp_path / "out") >= {"generation_config.json"}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert result.recipe_sha256 is not None and result.recipe_sha256 in card
    assert f"| agreement | 1 ± 0 | {result.after.answers.agreement.value:.4g} ±" in card
    (row,) = (line for line in card.splitlines() if line.startswith("| perplexity |"))
    printed = [float(cell.split()[0].replace(",", "")) for cell in row.split("|")[2:4]]
    measured = [measures.perplexity.value for measures in (result.before, result.after) if measures.perplexity]
    assert printed == pytest.approx(measured, rel=1e-3)
    assert names(tmp_path) == {"out", "out.run"}
    assert "built" not in names(tmp_path / "out.run")
    json.dumps(result.to_dict())
    with pytest.raises(UserError, match="out"):  # what is there is not overwritten
        verbs.compress(str(source.folder), tmp_path / "out", sparsity=share, **sizes)
    if family != "llama":
        return
    again = verbs.compress(str(source.folder), tmp_path / "out", sparsity=share, overwrite=True, **sizes)
    assert again.recipe_sha256 == result.recipe_sha256


@pytest.mark.parametrize("mixed", [False, True])
def test_text_is_held_out_to_test_on(model_folder: Folder, sizes: Sizes, tmp_path: Path, mixed: bool) -> None:
    """Also beside text that the model writes."""
    sizes = {**sizes, "calibration": [sizes["calibration"], *["self"] * mixed]}
    result = verbs.compress(str(model_folder("llama")), tmp_path / "out", layers=5, **sizes)
    assert result.before is not None and result.before.perplexity is not None
    assert result.before.perplexity.windows == 1
    assert result.evaluation is not None and "held-out" in result.evaluation


def test_text_that_the_model_writes_itself(tmp_path: Path) -> None:
    families.save(families.make_model("llama"), tmp_path / "model", chat=True)
    result = verbs.compress(str(tmp_path / "model"), tmp_path / "out", layers=5, tokens=256, seq_len=32)
    assert result.after is not None and result.after.perplexity is not None
    assert math.isfinite(result.after.perplexity.value)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == families.CHAT_TEMPLATE


def test_stopped_while_measuring(
    model_folder: Folder, sizes: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is there but not measured yet: the same call resumes instead of refusing the folder."""
    model, out, sizes = str(model_folder("llama")), tmp_path / "out", {**sizes, "speed": True}

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("intarsia.commands.measures.compare_speed", stop)
    with pytest.raises(KeyboardInterrupt):
        verbs.compress(model, out, layers=4, **sizes)
    monkeypatch.undo()
    assert out.is_dir()
    with pytest.raises(UserError, match="out"):  # another run has no right to it
        verbs.compress(model, out, layers=4, run=tmp_path / "other.run", **sizes)
    with pytest.raises(UserError, match="out"):  # nor has another depth
        verbs.compress(model, out, layers=3, **sizes)
    assert intarsia.inspect(str(out)).facts["layers"] == 4
    result = verbs.compress(model, out, layers=4, **sizes)
    assert result.after is not None and result.after.layers == 4
    with pytest.raises(UserError, match="out"):
        verbs.compress(model, out, layers=4, **sizes)


def test_a_dry_run_writes_nothing(model_folder: Folder, sizes: Sizes, tmp_path: Path, cache_here: Path) -> None:
    model = str(model_folder("llama"))
    planned = verbs.plan(model, tmp_path / "run", layers=3, dry_run=True, **sizes)
    assert planned.run is None and planned.depths == ()
    result = verbs.compress(model, tmp_path / "out", layers=3, dry_run=True, **sizes)
    assert result.before is None and result.target == 3
    assert (result.estimate.passes_at_most, result.estimate.heal_passes_at_most) == ((6 + 5 + 4 + 3) / 6, 3)
    assert result.estimate.tokens == sizes["tokens"]
    assert result.estimate.weight_bytes == 4 * result.estimate.parameters_before == 4 * 62368
    assert list(tmp_path.iterdir()) == [] and list(cache_here.iterdir()) == []


def test_no_way_down_to_the_target(model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-repeat") as caught:
        verbs.compress(
            str(model_folder("llama")), tmp_path / "out", layers=1, settings=ComeSettings(no_repeat=True), **sizes
        )
    assert "intarsia build" in caught.value.problems[0].hint
    assert names(tmp_path) == {"out.run"}  # the ladder so far can be built


# What cannot be used ends before the work, and leaves nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heal": "magic"}, "closed-form, end-to-end, layerwise"),
        ({"method": "magic"}, "come, come-p, evolve, laco"),
        ({"layers": 6}, "the model has 6 layers"),
        ({"layers": None}, "Neither --layers nor --sparsity"),
        ({"layers": None, "sparsity": 0.95}, "all layers but one hold"),
        ({"calibration": "no-such-file.txt"}, "no-such-file.txt"),
        ({"tokens": 10**7}, "tokens"),
        ({"tokens": 16}, "tokens"),
        ({"seq_len": 2048, "tokens": 4096}, "the model has 1024 positions"),
        ({"device": "quantum"}, "no device"),
        ({"eval_text": "no-such-file.txt"}, "no-such-file.txt"),
        ({"model": "no/such/model/here"}, "no/such/model/here"),
    ],
    ids=str,
)
def test_bad_input_leaves_nothing(
    change: dict[str, Any], message: str, model_folder: Folder, sizes: Sizes, tmp_path: Path
) -> None:
    call = {"model": str(model_folder("opt")), "layers": 4, **sizes, **change}
    with pytest.raises(UserError, match=message):
        verbs.compress(out=tmp_path / "out", **call)
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_text_does_not_spoil_the_run_folder(model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    model = str(model_folder("llama"))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty\.txt"):
        verbs.plan(model, tmp_path / "run", layers=5, **{**sizes, "calibration": str(empty)})
    assert verbs.plan(model, tmp_path / "run", layers=5, **sizes).depths == (5,)


def test_a_calibration_text_that_changed_under_a_run(
    model_folder: Folder, sizes: Sizes, text_file: Path, tmp_path: Path
) -> None:
    text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
    model, run = str(model_folder("llama")), tmp_path / "run"
    verbs.plan(model, run, layers=5, **{**sizes, "calibration": str(text)})
    text.write_text(families.sample_text(5000, seed=9), encoding="utf-8")
    with pytest.raises(UserError, match="started with sha256"):
        verbs.plan(model, run, layers=4, **{**sizes, "calibration": str(text)})


def test_a_calibration_text_by_another_path_is_the_same_text(
    model_folder: Folder, sizes: Sizes, text_file: Path, tmp_path: Path
) -> None:
    model, run = str(model_folder("llama")), tmp_path / "run"
    started = str(text_file)
    verbs.plan(model, run, layers=5, **{**sizes, "calibration": started})
    before = {file.name: file.read_bytes() for file in run.glob("*.json")}
    moved = shutil.copy(text_file, tmp_path / "moved.txt")
    deeper = verbs.plan(model, run, layers=4, **{**sizes, "calibration": str(moved)})
    assert deeper.depths == (5, 4)
    assert json.loads((run / "settings.json").read_text(encoding="utf-8"))["calibration"] == started
    assert (run / "calibration.json").read_bytes() == before["calibration.json"]
    for other in (f"{moved}#0:0.9", "self"):
        with pytest.raises(UserError, match="started with calibration"):
            verbs.plan(model, run, layers=3, **{**sizes, "calibration": other})


def test_the_same_model_folder_spelled_otherwise(
    model_folder: Folder, sizes: Sizes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = model_folder("llama"), tmp_path / "run"
    monkeypatch.chdir(whole.parent)
    verbs.plan("llama", run, layers=5, **sizes)
    link = tmp_path / "link"
    link.symlink_to(whole)
    for depth, spelled in ((4, f"{whole}/"), (3, f"../{whole.parent.name}/llama")):
        assert verbs.plan(spelled, run, layers=depth, **sizes).depths[-1] == depth
    monkeypatch.chdir(tmp_path)
    assert verbs.plan(str(link), run, layers=2, **sizes).depths == (5, 4, 3, 2)
    assert Ladder(run).settings()["model"] == str(whole)
    assert {Ladder(run).recipe(depth).variants[0].model for depth in (5, 2)} == {str(whole)}
    # The ladder's recipes name the folder that they are made from: the same weights elsewhere are not that one.
    shutil.copytree(whole, tmp_path / "llama")
    for other in (tmp_path / "llama", model_folder("opt")):
        with pytest.raises(UserError, match=r'started with model "/.*llama", not "/'):
            verbs.plan(str(other), run, layers=1, **sizes)


def test_weights_that_changed_since_the_recipe_was_made(sizes: Sizes, tmp_path: Path) -> None:
    model = families.make_model("llama")
    families.save(model, tmp_path / "model")
    verbs.plan(str(tmp_path / "model"), tmp_path / "run", layers=5, **sizes)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1.0
    families.save(model, tmp_path / "model")
    with pytest.raises(UserError, match="sha256"):
        intarsia.build(tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="sha256"):
        verbs.plan(str(tmp_path / "model"), tmp_path / "run", layers=4, **sizes)
    assert not (tmp_path / "out").exists()


def test_a_config_that_changed_since_a_run_was_started(sizes: Sizes, tmp_path: Path) -> None:
    """Another eps is another model; another dropout is not."""
    folder, run = families.save(families.make_model("llama"), tmp_path / "model"), tmp_path / "run"
    config = folder / "config.json"
    verbs.plan(str(folder), run, layers=5, **sizes)
    plain = json.loads(config.read_text())
    config.write_text(json.dumps({**plain, "rms_norm_eps": 0.01, "attention_dropout": 0.5}))
    with pytest.raises(UserError) as caught:
        verbs.plan(str(folder), run, layers=4, **sizes)
    (problem,) = caught.value.problems
    assert "config.rms_norm_eps" in problem.message and "not 0.01" in problem.message
    config.write_text(json.dumps({**plain, "attention_dropout": 0.5}))
    assert verbs.plan(str(folder), run, layers=4, **sizes).depths == (5, 4)


def test_a_recipe_written_by_hand(model_folder: Folder, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(model_folder("llama"), model="llama")
    recipe = recipe_of(str(checkpoint.folder), [select(0), shared(checkpoint.architecture, [2, 4]), select(5)])
    schema.save(recipe, tmp_path / "hand.yaml")
    built = intarsia.build(tmp_path / "hand.yaml", NewModel(path=tmp_path / "out", shard_size="20KB"))
    assert built.layers == 3
    assert len(list(built.out.glob("model-*.safetensors"))) > 1
    assert sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(built.out).parameters()) == (
        built.parameters
    )
    with pytest.raises(UserError, match="--layers"):
        intarsia.build(tmp_path / "hand.yaml", tmp_path / "other", layers=3)
    with pytest.raises(UserError, match="out"):
        intarsia.build(tmp_path / "hand.yaml", tmp_path / "out")
    assert intarsia.build(tmp_path / "hand.yaml", NewModel(path=tmp_path / "out", overwrite=True)).layers == 3


@pytest.mark.parametrize("depth", [0, 3, 6])
def test_a_depth_that_the_ladder_has_not(depth: int, model_folder: Folder, sizes: Sizes, tmp_path: Path) -> None:
    verbs.plan(str(model_folder("llama")), tmp_path / "run", layers=4, **sizes)
    with pytest.raises(UserError, match="5, 4"):
        intarsia.build(tmp_path / "run", tmp_path / "out", layers=depth)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    with pytest.raises(UserError, match="run folder"):
        intarsia.build(tmp_path / "thing", tmp_path / "out")
    with pytest.raises(UserError):
        intarsia.build(tmp_path / "nothing.yaml", tmp_path / "out")


# Through the command line


def run(*words: Any) -> Any:
    return invoke(*words)


def test_compress_on_the_command_line(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    words = ["compress", model_folder("llama"), "-o", tmp_path / "out", "--layers", 4, "--calibration", text_file]
    words += ["--tokens", 256, "--seq-len", 32, "--eval-text", text_file, "--eval-windows", 4, "--json"]
    words += ["--method", "come", "--answers", 4]
    dry = run(*words, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert json.loads(dry.stdout)["estimate"]["passes_at_most"] == (6 + 5 + 4) / 6
    assert list(tmp_path.iterdir()) == []
    done = run(*words)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["after"]["layers"] == 4
    assert answer["after"]["perplexity"]["value"] > 0
    assert answer["layer_forwards"] > 6
    assert Path(answer["out"]) == tmp_path / "out"
    refused = run(*words)
    assert refused.exit_code == 2
    assert "Traceback" not in refused.output


def test_the_stages_on_the_command_line(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    calibration = ["--calibration", text_file, "--tokens", 256, "--seq-len", 32]
    planned = run("plan", model_folder("mistral"), "--run", tmp_path / "run", "--layers", 4, *calibration, "--json")
    assert planned.exit_code == 0, planned.output
    assert [rung["layers"] for rung in json.loads(planned.stdout)["ladder"]] == [5, 4]
    built = run("build", tmp_path / "run", "-o", tmp_path / "out", "--layers", 5, "--json")
    assert built.exit_code == 0, built.output
    assert json.loads(built.stdout)["layers"] == 5
    for thing in ("run", "out", "run/ladder/layers-004.yaml"):
        looked = run("inspect", tmp_path / thing, "--json")
        assert looked.exit_code == 0, looked.output
    result = run("eval", "perplexity", tmp_path / "out", "--text", text_file, "--seq-len", 32, "--windows", 3, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["windows"] == 3


PLUGIN = """
from dataclasses import dataclass
from intarsia.pruning.step import Planner, Step
from intarsia.registry import heal_stage, planner

@dataclass(frozen=True, kw_only=True)
class MiddleSettings:
    # How far from the middle.
    off_by: int = 0

@planner("mine", settings=MiddleSettings)
class Middle(Planner):
    \"\"\"Drop the layer in the middle.\"\"\"

    measures = False

    def __init__(self, settings):
        self.settings = settings

    def decide(self, model, target, history):
        start = model.depth // 2 + self.settings.off_by
        return Step(start=start, count=1, op=None, evidence={"off_by": self.settings.off_by})

@heal_stage("mine")
def nothing(context, recipe):
    \"\"\"Leave the model as it is.\"\"\"
    return recipe
"""


def test_a_method_and_a_stage_of_a_file_of_ones_own(
    model_folder: Folder, text_file: Path, tmp_path: Path, own_registry: None
) -> None:
    """Each is one file, and nothing else knows its name: planned, healed, built, shown, and made again."""
    plugin = tmp_path / "mine.py"
    plugin.write_text(PLUGIN, encoding="utf-8")
    words = ["compress", model_folder("llama"), "-o", tmp_path / "out", "--layers", 4, "--calibration", text_file]
    words += ["--tokens", 512, "--seq-len", 32, *LITTLE, "--json"]
    done = run(*words, "--plugin", plugin, "--method", "mine", "--off-by", 1, "--heal", "closed-form,mine")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert (answer["method"], answer["healed"]["method"]) == ("mine", "closed-form, mine")
    layers = [op.sources[0].layer for op in Ladder(tmp_path / "out.run").recipe(4).layers]
    assert layers == [0, 1, 2, 5]
    assert "--off-by 1" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    refused = run(*words, "--off-by", 1)
    assert refused.exit_code == 2 and "--off-by is an option of mine." in refused.output


def test_an_option_of_another_method_names_those_that_have_it(tmp_path: Path) -> None:
    words = ["compress", "demo", "-o", tmp_path / "out", "--layers", 4, "--method", "shortgpt", "--merge", 3]
    refused = run(*words, "--racing")
    assert refused.exit_code == 2
    assert "--merge is an option of come and come-p." in refused.output
    assert "--racing is an option of come-p and sleb." in refused.output
