"""Every family's config as transformers writes it, old configs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import OPTConfig, PretrainedConfig, Qwen2Config

from intarsia.architecture.detect import detect
from intarsia.architecture.families import known_families
from intarsia.errors import UserError

Configs = dict[str, PretrainedConfig]

HEAD_DIMS = {"llama": 8, "mistral": 4, "qwen2": 8, "qwen3": 16, "opt": 8}


def llama(**changes: Any) -> dict[str, Any]:
    """An old Llama config with nothing optional in it; a change to `...` removes the field."""
    config = {
        "model_type": "llama",
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "vocab_size": 50,
        "intermediate_size": 20,
        **changes,
    }
    return {key: value for key, value in config.items() if value is not ...}


def refused(config: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        detect(config)
    return caught.value


@pytest.mark.parametrize("name", HEAD_DIMS)
def test_numbers_of_every_family(name: str, configs: Configs) -> None:
    architecture = detect(configs[name].to_dict())
    assert architecture.family.name == name
    assert (architecture.n_layers, architecture.width, architecture.n_query_heads) == (3, 48, 6)
    assert architecture.n_kv_heads == (6 if name == "opt" else 2)
    assert architecture.heads_per_group == (1 if name == "opt" else 3)
    assert (architecture.n_channels, architecture.vocabulary) == (20, 50)
    assert architecture.head_dim == HEAD_DIMS[name]
    assert architecture.tied is (name == "opt")
    assert architecture.n_pieces("attention") == architecture.n_kv_heads
    assert architecture.n_pieces("mlp") == 20


@pytest.mark.parametrize("name", HEAD_DIMS)
def test_saved_config_means_the_same(name: str, tmp_path: Path, configs: Configs) -> None:
    configs[name].save_pretrained(tmp_path)
    saved = detect(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
    whole = detect(configs[name].to_dict())
    assert saved.layer_shapes() == whole.layer_shapes()
    assert (saved.tied, saved.layer_types, saved.head_dim) == (whole.tied, whole.layer_types, whole.head_dim)


def test_head_dim_of_mistral_is_not_width_by_heads(configs: Configs) -> None:
    shapes = detect(configs["mistral"].to_dict()).layer_shapes()
    assert shapes["self_attn.q_proj.weight"] == (24, 48)
    assert shapes["self_attn.k_proj.weight"] == (8, 48)
    assert shapes["self_attn.o_proj.weight"] == (48, 24)


def test_qwen2_has_biases_on_q_k_v_alone(configs: Configs) -> None:
    shapes = detect(configs["qwen2"].to_dict()).layer_shapes()
    assert {name for name in shapes if name.endswith(".bias")} == {
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
    }
    assert shapes["self_attn.k_proj.bias"] == (16,)


def test_qwen3_has_norms_inside_attention(configs: Configs) -> None:
    architecture = detect(configs["qwen3"].to_dict())
    inside = [norm.module for norm in architecture.norms if norm.place == "inside"]
    assert inside == ["self_attn.q_norm", "self_attn.k_norm"]
    assert architecture.layer_shapes()["self_attn.q_norm.weight"] == (16,)
    assert architecture.family.approximations
    assert architecture.norm_before("attention").module == "input_layernorm"


def test_opt_has_biases_everywhere_and_no_gate(configs: Configs) -> None:
    architecture = detect(configs["opt"].to_dict())
    linears = {linear.module for linear in architecture.linears}
    assert linears == {*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "fc1", "fc2"}
    assert all(linear.bias for linear in architecture.linears)
    assert all(norm.weight and norm.bias for norm in architecture.norms)
    assert architecture.writer("mlp").module == "fc2"
    assert architecture.tensor_name(2, "fc2.bias") == "model.decoder.layers.2.fc2.bias"


def test_opt_without_affine_norms_has_no_norm_tensors(common: dict[str, Any]) -> None:
    config = OPTConfig(**common, ffn_dim=20, enable_bias=False, layer_norm_elementwise_affine=False)
    assert sorted(detect(config.to_dict()).layer_shapes()) == sorted(
        [*(f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "out")), "fc1.weight", "fc2.weight"]
    )


def test_llama_biases_follow_their_flags() -> None:
    shapes = detect(llama(attention_bias=True, mlp_bias=False)).layer_shapes()
    assert "self_attn.o_proj.bias" in shapes
    assert "mlp.down_proj.bias" not in shapes
    assert "mlp.down_proj.bias" in detect(llama(mlp_bias=True)).layer_shapes()


def test_old_llama_config() -> None:
    architecture = detect(llama())
    assert (architecture.n_kv_heads, architecture.head_dim, architecture.tied, architecture.layer_types) == (
        6,
        8,
        False,
        None,
    )
    assert not any(name.endswith("bias") for name in architecture.layer_shapes())


def test_null_is_computed_and_missing_is_a_default() -> None:
    config = {**llama(), "model_type": "mistral", "num_attention_heads": 16}
    assert detect(config).n_kv_heads == 8
    assert detect({**config, "num_key_value_heads": None}).n_kv_heads == 16
    assert detect({**config, "head_dim": None}).head_dim == 3
    assert detect({**llama(), "model_type": "qwen3"}).head_dim == 128


def test_layer_types_are_kept(common: dict[str, Any]) -> None:
    config = Qwen2Config(**common, num_key_value_heads=2, use_sliding_window=True, max_window_layers=1).to_dict()
    assert detect(config).layer_types == ("full_attention", "sliding_attention", "sliding_attention")


def test_unknown_family_lists_the_known_ones() -> None:
    error = refused({"model_type": "unheard-of"})
    for family in known_families().values():
        for model_type in family.model_types:
            assert model_type in str(error)
    assert "'unheard-of'" in str(error)
    assert "None" in str(refused({}))
    assert "['llama']" in str(refused({"model_type": ["llama"]}))


def test_all_missing_numbers_at_once() -> None:
    error = refused(llama(hidden_size=..., vocab_size=..., num_attention_heads=...))
    assert {problem.message.partition(": expected ")[0] for problem in error.problems} >= {
        "config.json: hidden_size",
        "config.json: vocab_size",
        "config.json: num_attention_heads",
    }


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "6", [6], float("nan")])
def test_impossible_number(value: Any) -> None:
    assert "num_attention_heads" in str(refused(llama(num_attention_heads=value)))


def test_heads_that_do_not_group() -> None:
    assert "a multiple of the 4 key/value heads" in str(refused(llama(num_key_value_heads=4)))


@pytest.mark.parametrize("value", [["full_attention"], 3, "abc", [1, 2, 3]])
def test_layer_types_of_another_length_or_kind(value: Any) -> None:
    assert "layer_types" in str(refused(llama(layer_types=value)))


def test_refusals_name_the_feature(configs: Configs) -> None:
    opt = configs["opt"].to_dict()
    assert "OPT-350m" in str(refused({**opt, "do_layer_norm_before": False}))
    for family in ("qwen2", "qwen3"):
        config = {**configs[family].to_dict(), "use_sliding_window": True}
        del config["layer_types"]
        assert "max_window_layers" in str(refused(config))


# Families that are built otherwise than Llama


def small(model_type: str, **changes: Any) -> dict[str, Any]:
    """A config with nothing optional in it, six layers deep."""
    return {**llama(num_hidden_layers=6, num_key_value_heads=2), "model_type": model_type, **changes}


def test_norms_behind_and_before() -> None:
    gemma, olmo = detect(small("gemma2", head_dim=8)), detect(small("olmo2"))
    places = {norm.module: (norm.part, norm.place, norm.offset) for norm in gemma.norms}
    assert places == {
        "input_layernorm": ("attention", "before", 1.0),
        "post_attention_layernorm": ("attention", "after", 1.0),
        "pre_feedforward_layernorm": ("mlp", "before", 1.0),
        "post_feedforward_layernorm": ("mlp", "after", 1.0),
    }
    behind = gemma.norm_after("attention")
    assert behind is not None and behind.module == "post_attention_layernorm"
    assert olmo.norm_before("attention") is None and olmo.norm_before("mlp") is None
    assert all(word in " ".join(olmo.approximations) for word in ("norms after", "QK-norms act on all heads"))


def test_qk_norm_over_all_heads_has_an_entry_a_row() -> None:
    shapes = detect(small("olmo2")).layer_shapes()
    assert shapes["self_attn.q_norm.weight"] == (48,) and shapes["self_attn.k_norm.weight"] == (16,)
    assert detect(small("gemma3_text", head_dim=12)).layer_shapes()["self_attn.k_norm.weight"] == (12,)


def test_fused_projections() -> None:
    architecture = detect(small("phi3"))
    assert architecture.layer_shapes()["self_attn.qkv_proj.weight"] == (48 + 16 + 16, 48)
    assert architecture.layer_shapes()["mlp.gate_up_proj.weight"] == (40, 48)


FULL, SLIDING, ROPE = "full_attention", "sliding_attention", "rotary embedding"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (small("gemma2"), [SLIDING, FULL] * 3),
        (small("gemma3_text"), [SLIDING] * 5 + [FULL]),
        (small("gemma3_text", sliding_window_pattern=2), [SLIDING, FULL] * 3),
        (small("gemma3_text", sliding_window_pattern=2, layer_types=[FULL] * 6), [FULL] * 6),
        (small("olmo3"), [SLIDING] * 3 + [FULL] + [SLIDING] * 2),
        (small("smollm3"), [ROPE] * 3 + [f"no {ROPE}"] + [ROPE] * 2),
        (small("smollm3", no_rope_layer_interval=3), [ROPE, ROPE, f"no {ROPE}"] * 2),
        (
            small("smollm3", no_rope_layers=[0, 1, 1, 1, 1, 0], layer_types=[SLIDING, FULL] * 3),
            [
                f"{SLIDING}, no {ROPE}",
                *(f"{kind}, {ROPE}" for kind in (FULL, SLIDING, FULL, SLIDING)),
                f"{FULL}, no {ROPE}",
            ],
        ),
    ],
)
def test_how_layers_attend_where_a_config_states_a_rule(config: dict[str, Any], expected: list[str]) -> None:
    """As transformers makes the list; its own is compared with in tests/building/test_layer.py."""
    assert detect(config).layer_types == tuple(expected)


def test_a_rule_that_is_no_number() -> None:
    for value in (0, -2, "LLLG", True):
        error = str(refused(small("gemma3_text", sliding_window_pattern=value)))
        assert "sliding_window_pattern" in error and "there is no layer_types" in error
    assert "no_rope_layers" in str(refused(small("smollm3", no_rope_layers=[1, 1])))


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        (small("gemma2", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (small("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention"),
        (small("smollm3", use_sliding_window=True), "no_rope_layers alone"),
        (small("stablelm", use_parallel_residual=True), "use_parallel_residual"),
        (small("stablelm", qk_layernorm=True), "qk_layernorm"),
        (small("exaone4", sliding_window_pattern="LLLG"), "not written out"),
        (small("cwm"), "not written out"),
    ],
)
def test_features_that_are_not_covered(config: dict[str, Any], feature: str) -> None:
    assert feature in str(refused(config))


def test_what_a_part_adds_is_multiplied_where_the_config_says_so() -> None:
    assert detect(small("granite", residual_multiplier=0.22)).residual_scale == 0.22
    assert detect(small("granite")).residual_scale == detect(llama()).residual_scale == 1.0


def test_norm_biases_fold_into_biases_where_there_are_some() -> None:
    stablelm = detect(small("stablelm", use_qkv_bias=True))
    assert stablelm.shift_folds("attention") and not stablelm.shift_folds("mlp")
    assert not detect(small("stablelm")).shift_folds("attention")
    assert stablelm.approximations == ()
