"""The text model inside a multimodal one is read, cut and written back; everything around it stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from intarsia.building.loaded_model import LoadedModel
from intarsia.building.materialize import assembled, materialize
from intarsia.checkpoint.hashing import scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from tests.recipes_by_hand import recipe_of, select, shared
from tests.wrappers import DEPTH, IDS, WRAPPERS, edit_config, in_later_layout, make_wrapper, save

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
    with pytest.raises(UserError, match="the text model inside the multimodal one is not found"):
        opened(folder)
