"""An adapter gives the weights by hand, W + scale * B A, for every kind of LoRA; what cannot be merged is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from intarsia.checkpoint import adapter as module
from intarsia.checkpoint.adapter import open_variant
from intarsia.checkpoint.gguf_source import demo_folder
from intarsia.checkpoint.hashing import scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.errors import UserError

peft = pytest.importorskip("peft")

SHARED = Path(__file__).parents[3] / "shared" / "models"
IDS = torch.arange(12)[None]


def make_adapter(base: Path, out: Path, *, dtype: torch.dtype = torch.float32, rows: int = 0, **settings: Any) -> Any:
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
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if rows:
        plain.resize_token_embeddings(rows)
    model = peft.get_peft_model(plain, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
                parameter.add_(torch.randn(parameter.shape) / 3)
    model.save_pretrained(str(out))
    return model.eval()


def opened(folder: Path, base: Path) -> Checkpoint:
    return open_variant(str(folder), base=Checkpoint.open(base, model="base"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {r"layers\.[01]\..*v_proj": 11}},
        {"layers_to_transform": [1], "lora_alpha": 1},
        {"target_modules": "all-linear"},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"target_modules": ["embed_tokens"], "use_dora": True},
        {"trainable_token_indices": [1, 7, 30]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens", "lm_head"], "rows": 51},
        {"bias": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["single", "tied"])
def test_the_merged_model_is_the_adapted_one(
    kind: str, settings: dict[str, Any], saved: dict[str, Path], tmp_path: Path
) -> None:
    """In every kind of LoRA, and where the head is tied to an embedding that the adapter changes."""
    model = make_adapter(saved[kind], tmp_path / "adapter", **settings)
    found = opened(tmp_path / "adapter", saved[kind])
    merged = AutoModelForCausalLM.from_pretrained(found.folder).eval()
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    base, adapter = load_file(saved[kind] / "model.safetensors"), found.adapter
    assert adapter is not None and adapter.base.folder == saved[kind]
    same = {name for name, tensor in base.items() if torch.equal(found.tensor(name), tensor)}
    assert adapter.changed == set(found.headers) - same


def by_hand(folder: Path, base: Checkpoint, name: str, scale: float) -> torch.Tensor:
    stored = load_file(folder / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    return base.tensor(f"{name}.weight").float() + scale * (b @ a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, {"model.layers.1.mlp.down_proj": 5 / 3}),
        (
            {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.2.self_attn.q_proj": 8}},
            {
                "model.layers.0.self_attn.v_proj": 5 / math.sqrt(3),
                "model.layers.0.self_attn.q_proj": 5 / math.sqrt(2),
                "model.layers.2.self_attn.q_proj": 8 / math.sqrt(2),
            },
        ),
    ],
)
def test_by_hand_and_rounded_once(
    dtype: torch.dtype, settings: dict[str, Any], scales: dict[str, float], saved: dict[str, Path], tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(saved["single"], dtype=dtype).save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "adapter", dtype=dtype, **settings)
    found, base = opened(tmp_path / "adapter", tmp_path / "base"), Checkpoint.open(tmp_path / "base", model="base")
    for name, scale in scales.items():
        exact = by_hand(tmp_path / "adapter", base, name, scale)
        assert found.tensor(f"{name}.weight").dtype == dtype
        # the last bit of float32 may differ where the scale is multiplied in another order
        if dtype == torch.float32:
            torch.testing.assert_close(found.tensor(f"{name}.weight"), exact, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(found.tensor(f"{name}.weight"), exact.to(dtype))


@pytest.mark.exhaustive
@pytest.mark.registry
@pytest.mark.parametrize("which", ["math", "science"])
def test_the_demo_familys_adapters(which: str) -> None:
    folder = SHARED / f"smollm2-135m-{which}-lora"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    try:
        demo = demo_folder()
    except UserError as error:
        pytest.skip(str(error))
    base = Checkpoint.open(demo, model="demo")
    found = opened(folder, demo)
    assert found.adapter is not None and len(found.adapter.changed) == 210
    for layer in (0, 13, 29):
        for name in (f"model.layers.{layer}.self_attn.k_proj", f"model.layers.{layer}.mlp.down_proj"):
            assert torch.equal(found.tensor(f"{name}.weight"), by_hand(folder, base, name, 2.0).to(torch.bfloat16))


def test_it_is_merged_once(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(saved["single"], tmp_path / "adapter")
    first = opened(tmp_path / "adapter", saved["single"])
    monkeypatch.setattr(module, "_write", None)
    again = open_variant(str(tmp_path / "adapter"), base=first)
    assert again.folder == first.folder and again.model == str(tmp_path / "adapter")
    assert again.adapter is not None and first.adapter is not None and again.adapter.changed == first.adapter.changed
    with pytest.raises(TypeError):  # another base, another merge
        opened(tmp_path / "adapter", saved["sharded"])


def test_hash_depends_on_base_adapter_and_scale(saved: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(saved["single"], tmp_path / "adapter")
    found = opened(tmp_path / "adapter", saved["single"])
    assert found.adapter is not None
    digest = scan(found)
    assert digest == scan(opened(tmp_path / "adapter", saved["sharded"])), "the base's weights count, not its files"
    assert digest != scan(found.adapter.base)
    edited(tmp_path / "adapter", base_model_name_or_path="elsewhere")
    assert scan(opened(tmp_path / "adapter", saved["single"])) == digest
    edited(tmp_path / "adapter", lora_alpha=6)
    assert scan(opened(tmp_path / "adapter", saved["single"])) != digest


def test_an_adapter_with_nan_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(saved["single"], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = math.nan
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"up_proj.lora_B.weight has NaN or infinity in 1 of 120"):
        opened(tmp_path / "adapter", saved["single"])


def edited(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; it must be LORA.*merge_and_unload"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is .*merge_and_unload"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"r": 0}, "r.* positive"),
        ({"r": 4}, "size mismatch"),
    ],
)
def test_refused_kinds(changes: dict[str, Any], message: str, saved: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(saved["single"], tmp_path / "adapter")
    edited(tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "adapter", saved["single"])


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"], "save_embedding_layers": False},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
    ],
)
def test_a_larger_vocabulary(settings: dict[str, Any], saved: dict[str, Path], tmp_path: Path) -> None:
    settings = dict(settings)
    save_layers = settings.pop("save_embedding_layers", None)
    model = make_adapter(saved["single"], tmp_path / "adapter", rows=51, **settings)
    if save_layers is False or "modules_to_save" not in settings:
        shutil.rmtree(tmp_path / "adapter")
        model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    with pytest.raises(UserError, match=r"vocabulary has 51 rows, the base's 48.*modules_to_save"):
        opened(tmp_path / "adapter", saved["single"])


def test_an_adapter_for_another_base(saved: dict[str, Path], tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(saved["single"])
    other.config.intermediate_size = 24
    type(other)(other.config).save_pretrained(tmp_path / "other")
    make_adapter(tmp_path / "other", tmp_path / "adapter", target_modules=["up_proj", "down_proj"])
    with pytest.raises(UserError, match=r"size mismatch.*trained on this base"):
        opened(tmp_path / "adapter", saved["single"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
            "lacks .*lora_A",
        ),
        (
            lambda tensors: tensors.update(
                {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(3, 32)}
            ),
            "has no module for .*layers.9",
        ),
    ],
)
def test_tensors_that_lack_or_belong_to_nothing(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    make_adapter(saved["single"], tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "adapter", saved["single"])


def test_pickled_weights_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(saved["single"], tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"no adapter_model.safetensors, only pickled weights"):
        opened(tmp_path / "adapter", saved["single"])


def test_the_base_that_it_names(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    make_adapter(saved["single"], folder)
    found = open_variant(str(folder))
    assert found.adapter is not None and found.adapter.base.folder == saved["single"] and found.model == str(folder)
    edited(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"gone. as its base, .*Give an existing base"):
        open_variant(str(folder))
    edited(folder, base_model_name_or_path=None)
    with pytest.raises(UserError, match=r"has no base_model_name_or_path"):
        open_variant(str(folder))


def test_alone_it_is_no_model(saved: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(saved["single"], tmp_path / "adapter")
    with pytest.raises(UserError, match=r"a PEFT adapter.*variant beside its base"):
        open_checkpoint(str(tmp_path / "adapter"))


@pytest.mark.parametrize("settings", [{"trainable_token_indices": 1e40}, {"megatron_config": -1}, {"r": "many"}])
def test_values_that_peft_does_not_take(settings: dict[str, Any], saved: dict[str, Path], tmp_path: Path) -> None:
    make_adapter(saved["single"], tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(UserError, match="peft cannot apply the adapter to the base"):
        opened(tmp_path, saved["single"])
