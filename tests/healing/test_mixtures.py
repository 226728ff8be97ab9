"""Healing mixtures of experts: which tensors are fitted and trained, and their names in the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from intarsia.activations.batches import Batches
from intarsia.activations.loop import Loop
from intarsia.building.loaded_model import load_model, twin
from intarsia.data.corpus import Corpus
from intarsia.healing import end_to_end, layerwise
from intarsia.healing.layer_fit import LayerText, PartFit, fittable, passes
from intarsia.healing.settings import ClosedFormSettings
from intarsia.healing.stages.end_to_end import EndToEndSettings
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.healing.student import load_student
from intarsia.healing.teacher import Teacher
from intarsia.healing.training import Text
from tests import families
from tests.conftest import InMemory, Opened
from tests.healing.conftest import Cut, Tokens

CPU = torch.device("cpu")


def test_o_proj_takes_the_place_of_the_experts(checkpoint_of: Opened) -> None:
    mixture, plain = checkpoint_of("mixtral").architecture, checkpoint_of("cohere").architecture
    assert fittable(("mlp", "attention", "mlp"), mixture) == ("attention",)
    assert fittable(("mlp", "attention", "mlp"), plain) == ("mlp", "attention", "mlp")
    assert passes(mixture, ("mlp",)) == 2 and passes(plain, ("mlp", "attention", "mlp")) == 3


def test_a_fit_counts_by_the_error_that_it_leaves(resident_of: InMemory) -> None:
    """Weights that really help are taken with that error, and others are not, whatever was predicted of them."""
    resident = resident_of("mixtral")
    ids = torch.randint(2, families.VOCABULARY, (8, 9), generator=torch.Generator().manual_seed(0))
    loop = Loop(resident, Batches(Corpus.of(ids, description="", documents=1), CPU))
    stream = loop.stream
    with torch.no_grad():
        entry = stream.enter(ids, None)
        wanted = stream.run(resident.layers[2], entry.h_BTD, entry.calls[2])
        module = twin(resident.layers[2])
        own = module.self_attn.o_proj.weight.detach().clone()
        module.self_attn.o_proj.weight = torch.nn.Parameter(0.5 * own, requires_grad=False)
        text = LayerText(
            loop=loop,
            inputs=lambda rows: entry.h_BTD[rows],
            targets=lambda rows: wanted[rows],
            source=2,
            sequences=slice(None),
        )
        settings = ClosedFormSettings(weighting="uniform", ridges=(1e-3,), held_out=4)
        fitter = PartFit(module, "attention", text, settings)
        _, weight, found = fitter.projection("here")
        assert weight is not None
        before = (stream.run(module, entry.h_BTD, entry.calls[2]) - wanted)[::4].square().sum(-1).mean()
        assert found.error_before == pytest.approx(float(before), rel=1e-4)
        better, right = fitter.measured(own, found)
        assert better is own and right.error_after == pytest.approx(0.0, abs=1e-8)
        worse, wrong = fitter.measured(-own, found)
    assert worse is None and wrong.ridge is None and wrong.error_after == wrong.error_before
    assert torch.equal(module.self_attn.o_proj.weight, 0.5 * own)


def test_layerwise_training_of_experts_alone(cut: Cut, resident_of: InMemory, tokens: Tokens) -> None:
    _, recipe = cut("qwen3-moe")
    resident = resident_of("qwen3-moe")
    settings = LayerwiseSettings(epochs=2, batch_tokens=64, lr=2e-3, only=("experts",))
    healed, report = layerwise.train(recipe, resident, Text.of(*tokens()), settings=settings)
    names = {name for name in resident.architecture.layer_shapes() if ".experts." in name}
    assert len(names) == 3 * families.EXPERTS
    assert set(healed.fitted[2]) == names and report[0]["loss_after"] < report[0]["loss_before"]
    module = resident.module(healed.layers[2], healed.fitted[2])
    stored = healed.fitted[2]["mlp.experts.4.up_proj.weight"]
    in_memory = module.mlp.experts.gate_up_proj[4, stored.shape[0] :].numpy()
    np.testing.assert_array_equal(in_memory, stored)


def test_low_rank_changes_are_of_the_attention(cut: Cut, tokens: Tokens, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    checkpoint, recipe = cut("mixtral")
    settings = EndToEndSettings(epochs=1, batch_tokens=64, lr=2e-3, lora=2)

    def teacher() -> Teacher:
        return Teacher(load_model(checkpoint, device=CPU), checkpoint.architecture, ())

    healed, (report,) = end_to_end.train(
        recipe,
        {"base": checkpoint},
        Text.of(*tokens()),
        teacher,
        folder=tmp_path,
        device=CPU,
        settings=replace(settings, hidden=0.0),
    )
    assert report["loss_after"] < report["loss_before"]
    changed = {name for names in healed.fitted.values() for name in names}
    assert changed == {f"self_attn.{kind}_proj.weight" for kind in "qkvo"}
    student, _ = load_student(tmp_path / "student", settings, CPU)
    trained = {name.split(".lora_")[0] for name, p in student.named_parameters() if p.requires_grad}
    assert len(trained) == 4 * 4 and not any(".mlp." in name for name in trained)
