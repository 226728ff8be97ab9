"""Recipes become model folders that any HuggingFace tool loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from intarsia.activations.stream import LayerStream
from intarsia.building.layer import to_tensors
from intarsia.building.loaded_model import LoadedModel
from intarsia.building.materialize import RECIPE_FILE, assembled, materialize
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from intarsia.recipe import schema
from intarsia.recipe.algebra import concat_of
from intarsia.recipe.recipe import Merge, Op, Recipe
from tests import families
from tests.conftest import Folder, InMemory, Opened
from tests.recipes_by_hand import recipe_of, ref, select, shared


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def config_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def mixed(checkpoint: Checkpoint) -> Recipe:
    """Four layers of every kind, two of them with fitted tensors. Attention types are not mixed."""
    architecture = checkpoint.architecture
    layers: list[Op] = [
        select(0),
        shared(architecture, [2, 3], seed=1),
        Merge(sources=(ref(1), ref(4)), weights=(0.25, 0.75)),
        shared(architecture, [5, 4], seed=2, norm="average"),
    ]
    recipe = recipe_of(checkpoint.model, layers)
    down = f"{architecture.modules(architecture.writer('mlp'))[0]}.weight"
    out = f"{architecture.writer('attention').module}.weight"
    rng = np.random.default_rng(0)
    fitted = {
        index: {name: rng.normal(0, 0.2, architecture.layer_shapes()[name]).astype(np.float32)}
        for index, name in ((0, down), (1, out))
    }
    return recipe.with_layers(layers, fitted=fitted)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_identity_rebuilds_the_model_bit_for_bit(family: str, checkpoint_of: Opened, tmp_path: Path) -> None:
    source = checkpoint_of(family)
    recipe = recipe_of(source.model, [select(layer) for layer in range(families.DEPTH)])
    materialize(recipe, {"base": source}, tmp_path / "out")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(source.folder))
    assert config_of(tmp_path / "out") == config_of(source.folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source.folder / name).read_bytes()


@pytest.mark.parametrize("norm", ["fold", "average"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_ratio_one_to_nothing_is_dropping_the_second_layer(
    family: str, norm: str, checkpoint_of: Opened, tmp_path: Path
) -> None:
    source = checkpoint_of(family)
    architecture = source.architecture
    merged = concat_of(
        [select(0), select(1)],
        [{"attention": range(architecture.n_kv_heads), "mlp": range(architecture.n_pieces("mlp"))}, {}],
        weights=[{"attention": 1.0, "mlp": 1.0}, {"attention": 0.0, "mlp": 0.0}],
        norm=norm,
        architecture=architecture,
    )
    rest = [select(layer) for layer in range(2, families.DEPTH)]
    materialize(recipe_of(source.model, [merged, *rest]), {"base": source}, tmp_path / "merged")
    names = {
        name: name
        if not name.startswith(architecture.family.modules.layers)
        else source.architecture.tensor_name(index, local)
        for index, layer in enumerate([0, 2, 3, 4, 5])
        for local in architecture.layer_shapes()
        for name in [source.architecture.tensor_name(layer, local)]
    }
    original = tensors_of(source.folder)
    expected = {new: original[old] for old, new in names.items()}
    expected |= {name: original[name] for name in source.outside_names()}
    assert_same_tensors(tensors_of(tmp_path / "merged"), expected)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_on_disk_and_in_memory_are_the_same(
    family: str, checkpoint_of: Opened, resident_of: InMemory, tmp_path: Path
) -> None:
    """Tensors to the byte, and logits: of the folder, loaded the usual way, and of the chain of modules."""
    source, resident = checkpoint_of(family), resident_of(family)
    recipe = mixed(source)
    materialize(recipe, {"base": source}, tmp_path / "out")
    on_disk = tensors_of(tmp_path / "out")
    modules = [resident.module(op, recipe.fitted.get(index)) for index, op in enumerate(recipe.layers)]
    in_memory = {
        source.architecture.tensor_name(index, name): parameter.detach()
        for index, module in enumerate(modules)
        for name, parameter in to_tensors(dict(module.named_parameters()), source.architecture).items()
    }
    in_memory |= {name: source.tensor(name) for name in source.outside_names()}
    assert_same_tensors(on_disk, in_memory)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    stream = LayerStream(resident.model, resident.architecture)
    ids = torch.randint(2, families.VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 9:] = False
    for keep in (None, mask):
        with torch.no_grad():
            entry = stream.enter(ids, keep)
            h = entry.h_BTD
            for op, module in zip(recipe.layers, modules, strict=True):
                h = stream.run(module, h, entry.calls[op.sources[0].layer])
            chain = stream.logits(h, ids, keep)
            whole = loaded(ids, attention_mask=None if keep is None else keep.long()).logits
        real = slice(None) if keep is None else keep
        torch.testing.assert_close(whole[real], chain[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_folder_is_an_ordinary_model(family: str, checkpoint_of: Opened, tmp_path: Path) -> None:
    """It loads, generates with its cache what it generates without, and has a tokenizer."""
    source = checkpoint_of(family)
    recipe = mixed(source)
    materialize(recipe, {"base": source}, tmp_path / "out")
    assert schema.content_hash(schema.load(tmp_path / "out" / RECIPE_FILE)) == schema.content_hash(recipe)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.num_hidden_layers == len(model.get_submodule(source.architecture.family.modules.layers)) == 4
    ids = tokenizer("roti lane", return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert cached.shape[1] == ids.shape[1] + 24
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == source.architecture.tied
    stored = f"{source.architecture.family.modules.head}.weight"
    assert (stored in tensors_of(tmp_path / "out")) == (stored in source.headers)


def test_lists_of_the_config_follow_the_layers(checkpoint_of: Opened, tmp_path: Path) -> None:
    source = checkpoint_of("qwen3")
    recipe = recipe_of(source.model, [select(0), shared(source.architecture, [3, 2]), select(4), select(3)])
    materialize(recipe, {"base": source}, tmp_path / "out")
    before, after = config_of(source.folder), config_of(tmp_path / "out")
    assert after["layer_types"] == ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert after["num_hidden_layers"] == 4
    assert {**after, "layer_types": 0, "num_hidden_layers": 0} == {**before, "layer_types": 0, "num_hidden_layers": 0}


def test_shards_in_and_out(tmp_path: Path) -> None:
    model = families.make_model("llama")
    families.save(model, tmp_path / "whole")
    families.save(model, tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    built = {}
    for name, size in (("whole", 5 * 10**9), ("sharded", 40_000)):
        source = Checkpoint.open(tmp_path / name, model=name)
        materialize(mixed(source), {"base": source}, tmp_path / f"{name}-out", max_shard_bytes=size)
        built[name] = tensors_of(tmp_path / f"{name}-out")
    assert_same_tensors(built["sharded"], built["whole"])
    files = list((tmp_path / "sharded-out").glob("model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "sharded-out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"]) == set(built["whole"])
    loaded = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-out").state_dict()
        for name in ("whole", "sharded")
    }
    assert_same_tensors(loaded["sharded"], loaded["whole"])


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    families.save(families.make_model("opt").to(torch.bfloat16), tmp_path / "model")
    source = Checkpoint.open(tmp_path / "model", model="model")
    recipe = mixed(source)
    materialize(recipe, {"base": source}, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    resident = LoadedModel(source, device=torch.device("cpu"))
    for index, op in enumerate(recipe.layers):
        for name, parameter in resident.module(op, recipe.fitted.get(index)).named_parameters():
            assert torch.equal(found[source.architecture.tensor_name(index, name)], parameter)


def test_two_variants_share_one_model(model_folder: Folder, tmp_path: Path) -> None:
    """Layers from another variant; everything outside the layers from the base."""
    families.save(families.make_model("llama", seed=5), tmp_path / "math")
    base = Checkpoint.open(model_folder("llama"), model="base")
    math = Checkpoint.open(tmp_path / "math", model="math")
    by_hand = """
        version: 1
        variants: {base: {model: base}, math: {model: math}}
        base: base
        depth: 6
        layers: [{select: 0}, {select: "math:3"}]
    """
    (tmp_path / "recipe.yaml").write_text(by_hand, encoding="utf-8")
    recipe = schema.load(tmp_path / "recipe.yaml")
    materialize(recipe, {"base": base, "math": math}, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    for name in base.architecture.layer_shapes():
        assert torch.equal(found[f"model.layers.0.{name}"], base.layer_tensor(0, name))
        assert torch.equal(found[f"model.layers.1.{name}"], math.layer_tensor(3, name))
    assert torch.equal(found["model.embed_tokens.weight"], base.tensor("model.embed_tokens.weight"))


def test_building_twice_gives_the_same_bytes(checkpoint_of: Opened, tmp_path: Path) -> None:
    source = checkpoint_of("qwen2")
    for name in ("one", "two"):
        materialize(mixed(source), {"base": source}, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*") if path.is_file()
    )
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    side = RECIPE_FILE.with_suffix(".safetensors")
    written = set()
    for time in range(10):  # what has no order of its own comes out right now and then
        (tmp_path / f"{time}").mkdir()
        schema.save(mixed(source), tmp_path / f"{time}" / "recipe.yaml")
        written.add((tmp_path / f"{time}" / side.name).read_bytes())
    assert written == {(tmp_path / "one" / side).read_bytes()}


def test_a_fold_that_overflows_is_refused(tmp_path: Path) -> None:
    model = families.make_model("llama").half()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(30000.0)
        model.model.layers[1].self_attn.q_proj.weight.fill_(30.0)
    families.save(model, tmp_path / "model")
    source = Checkpoint.open(tmp_path / "model", model="model")
    recipe = recipe_of("model", [shared(source.architecture, [0, 1])])
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight.*NaN or infinity"):
        materialize(recipe, {"base": source}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_written(
    checkpoint_of: Opened, tmp_path: Path
) -> None:
    source = checkpoint_of("llama")
    with pytest.raises(UserError, match="layer"):
        materialize(recipe_of("model", [select(0), select(6)]), {"base": source}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_finish_adds_is_published_or_fails_with_the_rest(checkpoint_of: Opened, tmp_path: Path) -> None:
    source = checkpoint_of("llama")
    recipe = recipe_of("model", [select(0)])

    def card(folder: Path) -> None:
        (folder / "README.md").write_text("a card", encoding="utf-8")

    def fail(folder: Path) -> None:
        raise RuntimeError("no card")

    with pytest.raises(RuntimeError, match="no card"):
        materialize(recipe, {"base": source}, tmp_path / "out", finish=fail)
    assert list(tmp_path.iterdir()) == []
    materialize(recipe, {"base": source}, tmp_path / "out", finish=card)
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "a card"


def test_selected_layers_are_shared_and_new_ones_are_not(resident_of: InMemory) -> None:
    resident = resident_of("llama")
    assert resident.module(select(3)) is resident.layers[3]
    merged = resident.module(shared(resident.architecture, [3, 4]))
    own = {parameter.data_ptr() for parameter in merged.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in resident.model.parameters())
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_a_new_layer_is_of_its_first_sources_type(resident_of: InMemory) -> None:
    resident = resident_of("qwen3")
    assert resident.module(shared(resident.architecture, [3, 2])).self_attn.sliding_window == 5
    assert resident.module(shared(resident.architecture, [4, 1])).self_attn.sliding_window is None


def test_the_output_is_taken_by_lm_eval(checkpoint_of: Opened, tmp_path: Path) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed (extra `tasks`)")
    from lm_eval.api.instance import Instance

    source = checkpoint_of("llama")
    materialize(mixed(source), {"base": source}, tmp_path / "out")
    harness = huggingface.HFLM(pretrained=str(tmp_path / "out"), device="cpu", dtype="float32", batch_size=2)
    requests = [("roti lane", " nori"), ("nase", " laro tine")]
    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index) for index, pair in enumerate(requests)
    ]
    answers = harness.loglikelihood(instances, disable_tqdm=True)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for (context, continuation), (found, _) in zip(requests, answers, strict=True):
        ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        first = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            log_p = model(ids).logits.log_softmax(-1)
        by_hand = sum(float(log_p[0, at - 1, ids[0, at]]) for at in range(first, ids.shape[1]))
        assert found == pytest.approx(by_hand, abs=1e-3)


IDS = torch.randint(2, families.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))


def some_recipe(resident: LoadedModel) -> Recipe:
    """Layers of every kind, out of their old places, and two fitted tensors."""
    architecture = resident.architecture
    summed = Merge(sources=(ref(4), ref(5)), weights=(0.25, 0.75))
    recipe = recipe_of(str(resident.checkpoint.folder), (select(1), shared(architecture, (2, 3)), summed, select(5)))
    name = f"{architecture.modules(architecture.writer('mlp'))[0]}.weight"
    chance = np.random.default_rng(0)
    fitted = {
        index: {name: chance.normal(0, 0.2, architecture.layer_shapes()[name]).astype(np.float32)} for index in (0, 1)
    }
    return replace(recipe, fitted=fitted)


def built_and_loaded(recipe: Recipe, checkpoint: Checkpoint, out: Path, dtype: torch.dtype) -> torch.nn.Module:
    materialize(recipe, {"base": checkpoint}, out)
    return AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval()


def written(model: torch.nn.Module) -> torch.Tensor:
    return model.generate(IDS[:1, :5], max_new_tokens=12, do_sample=False)


@torch.no_grad()
@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_same_as_the_built_folder(family: str, resident_of: InMemory, tmp_path: Path) -> None:
    resident = resident_of(family)
    recipe = some_recipe(resident)
    before = resident.model(IDS).logits
    model = assembled(recipe, resident)
    other = built_and_loaded(recipe, resident.checkpoint, tmp_path / "out", torch.float32)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # Where a tensor begins in memory decides in which order some processors add: weights are equal, sums nearly.
    torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=0, atol=2e-6)
    assert torch.equal(written(model), written(other))  # the cache has a place for every layer
    assert model.config.to_diff_dict().keys() == other.config.to_diff_dict().keys()
    ways = [getattr(each.config, "_experts_implementation", None) for each in (model, other)]
    assert ways[0] == ways[1]
    assert model.config.num_hidden_layers == 4
    assert torch.equal(resident.model(IDS).logits, before)
    assert resident.model.config.num_hidden_layers == 6


@torch.no_grad()
def test_in_another_dtype_fitted_tensors_are_rounded_as_on_disk(tmp_path: Path) -> None:
    families.save(families.make_model("llama").bfloat16(), tmp_path / "bf16")
    checkpoint = Checkpoint.open(tmp_path / "bf16", model="bf16")
    resident = LoadedModel(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    recipe = some_recipe(resident)
    other = built_and_loaded(recipe, checkpoint, tmp_path / "out", torch.float32)
    assert torch.equal(assembled(recipe, resident)(IDS).logits, other(IDS).logits)


def test_parameters_are_shared(resident_of: InMemory) -> None:
    resident = resident_of("llama")
    recipe = recipe_of("llama", (select(0), select(3)))
    ours = {id(parameter) for parameter in assembled(recipe, resident).parameters()}
    assert ours <= {id(parameter) for parameter in resident.model.parameters()}
    assert len(ours) == 2 * 9 + 3
