"""Adapters applied on reading give what peft's merge_and_unload gives; what cannot be applied is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from intarsia.building.resident import load_model
from intarsia.checkpoint.adapter import open_variant
from intarsia.checkpoint.demo import demo_folder
from intarsia.checkpoint.hashing import scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.errors import UserError
from intarsia.progress import Silent

peft = pytest.importorskip("peft")

SHARED = Path(__file__).parents[3] / "shared" / "models"
Adapted = Callable[..., tuple[Checkpoint, dict[str, torch.Tensor]]]


def make_adapter(base: Path, out: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A random LoRA of peft's own making on a model folder, saved; returns the adapted model."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        **{
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
            "task_type": "CAUSAL_LM",
            **settings,
        }
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(str(out))
    return model


@pytest.fixture
def adapted(saved: dict[str, Path], tmp_path: Path) -> Adapted:
    """Opens a random adapter on `single`, with the tensors that peft merges it into."""

    def make(**settings: Any) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
        base, folder = saved["single"], tmp_path / "adapter"
        model = make_adapter(base, folder, **settings)
        opened = open_variant(str(folder), base=Checkpoint.open(base, model=str(base)))
        return opened, model.merge_and_unload().state_dict()

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {r"layers\.[01]\..*v_proj": 11}},
        {"layers_to_transform": [1], "lora_alpha": 1},
        {"target_modules": "all-linear"},
    ],
)
def test_equals_peft_bit_for_bit_in_float32(settings: dict[str, Any], adapted: Adapted) -> None:
    opened, expected = adapted(**settings)
    assert opened.adapter is not None and opened.adapter.updates
    for name in opened.headers:
        assert torch.equal(opened.tensor(name), expected[name]), name
    plain = replace(opened, adapter=None)
    changed = {name for name in opened.headers if not torch.equal(plain.tensor(name), expected[name])}
    assert changed == set(opened.adapter.updates)


def test_scale_by_hand(adapted: Adapted) -> None:
    """rsLoRA divides by the root of the rank, which a pattern may change for one module."""
    opened, _ = adapted(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.2.self_attn.q_proj": 8})
    assert opened.adapter is not None
    updates = opened.adapter.updates
    assert updates["model.layers.0.self_attn.v_proj.weight"].scale == 5 / math.sqrt(3)
    assert updates["model.layers.0.self_attn.q_proj.weight"].scale == 5 / math.sqrt(2)
    assert updates["model.layers.2.self_attn.q_proj.weight"].scale == 8 / math.sqrt(2)


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, delta: torch.Tensor, theirs: torch.Tensor) -> None:
    """Ours is the exact sum, rounded once; theirs is that of a rounded product."""
    assert torch.equal(found, exact.to(torch.bfloat16))
    step = 2.0**-8  # of bfloat16, relative
    assert bool(((found.float() - theirs.float()).abs() <= 2 * step * (exact.abs() + delta.abs())).all())


def test_bfloat16_is_rounded_once(saved: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved["single"], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    merged = make_adapter(tmp_path / "base", tmp_path / "adapter", dtype=torch.bfloat16).merge_and_unload().state_dict()
    base = Checkpoint.open(tmp_path / "base", model="base")
    opened = open_variant(str(tmp_path / "adapter"), base=base)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (stored[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    delta = (b @ a) * (5 / 3)
    exact = base.tensor(f"{name}.weight").float() + delta
    assert_rounded(opened.tensor(f"{name}.weight"), exact, delta, merged[f"{name}.weight"])


@pytest.mark.slow
@pytest.mark.registry
@pytest.mark.parametrize("which", ["math", "science"])
def test_the_demo_familys_adapters(which: str) -> None:
    folder = SHARED / f"smollm2-135m-{which}-lora"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    try:
        demo = demo_folder(Silent())
    except UserError as error:
        pytest.skip(str(error))
    base = Checkpoint.open(demo, model="demo")
    opened = open_variant(str(folder), base=base)
    assert opened.adapter is not None and len(opened.adapter.updates) == 210
    stored = load_file(folder / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    exact = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload().state_dict()
    narrow = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.bfloat16)
    merged = peft.PeftModel.from_pretrained(narrow, str(folder), autocast_adapter_dtype=False).merge_and_unload()
    theirs = merged.state_dict()
    for layer in (0, 13, 29):
        for module in ("self_attn.k_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}"
            a, b = (stored[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
            wide = base.tensor(f"{name}.weight").float()
            update = opened.adapter.applied(f"{name}.weight", wide)
            assert torch.equal(update, exact[f"{name}.weight"])  # float32: bit for bit
            delta = (b @ a) * 2.0
            assert_rounded(opened.tensor(f"{name}.weight"), exact[f"{name}.weight"], delta, theirs[f"{name}.weight"])


def test_in_memory_as_on_reading(adapted: Adapted) -> None:
    opened, expected = adapted()
    state = load_model(opened, device=torch.device("cpu")).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in opened.headers)


def test_hash_depends_on_base_adapter_and_scale(saved: dict[str, Path], tmp_path: Path, adapted: Adapted) -> None:
    opened, _ = adapted()
    assert opened.adapter is not None
    found = scan(opened)
    assert found == scan(opened) and found != scan(replace(opened, adapter=None))
    file = opened.adapter.folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 6}))
    base = Checkpoint.open(saved["single"], model="base")
    assert scan(open_variant(str(opened.adapter.folder), base=base)) != found


def test_an_adapter_with_nan_is_refused(saved: dict[str, Path], adapted: Adapted) -> None:
    opened, _ = adapted()
    assert opened.adapter is not None
    file = opened.adapter.folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = math.nan
    save_file(tensors, file)
    base = Checkpoint.open(saved["single"], model="base")
    with pytest.raises(UserError, match=r"up_proj.lora_B.weight: .* NaN or infinity in 1 of 120"):
        scan(open_variant(str(opened.adapter.folder), base=base))


def edited(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: expected LORA; found 'LOHA'.*merge_and_unload"),
        ({"use_dora": True}, "use_dora: .*found True.*merge_and_unload"),
        ({"bias": "all"}, "bias: expected 'none'.*found 'all'"),
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save: .*\['embed_tokens'\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: .*'pissa_niter_4'"),
        ({"r": 0, "lora_alpha": None}, "r: expected a rank of at least 1; found 0.*\n.*lora_alpha"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern\.\(: "),
        ({"r": 4}, r"lora_A of shape \[4, 32\] \(rank 4, for base\); found \[3, 32\]"),
    ],
)
def test_refused_kinds(changes: dict[str, Any], message: str, saved: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(saved["single"], tmp_path / "adapter")
    edited(tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match=message):
        open_variant(str(tmp_path / "adapter"), base=Checkpoint.open(saved["single"], model="base"))


def test_an_adapter_for_another_base(saved: dict[str, Path], tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(saved["single"])
    other.config.intermediate_size = 24
    type(other)(other.config).save_pretrained(tmp_path / "other")
    make_adapter(tmp_path / "other", tmp_path / "adapter", target_modules=["up_proj", "down_proj"])
    with pytest.raises(UserError) as caught:
        open_variant(str(tmp_path / "adapter"), base=Checkpoint.open(saved["single"], model="base"))
    text = str(caught.value)
    assert len(caught.value.problems) == 6 and "up_proj: expected lora_B of shape [40, 3]" in text
    assert "trained on this base" in text


def test_unknown_tensors_and_pickles(saved: dict[str, Path], tmp_path: Path) -> None:
    folder, base = tmp_path / "adapter", Checkpoint.open(saved["single"], model="base")
    make_adapter(saved["single"], folder, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(2)
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        open_variant(str(folder), base=base)
    assert "embed_tokens.lora_embedding_A: expected lora_A and lora_B of linear layers only" in str(caught.value)
    assert "expected both lora_A and lora_B; found only lora_B" in str(caught.value)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.safetensors; found pickled weights"):
        open_variant(str(folder), base=base)


def test_the_base_that_it_names(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    make_adapter(saved["single"], folder)
    opened = open_variant(str(folder))
    assert opened.folder == saved["single"] and opened.model == str(folder)
    edited(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"its base .*gone.*Name a base that is there"):
        open_variant(str(folder))
    edited(folder, base_model_name_or_path=None)
    with pytest.raises(UserError, match=r"base_model_name_or_path: .*found none"):
        open_variant(str(folder))


def test_alone_it_is_no_model(saved: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(saved["single"], tmp_path / "adapter")
    with pytest.raises(UserError, match=r"a PEFT adapter.*variant beside its base"):
        open_checkpoint(str(tmp_path / "adapter"))
