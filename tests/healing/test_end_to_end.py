from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

pytest.importorskip("accelerate")

from intarsia.building.loaded_model import LoadedModel, load_model
from intarsia.building.materialize import assembled
from intarsia.checkpoint.reader import Checkpoint
from intarsia.data.corpus import Corpus
from intarsia.healing import end_to_end
from intarsia.healing.end_to_end import WholeTraining, lesson_depths
from intarsia.healing.pipeline import quality
from intarsia.healing.stages.end_to_end import EndToEndSettings
from intarsia.healing.student import Distiller, Lesson, build_student, load_student, with_trained
from intarsia.healing.teacher import Teacher, TopK
from intarsia.healing.training import Text, read_curve
from intarsia.recipe.recipe import Recipe
from tests import families
from tests.healing.conftest import Cut, Tokens
from tests.recipes_by_hand import recipe_of, select

CPU = torch.device("cpu")
QUICK = EndToEndSettings(batch_tokens=64, micro_tokens=32, evaluations=3, patience=3, lr=3e-3, lora=None, top_k=None)


def heal(
    given: tuple[Checkpoint, Recipe],
    corpora: tuple[Corpus, Corpus],
    folder: Path,
    settings: EndToEndSettings = QUICK,
    load: Callable[[], Teacher] | None = None,
) -> tuple[Recipe, dict[str, Any]]:
    checkpoint, recipe = given

    def teacher() -> Teacher:
        return Teacher(load_model(checkpoint, device=CPU), checkpoint.architecture, lesson_depths(recipe, settings))

    healed, report = end_to_end.train(
        recipe,
        {"base": checkpoint},
        Text.of(*corpora),
        load or teacher,
        folder=folder,
        device=CPU,
        settings=settings,
    )
    return healed, report[0]


def same(first: Recipe, second: Recipe) -> bool:
    assert first.fitted.keys() == second.fitted.keys()
    return all(
        np.array_equal(first.fitted[index][name], second.fitted[index][name])
        for index in first.fitted
        for name in first.fitted[index]
    )


def kl_by_hand(checkpoint: Checkpoint, recipe: Recipe, corpus: Corpus) -> float:
    """Mean KL of next tokens between the original and a recipe's model, at real tokens."""
    resident = LoadedModel(checkpoint, device=CPU)
    with torch.no_grad():
        theirs = resident.model(corpus.input_ids, attention_mask=corpus.mask).logits.log_softmax(-1)
        ours = assembled(recipe, resident)(corpus.input_ids, corpus.mask).logits.log_softmax(-1)
    kl_BT = (theirs.exp() * (theirs - ours)).sum(-1)
    return float(kl_BT.mean() if corpus.mask is None else kl_BT[corpus.mask].mean())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_learns(family: str, cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    checkpoint, recipe = cut(family)
    train, held_out = tokens()
    healed, report = heal((checkpoint, recipe), (train, held_out), tmp_path, replace(QUICK, lr=7.5e-4))
    assert sorted(healed.fitted) == [0, 1, 2, 3]
    assert set(healed.fitted[0]) == set(checkpoint.architecture.layer_shapes())
    assert report["loss_after"] < report["loss_before"]
    assert report["loss_before"] == pytest.approx(kl_by_hand(checkpoint, recipe, held_out), rel=1e-3)
    assert report["loss_after"] == pytest.approx(kl_by_hand(checkpoint, healed, held_out), rel=1e-3)


@pytest.mark.parametrize("assistant", [False, True])
def test_losses_by_hand(assistant: bool, cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    """Every part of the loss against the plain formulas on whole logits and hidden states: with padding, and where
    losses count before the assistant's tokens alone."""
    checkpoint, recipe = cut("qwen2")
    corpus, _ = tokens(padded=True, sequences=3)
    ids, mask = corpus.input_ids, corpus.mask
    assert mask is not None
    settings = replace(QUICK, logits=2.0, hidden=3.0, cross_entropy=5.0, temperature=1.5)
    build_student(recipe, {"base": checkpoint}, tmp_path / "student")
    student, architecture = load_student(tmp_path / "student", settings, CPU)
    teacher = Teacher(load_model(checkpoint, device=CPU), checkpoint.architecture, lesson_depths(recipe, settings))
    distiller = Distiller(
        student, architecture, settings, layers=[2, 3], teacher_head=teacher.split.head, autocast=False
    )
    counted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    counted[:, -1] = False
    with torch.no_grad():
        lesson = teacher.lesson(ids, mask, logits=True)
        found = distiller(ids, mask, replace(lesson, counted_BT=counted) if assistant else lesson)
        ours = student(ids, attention_mask=mask, output_hidden_states=True)
        theirs = teacher.split.model(ids, attention_mask=mask, output_hidden_states=True)
    t, s = ((out.logits / 1.5).log_softmax(-1) for out in (theirs, ours))
    here = counted if assistant else mask
    kl = float((t.exp() * (t - s)).sum(-1)[here].mean()) * 1.5**2
    predicted = counted[:, :-1] if assistant else mask[:, 1:] & mask[:, :-1]
    log_p = ours.logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    text = -float(log_p[predicted].mean())
    between = []
    for index, depth in ((2, 4), (3, 6)):
        a, b = ours.hidden_states[index + 1], theirs.hidden_states[depth]
        between.append(float(((a - b).square().sum(-1) / b.square().sum(-1))[here].mean()))
    hidden = sum(between) / 2
    assert found.tolist() == pytest.approx([2 * kl + 3 * hidden + 5 * text, kl, hidden, text], rel=1e-4)


@pytest.mark.parametrize(
    ("killed_after", "lora"),
    [
        (4, None),
        (3, 2),
        *(
            pytest.param(step, lora, marks=pytest.mark.exhaustive)
            for step in (1, 3, 4, 6, 8)
            for lora in (None, 2)
            if (step, lora) not in ((4, None), (3, 2))
        ),
    ],
)
def test_killed_and_continued_is_as_undisturbed(
    killed_after: int, lora: int | None, cut: Cut, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lora is not None:
        pytest.importorskip("peft")
    settings = replace(QUICK, epochs=2, evaluations=5, hidden=1.0, weight_decay=0.1, lora=lora)
    wanted, report = heal(cut("llama"), tokens(), tmp_path / "whole", settings)
    steps = []
    step = WholeTraining._step

    def dies(self: Any, number: int) -> dict[str, float]:
        steps.append(number)
        if len(steps) == killed_after:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(WholeTraining, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        heal(cut("llama"), tokens(), tmp_path / "killed", settings)
    monkeypatch.setattr(WholeTraining, "_step", step)
    found, resumed = heal(cut("llama"), tokens(), tmp_path / "killed", settings)
    assert same(found, wanted)
    assert read_curve(tmp_path / "killed" / "curve.jsonl") == read_curve(tmp_path / "whole" / "curve.jsonl")
    report.pop("seconds"), resumed.pop("seconds")
    assert report == resumed
    again, _ = heal(cut("llama"), tokens(), tmp_path / "killed", settings)
    assert same(again, wanted)


def test_accumulated_gradients_are_those_of_the_whole(cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    whole, _ = heal(cut("llama"), tokens(), tmp_path / "whole", replace(QUICK, micro_tokens=64))
    parts, _ = heal(cut("llama"), tokens(), tmp_path / "parts", replace(QUICK, micro_tokens=16))
    for index, tensors in whole.fitted.items():
        for name, tensor in tensors.items():
            assert np.allclose(tensor, parts.fitted[index][name], atol=2e-3), (index, name)


def test_checkpointing_changes_memory_alone(cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    for family in ("llama", "opt"):
        plain, _ = heal(cut(family), tokens(), tmp_path / family / "plain")
        saved, _ = heal(cut(family), tokens(), tmp_path / family / "saved", replace(QUICK, checkpointing=True))
        assert np.allclose(*(next(iter(recipe.fitted[2].values())) for recipe in (plain, saved)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama-bias", "opt"])
def test_lora_is_merged(family: str, cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    checkpoint, recipe = cut(family)
    train, held_out = tokens()
    settings = replace(QUICK, lora=4, lr=2e-2)
    healed, report = heal((checkpoint, recipe), (train, held_out), tmp_path, settings)
    linears = {f"{linear.module}.weight" for linear in checkpoint.architecture.linears}
    assert all(set(tensors) == linears for tensors in healed.fitted.values())
    # The merged model has the loss that the one with adapters had.
    assert report["loss_after"] == pytest.approx(kl_by_hand(checkpoint, healed, held_out), rel=1e-3)
    assert report["loss_after"] < report["loss_before"]


def test_a_model_without_linear_modules_is_trained_as_a_whole(tokens: Tokens, tmp_path: Path) -> None:
    settings = GPT2Config(
        vocab_size=families.VOCABULARY, n_positions=64, n_embd=16, n_layer=6, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(settings).save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model", model=str(tmp_path / "model"))
    recipe = recipe_of(str(checkpoint.folder), [select(0), select(2)])
    low_rank = replace(QUICK, lora=4, lr=None)
    trained = {}
    for name, how in (("low rank", low_rank), ("whole", replace(low_rank, lora=None))):
        healed, report = heal((checkpoint, recipe), tokens(), tmp_path / name, how)
        assert report["loss_after"] < report["loss_before"]
        trained[name] = healed
    assert same(trained["low rank"], trained["whole"])


def test_lora_merges_as_peft_does(cut: Cut, tmp_path: Path) -> None:
    LoraLayer = pytest.importorskip("peft.tuners.lora").LoraLayer

    checkpoint, recipe = cut("llama")
    build_student(recipe, {"base": checkpoint}, tmp_path / "student")
    model, architecture = load_student(tmp_path / "student", replace(QUICK, lora=3), CPU)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_()
    opened = Checkpoint.open(tmp_path / "student", model="student")
    ours = with_trained(recipe, architecture, opened, {name: tensor.detach() for name, tensor in trained.items()})
    checked = 0
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            module.merge()
            _, _, rest = name.partition("layers.")
            index, _, local = rest.partition(".")
            merged = module.get_base_layer().weight.detach().numpy()
            assert np.allclose(ours.fitted[int(index)][f"{local}.weight"], merged, atol=1e-5)
            checked += 1
    assert checked == 4 * 7


def test_embedding_norm_and_head_stay(cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    checkpoint, recipe = cut("qwen2")
    build_student(recipe, {"base": checkpoint}, tmp_path / "student")
    model, architecture = load_student(tmp_path / "student", QUICK, CPU)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight", "model.norm.weight"]
    assert architecture.n_layers == 4


def test_top_k_is_written_once(cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    settings = replace(QUICK, top_k=8, temperature=2.0)
    first, report = heal(cut("llama"), tokens(), tmp_path / "first", settings)
    assert report["loss_after"] < report["loss_before"]

    def no_teacher() -> Teacher:
        raise AssertionError("the teacher is not needed")

    shutil.copytree(tmp_path / "first" / "likeliest", tmp_path / "second" / "likeliest")
    second, _ = heal(cut("llama"), tokens(), tmp_path / "second", settings, load=no_teacher)
    assert same(first, second)


def test_top_k_holds_the_teachers_likeliest(cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    checkpoint, _ = cut("llama")
    train, held_out = tokens(padded=True)
    heal(cut("llama"), (train, held_out), tmp_path / "run", replace(QUICK, top_k=5))
    log_p, index = TopK(tmp_path / "run" / "likeliest").rows([2, 25], CPU)
    with torch.no_grad():
        rows = [train.input_ids[2], held_out.input_ids[1]]
        masks = [train.mask[2], held_out.mask[1]]  # type: ignore[index]
        model = load_model(checkpoint, device=CPU)
        logits = model(torch.stack(rows), attention_mask=torch.stack(masks).long()).logits
    real = torch.stack(masks).reshape(-1)
    wanted = logits.log_softmax(-1).reshape(-1, logits.shape[-1])[real].topk(5)
    assert torch.allclose(log_p[real], wanted.values, atol=1e-5)
    assert torch.equal(index[real].long(), wanted.indices)


def test_all_tokens_in_the_cache_teach_as_the_teacher(cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    _, report = heal(cut("llama"), tokens(), tmp_path / "live")
    _, again = heal(cut("llama"), tokens(), tmp_path / "cached", replace(QUICK, top_k=families.VOCABULARY))
    assert again["loss_before"] == pytest.approx(report["loss_before"], rel=1e-3)
    assert again["loss_after"] == pytest.approx(report["loss_after"], rel=2e-2)
    _, more = heal(cut("llama"), tokens(), tmp_path / "more", replace(QUICK, top_k=families.VOCABULARY + 1))
    assert more["loss_after"] == again["loss_after"]


@pytest.mark.parametrize(("settings", "peak"), [({}, 1e-3), ({"lora": None}, 1e-4), ({"lora": None, "lr": 2e-4}, 2e-4)])
def test_the_learning_rate_suits_what_is_trained(settings: dict[str, Any], peak: float) -> None:
    assert EndToEndSettings(**settings).peak == peak


def test_a_worse_heal_returns_the_input(cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    checkpoint, recipe = cut("llama")
    settings = replace(QUICK, lr=50.0, clip=1e9, warmup=0.0)
    healed, report = heal((checkpoint, recipe), tokens(), tmp_path, settings)
    assert healed == recipe
    assert report["loss_after"] == report["loss_before"]
    assert report["stopped"] is not None and "step" in report["stopped"]


def test_not_a_number_stops_with_the_best(
    cut: Cut, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = heal(cut("llama"), tokens(), tmp_path / "short", replace(QUICK, evaluations=6))
    forward, calls = Distiller.forward, []

    def breaks(self: Distiller, ids: torch.Tensor, mask: torch.Tensor | None, lesson: Lesson) -> torch.Tensor:
        found = forward(self, ids, mask, lesson)
        if found.requires_grad:
            calls.append(1)
        return found * float("nan") if len(calls) > 8 and found.requires_grad else found

    monkeypatch.setattr(Distiller, "forward", breaks)
    healed, report = heal(cut("llama"), tokens(), tmp_path / "broken", replace(QUICK, evaluations=6))
    assert report["stopped"] == "the loss was nan at step 5"
    assert report["loss_after"] < report["loss_before"]
    assert wanted.fitted.keys() == healed.fitted.keys()
    assert all(np.isfinite(tensor).all() for tensors in healed.fitted.values() for tensor in tensors.values())


def test_training_text_harder_than_held_out_text_is_no_divergence(
    cut: Cut, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Distiller.forward

    def harder(self: Distiller, ids: torch.Tensor, mask: torch.Tensor | None, lesson: Lesson) -> torch.Tensor:
        found = forward(self, ids, mask, lesson)
        return found * 100.0 if found.requires_grad else found

    monkeypatch.setattr(Distiller, "forward", harder)
    _, report = heal(cut("llama"), tokens(), tmp_path)
    assert report["stopped"] is None and report["loss_after"] < report["loss_before"]


def test_early_stop_keeps_the_best(cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    settings = replace(QUICK, epochs=30, evaluations=60, patience=2, lr=2e-2, warmup=0.0)
    checkpoint, recipe = cut("llama")
    train, held_out = tokens(sequences=8)
    healed, report = heal((checkpoint, recipe), (train, held_out), tmp_path, settings)
    assert report["stopped"] is not None and "no better" in report["stopped"]
    held = {line["step"]: line["held_out"] for line in read_curve(tmp_path / "curve.jsonl") if "held_out" in line}
    assert report["loss_after"] == min(held.values())
    assert kl_by_hand(checkpoint, healed, held_out) == pytest.approx(min(held.values()), rel=1e-3)


def test_mixed_precision_is_close(cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    _, exact = heal(cut("llama"), tokens(), tmp_path / "exact")
    _, mixed = heal(cut("llama"), tokens(), tmp_path / "mixed", replace(QUICK, precision="bf16"))
    assert mixed["loss_after"] != exact["loss_after"]
    assert mixed["loss_after"] == pytest.approx(exact["loss_after"], rel=0.1)


def test_trackers(cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    heal(cut("llama"), tokens(), tmp_path, replace(QUICK, log="tensorboard"))
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_quality_is_of_the_built_model(family: str, cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    from intarsia.evaluation.perplexity import perplexity

    checkpoint, recipe = cut(family)
    _, held_out = tokens(padded=True)
    found = quality(recipe, LoadedModel(checkpoint, device=CPU), [held_out])
    build_student(recipe, {"base": checkpoint}, tmp_path / "student")
    built = load_model(Checkpoint.open(tmp_path / "student", model="student"), device=CPU)
    assert found["texts"][0]["value"] == pytest.approx(perplexity(built, held_out).value, rel=1e-4)
    # Layers 0 and 1 are the original's; their hidden states are the original's own.
    assert found["errors"][:2] == pytest.approx([0.0, 0.0], abs=1e-10)
    assert min(found["errors"][2:]) > 1e-3
