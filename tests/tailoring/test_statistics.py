"""RegMean and Fisher averaging in a search: what is measured, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from intarsia.anatomy.spec import Part
from intarsia.building.resident import Resident
from intarsia.calibration.corpus import Corpus
from intarsia.errors import UserError
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.scores import part_scores
from intarsia.progress import Silent
from intarsia.recipe.ops import LayerRef, Merge, Select
from intarsia.recipe.recipe import Variant, identity
from intarsia.recipe.schema import content_hash
from intarsia.tailoring import sensitivities
from intarsia.tailoring.blend_methods import STATISTICS
from intarsia.tailoring.candidate import Blend, Candidate, Keep, single
from intarsia.tailoring.family import Family
from intarsia.tailoring.measure_members import measure_members
from intarsia.tailoring.measure_statistics import check_anatomy, grams, squared_gradients, statistics_file
from intarsia.tailoring.menu import Menu
from intarsia.tailoring.space import Space
from intarsia.tailoring.statistics import Statistics
from intarsia.tailoring.translate import Translator
from tests.tailoring.conftest import make_anatomy

FAMILIES = ("llama", "qwen2")  # without and with biases
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (5, 12), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[4, 7:] = False
    return Corpus.of(ids, mask=mask, description="random", documents=5)


def intermediate(family: Family, corpus: Corpus) -> Intermediate:
    checkpoint = family.checkpoints()["base"]
    whole = identity(Variant(name="base", model="x"), checkpoint.anatomy.n_layers)
    model = Intermediate(Resident(checkpoint, device=CPU), corpus, whole.layers, batch_tokens=24)
    model.measure()
    return model


def stock(family: Family) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(family.members[0].model, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_second_moments_of_inputs(name: str, pair: Callable[[str], Family], corpus: Corpus) -> None:
    family = pair(name)
    model = stock(family)
    wanted = {
        "attention.reads": "k_proj",
        "attention.writes": "o_proj",
        "mlp.reads": "up_proj",
        "mlp.writes": "down_proj",
    }
    seen: dict[str, list[Tensor]] = {}
    for path, module in model.named_modules():
        name_of_it = path.rpartition(".")[2]
        if path.startswith("model.layers.2.") and name_of_it in wanted.values():
            module.register_forward_pre_hook(lambda _, args, key=name_of_it: seen.setdefault(key, []).append(args[0]))
    assert corpus.mask is not None
    with torch.inference_mode():
        model(input_ids=corpus.input_ids, attention_mask=corpus.mask.long())
    found = dict(grams(intermediate(family, corpus)))
    assert list(found) == list(range(6))
    real = corpus.mask.reshape(-1)
    for key, module_name in wanted.items():
        x_NI = torch.cat(seen[module_name]).flatten(0, 1)[real].double()
        torch.testing.assert_close(found[2][key].double(), x_NI.T @ x_NI / int(real.sum()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_squared_gradients(name: str, pair: Callable[[str], Family], corpus: Corpus) -> None:
    family = pair(name)
    model = stock(family)
    assert corpus.mask is not None
    sums: dict[str, Tensor] = {}
    for ids_T, mask_T in zip(corpus.input_ids, corpus.mask, strict=True):
        length = int(mask_T.sum())
        logits_TV = model(input_ids=ids_T[None, :length]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:length], reduction="sum")
        names = [key for key, _ in model.named_parameters() if ".layers." in key]
        for key, gradient in zip(
            names, torch.autograd.grad(loss, [model.get_parameter(k) for k in names]), strict=True
        ):
            sums[key] = sums.get(key, torch.zeros_like(gradient)) + gradient.square()
    found = dict(squared_gradients(intermediate(family, corpus)))
    assert sorted(found) == list(range(6))
    for layer, tensors in found.items():
        for key, value in tensors.items():
            expected = sums[f"model.layers.{layer}.{key}"] / 5
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6 * float(expected.max() + 1))


def measure(family: Family, corpus: Corpus, folder: Path, *, scores: Path | None = None) -> None:
    measure_members(
        family.checkpoints(),
        corpus,
        scores=scores,
        statistics=folder,
        kinds=STATISTICS,
        device=CPU,
        dtype=None,
        progress=Silent(),
    )


@pytest.fixture(scope="module")
def measured(
    pair: Callable[[str], Family], corpus: Corpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, Statistics]:
    """A pair of models with biases, and what was measured on them."""
    family = pair("qwen2")
    folder = tmp_path_factory.mktemp("statistics")
    measure(family, corpus, folder)
    return family, Statistics(folder=folder, anatomy=family.anatomy, read=family.read)


LINEAR = Merge(
    sources=(LayerRef(variant="base", layer=1), LayerRef(variant="math", layer=1)), weights=(0.3, 0.7), method="linear"
)


def blend(method: str, lead: float = 0.3) -> Blend:
    return Blend(members=("base", "math"), method=method, values=(("lead", lead),))  # type: ignore[arg-type]


def both(found: Blend) -> Mapping[Part, Blend]:
    return {"attention": found, "mlp": found}


def loaded(statistics: Statistics, member: str, kind: str, key: str) -> Tensor:
    return statistics._load(statistics_file(statistics.folder, member, kind, 1), key)  # type: ignore[arg-type]


def test_regmean_is_the_papers_formula(measured: tuple[Family, Statistics]) -> None:
    """W = (sum_i s_i W_i G_i) (sum_i s_i G_i)^-1, entries off G's diagonal times 0.9."""
    family, statistics = measured
    found = statistics.fitted(LINEAR, both(blend("regmean")), 1)
    linears = {f"{linear.module}.weight" for linear in family.anatomy.linears}
    assert set(found) == linears  # biases and norms stay the averages of the op
    for name, key in (("mlp.down_proj.weight", "mlp.writes"), ("self_attn.v_proj.weight", "attention.reads")):
        upper: Tensor | float = 0.0
        lower: Tensor | float = 0.0
        for member, share in (("base", 0.3), ("math", 0.7)):
            gram = loaded(statistics, member, "regmean", key).double()
            gram = 0.9 * gram + 0.1 * torch.diag(gram.diagonal())
            weight = family.read(LayerRef(variant=member, layer=1), name).double()
            upper, lower = upper + share * weight @ gram, lower + share * gram
        assert isinstance(upper, Tensor) and isinstance(lower, Tensor)
        expected = torch.linalg.solve(lower, upper.T).T
        np.testing.assert_allclose(found[name], expected.numpy(), rtol=1e-3, atol=1e-5)


def test_fisher_is_the_papers_formula(measured: tuple[Family, Statistics]) -> None:
    """sum_i s_i F_i W_i / sum_i s_i F_i, every tensor of the layer."""
    family, statistics = measured
    found = statistics.fitted(LINEAR, both(blend("fisher")), 1)
    assert set(found) == set(family.anatomy.layer_shapes())
    for name in ("mlp.up_proj.weight", "input_layernorm.weight", "self_attn.k_proj.bias"):
        parts = [
            (share * loaded(statistics, member, "fisher", name), family.read(LayerRef(variant=member, layer=1), name))
            for member, share in (("base", 0.3), ("math", 0.7))
        ]
        upper, lower = sum(f * w for f, w in parts), sum(f for f, _ in parts)
        assert isinstance(upper, Tensor) and isinstance(lower, Tensor)
        used = lower > 1e-12
        assert bool(used.any())
        np.testing.assert_allclose(
            torch.from_numpy(found[name])[used].numpy(), (upper / lower)[used].numpy(), rtol=1e-3, atol=1e-5
        )


def test_one_part_alone_and_a_scaled_output(measured: tuple[Family, Statistics]) -> None:
    _, statistics = measured
    whole = statistics.fitted(LINEAR, both(blend("regmean")), 1)
    other = Blend(members=("base", "math"), method="linear", values=(("lead", 0.3),))
    found = statistics.fitted(replace(LINEAR, scale=0.8), {"attention": other, "mlp": blend("regmean")}, 1)
    assert set(found) == {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert np.array_equal(found["mlp.up_proj.weight"], whole["mlp.up_proj.weight"])
    np.testing.assert_allclose(found["mlp.down_proj.weight"], 0.8 * whole["mlp.down_proj.weight"], rtol=1e-6)


def test_a_candidate_becomes_a_recipe_with_fitted_tensors(measured: tuple[Family, Statistics]) -> None:
    family, statistics = measured
    grids = {"lead": (0.3, 0.5), "lambda": (1.0,), "density": (0.5,)}
    menu = Menu(members=family.names, select=True, methods=("regmean", "fisher"), grids=grids)
    assert menu.count() == 2 + 2 * 2
    words = Translator(
        space=Space(depth=6, target=3, menu=menu),
        anatomy=family.anatomy,
        variants=family.variants(),
        scores={},
        statistics=statistics,
    )
    candidate = Candidate(
        positions=(0, 1, 5), choices=(single("math"), Keep(attention=blend("regmean")), Keep(attention=blend("fisher")))
    )
    recipe = words.recipe(candidate)
    assert isinstance(recipe.layers[0], Select) and set(recipe.fitted) == {1, 2}
    expected = statistics.fitted(LINEAR, both(blend("regmean")), 1)
    assert recipe.layers[1] == LINEAR
    assert all(np.array_equal(recipe.fitted[1][name], array) for name, array in expected.items())
    assert content_hash(recipe) == content_hash(words.recipe(candidate))
    other = replace(candidate, choices=(*candidate.choices[:1], Keep(attention=blend("fisher")), candidate.choices[2]))
    assert content_hash(recipe) != content_hash(words.recipe(other))


def test_what_is_there_is_not_measured_again(measured: tuple[Family, Statistics], corpus: Corpus) -> None:
    family, statistics = measured
    before = {path: path.stat().st_mtime_ns for path in statistics.folder.rglob("*.safetensors")}
    assert len(before) == 2 * 2 * 6
    measure(family, corpus, statistics.folder)
    assert {path: path.stat().st_mtime_ns for path in statistics.folder.rglob("*.safetensors")} == before


def test_a_member_is_measured_once_for_everything(
    pair: Callable[[str], Family], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = pair("llama")
    passes: list[int] = []
    whole = Intermediate.measure
    monkeypatch.setattr(Intermediate, "measure", lambda model: (passes.append(model.depth), whole(model))[1])
    measure(family, corpus, tmp_path / "statistics", scores=tmp_path / "scores.safetensors")
    assert passes == [6, 6]
    found = sensitivities.load(tmp_path / "scores.safetensors")
    assert {str(ref) for ref in found} == {f"{name}:{layer}" for name in ("base", "math") for layer in range(6)}
    model = intermediate(family, corpus)
    expected = part_scores(model.measures[2].channels["mlp"], model.modules[2], model.anatomy, "mlp")
    torch.testing.assert_close(found[LayerRef(variant="base", layer=2)]["mlp"], expected, rtol=1e-5, atol=0.0)
    assert len(list((tmp_path / "statistics").rglob("*.safetensors"))) == 2 * 2 * 6
    (tmp_path / "scores.safetensors").unlink()
    measure(family, corpus, tmp_path / "statistics", scores=tmp_path / "scores.safetensors")
    assert len(passes) == 5 and (tmp_path / "scores.safetensors").exists()  # one of them is this test's own


def test_families_with_experts_are_refused() -> None:
    anatomy = make_anatomy()
    check_anatomy(anatomy, ("regmean",))
    check_anatomy(replace(anatomy, n_experts=4), ())
    with pytest.raises(UserError, match=r"merge\.methods: .* found regmean"):
        check_anatomy(replace(anatomy, n_experts=4), ("regmean",))
