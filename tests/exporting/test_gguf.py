"""A GGUF file holds the checkpoint's model: read back by transformers, it gives the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.errors import UserError
from intarsia.exporting.gguf import plan_gguf, write_gguf
from tests import families

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate", reason="transformers reads GGUF with it")

IDS = torch.randint(2, families.VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))
# Without the windows that GGUF has no place for; Qwen3 with the head size that transformers takes when it reads GGUF.
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"use_sliding_window": False, "layer_types": None, "head_dim": 128, "num_hidden_layers": 3},
}
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


def exported(family: str, folder: Path, kind: str, **changes: Any) -> tuple[Any, Path]:
    model = families.make_model(family, **{**CHANGES.get(family, {}), **changes})
    source = families.save(model, folder / "model", chat=True)
    checkpoint = Checkpoint.open(source, model=str(source))
    plan = plan_gguf(checkpoint, AutoTokenizer.from_pretrained(source), kind, name="tiny")
    write_gguf(checkpoint, plan, folder / "model.gguf")
    assert sorted(entry.name for entry in folder.iterdir()) == ["model", "model.gguf"]
    return model, folder / "model.gguf"


def read_back(file: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_f32_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    model, file = exported(family, tmp_path, "F32")
    torch.testing.assert_close(read_back(file)(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_16_bits_hold_what_that_dtype_holds(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, file = exported("llama", tmp_path, kind)
    back = read_back(file, dtype)
    for (name, found), original in zip(back.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, original.to(dtype)), name


@torch.no_grad()
def test_q8_0_is_within_half_a_step(tmp_path: Path) -> None:
    model, file = exported("llama", tmp_path, "Q8_0")
    found, original = (each.get_parameter("model.layers.2.mlp.gate_proj.weight") for each in (read_back(file), model))
    steps = original.abs().amax(dim=1, keepdim=True) / 127  # a row is one block of 32; its scale is rounded, too
    assert ((found - original).abs() <= 0.57 * steps).all()
    assert not torch.equal(found, original)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_gate.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 40 do not divide into blocks
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def values(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_what_the_file_says(tmp_path: Path) -> None:
    _, file = exported("qwen2", tmp_path, "F16", tie_word_embeddings=True)
    found = values(file)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    expected = {
        "general.architecture": "qwen2",
        "general.name": "tiny",
        "general.file_type": 1,
        "qwen2.block_count": families.DEPTH,
        "qwen2.context_length": families.POSITIONS,
        "qwen2.embedding_length": families.WIDTH,
        "qwen2.feed_forward_length": families.CHANNELS,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.key_length": 8,
        "qwen2.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": families.CHAT_TEMPLATE,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(families.VOCABULARY))
    assert found["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert "output.weight" not in names
    assert {"token_embd.weight", "output_norm.weight", "blk.5.attn_q.bias"} <= names


def test_tokens_beyond_the_vocabulary_are_padded(tmp_path: Path) -> None:
    _, file = exported("llama", tmp_path, "F32", vocab_size=324)
    found = values(file)
    assert found["tokenizer.ggml.tokens"][-4:] == ["[PAD320]", "[PAD321]", "[PAD322]", "[PAD323]"]
    assert found["tokenizer.ggml.token_type"][-5:] == [1, 5, 5, 5, 5]


def test_llama_3_frequencies(tmp_path: Path) -> None:
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **numbers}
    model, file = exported("llama", tmp_path, "F32", rope_parameters=rope, head_dim=64)
    (found,) = [tensor.data for tensor in gguf.GGUFReader(file).tensors if tensor.name == "rope_freqs.weight"]
    plain = 500000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    torch.testing.assert_close(
        plain / torch.from_numpy(found), model.model.rotary_emb.inv_freq.double(), rtol=1e-5, atol=0
    )
    # transformers does not read these, but the model from the file has them.
    again = open_checkpoint(str(file))
    assert again.config["rope_parameters"] == pytest.approx(rope)
    assert all(torch.equal(again.tensor(name), value) for name, value in model.state_dict().items())


def test_windows_shorten_the_context(tmp_path: Path) -> None:
    _, file = exported("mistral", tmp_path, "F32", sliding_window=7)
    assert values(file)["llama.context_length"] == 7


def refused(family: str, folder: Path, match: str, kind: str = "F16", **changes: Any) -> None:
    model = families.make_model(family, **changes)
    source = families.save(model, folder / "model")
    checkpoint = Checkpoint.open(source, model=str(source))
    with pytest.raises(UserError, match=match):
        plan = plan_gguf(checkpoint, AutoTokenizer.from_pretrained(source), kind, name="tiny")
        write_gguf(checkpoint, plan, folder / "model.gguf")
    assert [entry.name for entry in folder.iterdir()] == ["model"]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    refused("opt", tmp_path / "1", "type opt cannot be exported to GGUF, only llama, mistral, qwen2, qwen3")
    refused("llama", tmp_path / "2", "do not support the activation gelu", hidden_act="gelu")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    refused("llama", tmp_path / "3", "rotary embedding of type dynamic", rope_parameters=rope)
    refused("llama", tmp_path / "4", "--gguf is 'Q4_K'. Choose one of F16, Q8_0, F32, BF16", kind="Q4_K")


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    model = families.make_model("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 4] = 1e5
    source = families.save(model, tmp_path / "model")
    checkpoint = Checkpoint.open(source, model=str(source))
    plan = plan_gguf(checkpoint, AutoTokenizer.from_pretrained(source), "F16", name="tiny")
    with pytest.raises(UserError, match=r"up_proj.weight has .* numbers that F16 cannot hold.*Export as BF16 or F32"):
        write_gguf(checkpoint, plan, tmp_path / "model.gguf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
