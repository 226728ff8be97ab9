"""Quantised and multimodal checkpoints, read as the text model that they hold, or refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from intarsia.building.loaded_model import LoadedModel
from intarsia.building.materialize import assembled, materialize
from intarsia.checkpoint.hashing import scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.errors import UserError
from intarsia.options import ModelRef
from tests import families, wrappers
from tests.recipes_by_hand import recipe_of, select, shared
from tests.wrappers import DEPTH, IDS, WRAPPERS, edit_config, in_later_layout, make_wrapper, save

BLOCK = (16, 16)
METHODS: dict[str, dict[str, Any]] = {
    "block": {"quant_method": "fp8", "weight_block_size": list(BLOCK)},
    "row": {"quant_method": "fbgemm_fp8"},
    "tensor": {"quant_method": "compressed-tensors", "format": "float-quantized"},
}


def in_8_bits(weight: torch.Tensor, way: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weight in 8 bits, its scales, and what both together stand for, each entry computed by itself."""
    rows, columns = weight.shape
    size = {"block": BLOCK, "row": (1, columns), "tensor": (rows, columns)}[way]
    scale = torch.empty(-(-rows // size[0]), -(-columns // size[1]))
    stored, meant = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1])
            scale[i, j] = weight[place].abs().max() / 448
            stored[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
            meant[place] = stored[place].float() * scale[i, j]
    return stored, scale.reshape(-1) if way == "tensor" else scale, meant


def quantise(folder: Path, way: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Turn the layers of a saved model into 8 bits; what its tensors now stand for."""
    tensors, meant = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".layers." not in name or tensor.ndim != 2 or "vision" in name:
            tensors[name] = meant[name] = tensor.to(dtype)
            continue
        tensors[name], scale, value = in_8_bits(tensor, way)
        tensors[f"{name}_scale_inv" if way == "block" else f"{name}_scale"] = scale
        if way == "tensor":
            tensors[name.replace(".weight", ".input_scale")] = torch.tensor([0.5])
        meant[name] = value.to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, quantization_config=METHODS[way], dtype=str(dtype).removeprefix("torch."))
    return meant


def set_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return families.save(families.make_model("llama"), tmp_path / "model")


@torch.no_grad()
@pytest.mark.parametrize("way", METHODS)
def test_8_bits_times_scales(way: str, folder: Path, tmp_path: Path) -> None:
    meant = quantise(folder, way)
    checkpoint = open_checkpoint(f"dequantize:{folder}")
    assert checkpoint.headers.keys() == meant.keys()
    for name, value in meant.items():
        assert torch.equal(checkpoint.tensor(name), value), name
        assert checkpoint.headers[name].dtype == torch.bfloat16
        assert checkpoint.headers[name].nbytes == value.nbytes
    assert "quantization_config" not in checkpoint.config

    plain = AutoModelForCausalLM.from_config(families.make_model("llama").config, dtype=torch.bfloat16)
    plain.load_state_dict(meant)
    expected = plain.eval()(IDS).logits
    resident = LoadedModel(checkpoint, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert torch.equal(resident.model(IDS).logits, expected)
    recipe = recipe_of(str(folder), [select(layer) for layer in range(families.DEPTH)])
    materialize(recipe, {"base": checkpoint}, tmp_path / "out")
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert built.dtype == torch.bfloat16
    assert torch.equal(built(IDS).logits, expected)


def test_hash_is_that_of_the_ordinary_weights(folder: Path, tmp_path: Path) -> None:
    meant = quantise(folder, "block")
    other = families.save(families.make_model("llama"), tmp_path / "other")
    save_file(meant, other / "model.safetensors")
    assert scan(open_checkpoint(f"dequantize:{folder}")) == scan(open_checkpoint(str(other)))


def test_dequantize_changes_nothing_else(folder: Path) -> None:
    one, other = open_checkpoint(str(folder)), open_checkpoint(ModelRef(model=str(folder), dequantize=True))
    assert one.model == other.model == open_checkpoint(f"dequantize:{folder}").model == str(folder)
    assert one.headers == other.headers
    assert not other.scaled


def test_inside_a_wrapper(tmp_path: Path) -> None:
    folder = wrappers.save(wrappers.make_wrapper("llava"), tmp_path / "model")
    meant = quantise(folder, "block")
    checkpoint = open_checkpoint(f"dequantize:{folder}")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(checkpoint.tensor(name), meant[f"language_model.{name}"])
    materialize(recipe_of(str(folder), [select(1)]), {"base": checkpoint}, tmp_path / "out")
    built = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(built["language_model.model.layers.0.mlp.up_proj.weight"], meant[f"language_model.{name}"])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [name for name in built if "scale" in name]


def refused(model: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("quantization", "match"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"bitsandbytes weights.*dequantize\(\)"),
        ({"load_in_8bit": True}, "bitsandbytes weights"),
        ({"quant_method": "gptq", "bits": 4}, "gptq weights. Use the original model"),
        ({"quant_method": "awq"}, "awq weights. Use the original model"),
        ({"quant_method": "mxfp4"}, r"mxfp4 weights.*Mxfp4Config\(dequantize=True\)"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors weights. Use the original model",
        ),
    ],
)
def test_kinds_that_are_never_read(folder: Path, quantization: dict[str, Any], match: str) -> None:
    set_config(folder, quantization_config=quantization)
    refused(str(folder), f"quantization_config describes.*{match}")
    refused(f"dequantize:{folder}", match)


def test_8_bits_that_nobody_asked_to_read(folder: Path) -> None:
    quantise(folder, "block")
    refused(str(folder), "describes fp8 weights. Pass --dequantize")


def test_nested_quantisation_is_seen(tmp_path: Path) -> None:
    folder = wrappers.save(wrappers.make_wrapper("llava"), tmp_path / "model")
    wrappers.edit_config(folder, quantization_config={"quant_method": "gptq"})
    refused(str(folder), "text_config.quantization_config describes gptq")


def test_8_bits_without_a_config_that_says_so(folder: Path) -> None:
    quantise(folder, "block")
    set_config(folder, quantization_config=None)
    refused(f"dequantize:{folder}", "expected only tensors that the .* covers|stored in float8_e4m3fn")


def test_scales_that_do_not_fit(folder: Path) -> None:
    quantise(folder, "block")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    whole = tensors[f"{name}_scale_inv"]
    tensors[f"{name}_scale_inv"] = whole[:, :1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    refused(f"dequantize:{folder}", rf"{name} has a scale of unknown shape: {name}_scale_inv \[3, 1\]")
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    refused(f"dequantize:{folder}", rf"{name} has no scale")
    tensors[f"{name}_scale_inv"] = whole.clone()
    tensors[f"{name}_scale_inv"][1, 1] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} has NaN or infinity"):
        scan(Checkpoint.open(folder, model="m", dequantize=True))


def test_another_way_of_reading_is_another_hash(tmp_path: Path) -> None:
    """The files stay as they are, and so does what is remembered of them."""
    folder = families.save(families.make_model("llama"), tmp_path / "model")
    quantise(folder, "block")
    first = scan(Checkpoint.open(folder, model="m", dequantize=True))
    set_config(folder, dtype="float32")
    other = scan(Checkpoint.open(folder, model="m", dequantize=True))
    assert other != first
    set_config(folder, dtype="bfloat16", rms_norm_eps=1e-3)  # no weight is read otherwise
    assert scan(Checkpoint.open(folder, model="m", dequantize=True)) == first


CPU = torch.device("cpu")


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, model=str(folder))


@torch.no_grad()
@pytest.mark.parametrize("layout", ["stored", "later"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_cut_inside_a_wrapper(kind: str, layout: str, tmp_path: Path) -> None:
    whole = make_wrapper(kind)
    folder = save(whole, tmp_path / "model")
    if layout == "later":
        in_later_layout(folder)
    before = load_file(folder / "model.safetensors")
    checkpoint = opened(folder)
    assert checkpoint.architecture.n_layers == DEPTH
    assert checkpoint.tensor("model.embed_tokens.weight").equal(whole.get_input_embeddings().weight)
    assert checkpoint.parameters == sum(tensor.numel() for tensor in before.values())
    resident = LoadedModel(checkpoint, device=CPU)
    assert torch.equal(resident.model(IDS).logits, whole(input_ids=IDS).logits)

    # Gemma's layers 0 and 2 are of one kind.
    recipe = recipe_of(str(folder), [shared(checkpoint.architecture, (0, 2)), select(3), select(5)], depth=DEPTH)
    small = assembled(recipe, resident)
    materialize(recipe, {"base": checkpoint}, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    names = [name for name in before if ".layers." not in name or "vision" in name]
    assert len(names) > 20
    for name in names:
        assert after[name].numpy().tobytes() == before[name].numpy().tobytes()
    assert {name for name in after if name not in before} == set()
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(loaded.eval()(input_ids=IDS).logits, small(IDS).logits)
    assert loaded.config.get_text_config().num_hidden_layers == 3
    assert opened(tmp_path / "out").architecture.n_layers == 3


def test_only_what_must_change_in_the_config_changes(tmp_path: Path) -> None:
    folder = save(make_wrapper("gemma3"), tmp_path / "model")
    edit_config(folder, unheard_of=[1, 2])
    recipe = recipe_of(str(folder), [select(layer) for layer in (0, 2, 3)], depth=DEPTH)
    materialize(recipe, {"base": opened(folder)}, tmp_path / "out")
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "out"))
    assert after["text_config"]["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
    assert after["text_config"]["unheard_of"] == [1, 2]
    # From the pattern transformers would make other types for the new depth.
    del before["text_config"]["_sliding_window_pattern"]
    for config in (before, after):
        for field in ("num_hidden_layers", "layer_types"):
            del config["text_config"][field]
    assert after == before


def test_nested_config_that_leaves_much_to_defaults(tmp_path: Path) -> None:
    """Published wrappers name only what differs from the class's defaults."""
    folder = save(make_wrapper("llava"), tmp_path / "model")
    architecture = opened(folder).architecture
    edit_config(folder, num_key_value_heads=None, tie_word_embeddings=None, hidden_act=None, rms_norm_eps=None)
    with pytest.raises(UserError, match=r"k_proj.weight: expected shape \[32, 32\]"):
        opened(folder)  # Llama's default: as many key/value heads as query heads
    edit_config(folder, num_key_value_heads=2)
    again = opened(folder)
    assert again.architecture.n_kv_heads == architecture.n_kv_heads == 2
    assert not again.architecture.tied
    materialize(recipe_of(str(folder), [select(0)], depth=DEPTH), {"base": again}, tmp_path / "out")
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["num_hidden_layers"] == 1
    assert "hidden_act" not in text


def test_hash_covers_what_surrounds_the_text_model(tmp_path: Path) -> None:
    one, other = (save(make_wrapper("llava"), tmp_path / name) for name in ("one", "other"))
    assert scan(opened(one)) == scan(opened(other))
    tensors = load_file(other / "model.safetensors")
    tensors["multi_modal_projector.linear_1.bias"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert scan(opened(one)) != scan(opened(other))
    tensors["multi_modal_projector.linear_1.bias"][0] = float("nan")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"multi_modal_projector.linear_1.bias has NaN"):
        scan(opened(other))


def test_layouts_and_text_models_that_are_not_known(tmp_path: Path) -> None:
    folder = save(make_wrapper("llava"), tmp_path / "model")
    edit_config(folder, model_type="gpt_of_the_future")
    with pytest.raises(UserError, match=r"text_config.model_type is .*, which transformers does not know"):
        opened(folder)
    edit_config(folder, model_type="bert")
    with pytest.raises(UserError, match="expected"):  # tensors of bert
        opened(folder)
    edit_config(folder, model_type="llama")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("language_model.model.", "thoughts."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    with pytest.raises(UserError, match="no text model found in the multimodal one"):
        opened(folder)
