"""The members of a family are opened and compared with the base; every mismatch has a name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from intarsia.checkpoint.hashing import scan
from intarsia.commands.build import build
from intarsia.errors import UserError
from intarsia.recipe.recipe import LayerRef, Merge, Recipe, Select, derive_spans
from intarsia.recipe.schema import content_hash, load, save
from intarsia.tailoring.family import Family, open_family
from intarsia.tailoring.family_file import MemberSpec
from tests import families

peft = pytest.importorskip("peft")
Folder = Callable[[str], Path]


@pytest.fixture(autouse=True)
def cache_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def llama(model_folder: Folder) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on the base, and what peft merges it into, beside it."""
    out = tmp_path_factory.mktemp("lora")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    wrapped.save_pretrained(str(out / "adapter"))
    wrapped.merge_and_unload().save_pretrained(str(out / "merged"))
    for file in llama.glob("tokenizer*"):
        shutil.copy(file, out / "merged")
    return out


def variant(out: Path, **changes: Any) -> Path:
    """A random llama on disk, with its own shape."""
    families.save(families.make_model("llama", seed=7, **changes), out)
    return out


def opened(base: Path, **members: Path) -> Family:
    paths = {"base": base, **members}
    return open_family({name: MemberSpec(model=str(path)) for name, path in paths.items()})


def test_a_family_of_folder_and_adapter(llama: Path, adapter: Path, tmp_path: Path) -> None:
    family = opened(llama, full=variant(tmp_path / "full"), lora=adapter / "adapter")
    assert family.names == ("base", "full", "lora") and family.notes == ()
    name = "mlp.down_proj.weight"
    merged = AutoModelForCausalLM.from_pretrained(adapter / "merged").state_dict()
    assert torch.equal(family.checkpoints()["lora"].layer_tensor(3, name), merged[f"model.layers.3.{name}"])
    variants = family.variants()
    assert [entry.sha256 for entry in variants] == [scan(checkpoint) for checkpoint in family.checkpoints().values()]
    assert len({entry.sha256 for entry in variants}) == 3
    assert variants[2].model == str((adapter / "adapter").resolve())


def test_building_with_an_adapter_is_building_with_the_merged_model(llama: Path, adapter: Path, tmp_path: Path) -> None:
    def recipe(lora: Path) -> Recipe:
        variants = opened(llama, lora=lora).variants()
        layers = (
            Select(source=LayerRef(variant="lora", layer=0)),
            Merge(
                sources=(LayerRef(variant="lora", layer=4),),
                weights=(0.5,),
                method="task_arithmetic",
                base=LayerRef(variant="base", layer=4),
            ),
        )
        return Recipe(variants=variants, base="base", depth=6, layers=layers, spans=derive_spans(layers, 6))

    states = []
    for which in ("adapter", "merged"):
        save(recipe(adapter / which), tmp_path / f"{which}.yaml")
        built = build(tmp_path / f"{which}.yaml", tmp_path / which)
        assert built.layers == 2 and built.recipe_sha256 == content_hash(load(tmp_path / f"{which}.yaml"))
        states.append(AutoModelForCausalLM.from_pretrained(tmp_path / which).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_adapter_that_has_changed_is_noticed(llama: Path, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter / "adapter", tmp_path / "adapter"))
    layers = (Select(source=LayerRef(variant="lora", layer=0)),)
    variants = opened(llama, lora=folder).variants()
    made = Recipe(variants=variants, base="base", depth=6, layers=layers, spans=((0, 6),))
    save(made, tmp_path / "recipe.yaml")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 5}))
    with pytest.raises(UserError, match=r"weights of variant lora .* the recipe was made for"):
        build(tmp_path / "recipe.yaml", tmp_path / "out")


def test_every_mismatch_of_every_variant_at_once(llama: Path, model_folder: Folder, tmp_path: Path) -> None:
    shallow = variant(tmp_path / "shallow", num_hidden_layers=4, intermediate_size=24)
    rotary = variant(tmp_path / "rotary", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(UserError) as caught:
        opened(
            llama,
            shallow=shallow,
            rotary=rotary,
            alien=model_folder("opt"),
            biased=model_folder("llama-bias"),
            gone=tmp_path / "gone",
        )
    found = "\n".join(str(problem) for problem in caught.value.problems)
    for line in (
        f"Variant shallow ({shallow}) differs from the base {llama} in n_layers: 4, not 6.",
        "in n_channels: 24, not 40",
        "in rotary embedding: default with base 500000, not default with base 10000",
        "in architecture: OPT, not Llama",
        "in the tensors of a layer: with mlp.down_proj.bias",
        "gone",
    ):
        assert line in found, line


def test_tied_and_dtype(llama: Path, tmp_path: Path) -> None:
    tied = variant(tmp_path / "tied", tie_word_embeddings=True)
    narrow = tmp_path / "narrow"
    families.save(families.make_model("llama").to(torch.bfloat16), narrow)
    with pytest.raises(UserError) as caught:
        opened(llama, tied=tied, narrow=narrow)
    found = str(caught.value)
    assert "tied embeddings: an embedding that is also the head, not a head of its own" in found
    assert "dtype: bfloat16, not float32. Convert it once" in found


def test_larger_vocabularies_are_cut_and_smaller_refused(llama: Path, tmp_path: Path) -> None:
    larger = variant(tmp_path / "larger", vocab_size=families.VOCABULARY + 2)
    family = opened(llama, larger=larger)
    assert family.notes == ("larger: the last 2 rows of its vocabulary are not used, because the base lacks them",)
    with pytest.raises(UserError, match=f"vocabulary: 320 rows, not {families.VOCABULARY + 2} or more"):
        opened(larger, smaller=llama)


def test_another_tokenizer(llama: Path, tmp_path: Path) -> None:
    other = variant(tmp_path / "other")
    file = other / "tokenizer.json"
    data = json.loads(file.read_text())
    tokens = sorted(data["model"]["vocab"], key=data["model"]["vocab"].get)
    first, second = tokens[-1], tokens[-2]
    vocab = data["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(data))
    with pytest.raises(UserError) as caught:
        opened(llama, other=other)
    text = str(caught.value)
    assert "in its tokenizer: other rows for" in text
    assert repr(first) in text and repr(second) in text


def test_what_is_only_said(llama: Path, adapter: Path, tmp_path: Path) -> None:
    eps = variant(tmp_path / "eps", rms_norm_eps=1e-4)
    folder = Path(shutil.copytree(adapter / "adapter", tmp_path / "adapter"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "org/other"}))
    notes = opened(llama, eps=eps, lora=folder).notes
    assert notes[0] == "eps: rms_norm_eps is 0.0001; the base's 1e-06 is used"
    assert notes[1] == f"lora: the adapter names org/other as its base, and is applied to {llama}"


def test_config_files_alone(llama: Path, adapter: Path, tmp_path: Path) -> None:
    for name, folder in (("base", llama), ("math", variant(tmp_path / "full", vocab_size=322))):
        (tmp_path / "configs" / name).mkdir(parents=True)
        shutil.copy(folder / "config.json", tmp_path / "configs" / name)
    paths = {"base": tmp_path / "configs" / "base", "math": tmp_path / "configs" / "math", "lora": adapter / "adapter"}
    members = {name: MemberSpec(model=str(path)) for name, path in paths.items()}
    family = open_family(members, weights=False)
    assert family.architecture.n_layers == 6
    assert len(family.notes) == 2 and "Only config files" in family.notes[0] and "2 rows" in family.notes[1]
    assert [entry.sha256 for entry in family.variants()] == [None, None, None]
    shutil.copy(variant(tmp_path / "deep", num_hidden_layers=8) / "config.json", tmp_path / "configs" / "math")
    with pytest.raises(UserError, match="n_layers: 8, not 6"):
        open_family(members, weights=False)
    with pytest.raises(UserError, match="there is no local folder of this name"):
        open_family({**members, "gone": MemberSpec(model=str(tmp_path / "gone"))}, weights=False)
