"""Folders as people have them: what is written is what was measured, and one sentence names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import intarsia
from intarsia import progress
from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint.reader import Checkpoint
from intarsia.data.corpus import limited, tokenize
from intarsia.errors import UserError
from intarsia.recipe import schema
from tests import families, wrappers
from tests.command import LITTLE, invoke
from tests.recipes_by_hand import recipe_of, select

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return families.save(families.make_model("llama"), tmp_path / "model", chat=True)


def set_json(file: Path, **changes: Any) -> None:
    values = {**(json.loads(file.read_text()) if file.exists() else {}), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def set_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def build(folder: Path, layers: tuple[int, ...] = (0, 2, 5)) -> Path:
    out = folder.with_name(f"{folder.name}-built")
    schema.save(recipe_of(str(folder), [select(layer) for layer in layers]), folder.with_name("recipe.yaml"))
    intarsia.build(folder.with_name("recipe.yaml"), out)
    checks = intarsia.verify(out).checks
    assert [(check.check, check.found) for check in checks if check.outcome == "failed"] == []
    return out


class Listener(progress.Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def tied(tmp_path: Path, kind: str, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Path, str, str]:
    """A folder whose config ties the head and whose files hold one; the names of embedding and head."""
    if kind == "wrapper":
        model, folder = wrappers.make_wrapper("gemma3"), tmp_path / "model"
        wrappers.save(model, folder)
    else:
        folder = families.save(families.make_model(kind), tmp_path / "model")
    names = list(load_file(folder / "model.safetensors"))
    embedding = next(name for name in names if name.endswith(("embed_tokens.weight", "embed_in.weight")))
    head = "lm_head.weight" if kind != "wrapper" else embedding.replace("model.embed_tokens", "lm_head")
    set_json(folder / "config.json", tie_word_embeddings=True)
    set_tensors(folder, lambda tensors: {**tensors, head: change(tensors[embedding])})
    return folder, embedding, head


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_tied_head_that_differs_counts(kind: str, tmp_path: Path) -> None:
    folder, _, head = tied(tmp_path, kind, lambda embedding: embedding.flip(0).clone())
    listener = Listener()
    with progress.reporting_to(listener):
        checkpoint = Checkpoint.open(folder, model=str(folder))
    assert listener.said == [
        f"{head} differs from the embedding, so it is used, and tie_word_embeddings is false in the output"
    ]
    assert not checkpoint.architecture.tied
    out = build(folder, tuple(range(6)))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    built = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        wanted = built(ids).logits
        for stream in (False, True):
            model = LoadedModel(checkpoint, device=torch.device("cpu"), stream=stream).model
            assert torch.equal(model.get_output_embeddings().weight, built.get_output_embeddings().weight)
        found = LoadedModel(checkpoint, device=torch.device("cpu")).model(ids).logits
    torch.testing.assert_close(found, wanted)
    failed = intarsia.verify(folder, load=False)
    assert not failed.kept and "ties the head" in next(
        check.found for check in failed.checks if check.check == "tensors"
    )


def test_a_tied_head_that_differs_is_in_the_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    folder, _, _ = tied(tmp_path, "llama", lambda embedding: embedding.flip(0).clone())
    intarsia.export(str(folder), tmp_path / "m.gguf", gguf="F32")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {"output.weight", "token_embd.weight"} <= names


def test_a_wrapper_is_untied_outside_and_inside(tmp_path: Path) -> None:
    folder, _, _ = tied(tmp_path, "wrapper", lambda embedding: embedding.flip(0).clone())
    config = json.loads((build(folder) / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["text_config"]["tie_word_embeddings"] is False


def test_a_copy_of_the_embedding_is_stored_once(tmp_path: Path) -> None:
    folder, embedding, head = tied(tmp_path, "llama", torch.clone)
    assert Checkpoint.open(folder, model=str(folder)).architecture.tied
    out = build(folder)
    names = set(load_file(out / "model.safetensors"))
    assert embedding in names and head not in names
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_everything_of_the_tokenizer_goes_along(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }} and tools")
    (folder / "additional_chat_templates" / "weights.bin").write_text("no")
    out = build(folder)
    assert [file.name for file in (out / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]
    assert set(AutoTokenizer.from_pretrained(out).chat_template) == {"default", "tool_use"}
    (out / "additional_chat_templates" / "tool_use.jinja").write_text("another")
    failed = {
        check.check: check.found for check in intarsia.verify(out, load=False).checks if check.outcome == "failed"
    }
    assert "tool_use.jinja" in failed["tokenizer"]


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}},
        {"architectures": ...},
        {"architectures": None},
        {"architectures": ["MineForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}},
        {"architectures": ["LlamaModel"]},
    ],
    ids=str,
)
def test_an_output_names_its_class_and_no_code(changes: dict[str, Any], folder: Path) -> None:
    set_json(folder / "config.json", **changes)
    out = build(folder)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in config


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_side_files_name_no_code(name: str, folder: Path) -> None:
    set_json(folder / name, auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]})
    out = build(folder)
    assert "auto_map" not in json.loads((out / name).read_text())
    set_json(out / name, auto_map={"AutoTokenizer": ["tokenization_mine.Mine", None]})
    failed = {check.check for check in intarsia.verify(out, load=False).checks if check.outcome == "failed"}
    assert "architecture" in failed


def with_more_tokens(folder: Path) -> tuple[Any, int, int]:
    """A tokenizer with a token beyond the embedding; that token's id, and the embedding's rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = Checkpoint.open(folder, model="m").architecture.vocabulary
    while tokenizer.add_tokens(f"<new{len(tokenizer)}>") and len(tokenizer) <= rows:
        pass
    return tokenizer, len(tokenizer) - 1, rows


@pytest.mark.parametrize("where", ["query", "choices"])
def test_a_token_beyond_the_embedding_in_a_task(where: str, folder: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tokenizer, last, rows = with_more_tokens(folder)
    tokenizer.save_pretrained(folder)
    questions = [{"query": "roti", "choices": ["alpa", "beta"], "gold": 0} for _ in range(2)]
    questions[1][where] = f"<new{last}>" if where == "query" else ["alpa", f"<new{last}>"]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    small = ["--calibration", text_file, "--tokens", 64, "--seq-len", 8, "--layers", 4]
    for words in (["eval", folder], ["compress", folder, "-o", tmp_path / "out", *small]):
        done = invoke(*words, "--tasks", tmp_path / "quiz.jsonl")
        assert done.exit_code == 2, done.output
        assert f"token '<new{last}>' with id {last}, but the embedding has {rows} rows" in done.stderr
        assert not (tmp_path / "out").exists()
        done = invoke("eval", folder, "--tasks", tmp_path / "quiz.jsonl", "--limit", 1)
        assert done.exit_code == 0, done.output


def test_a_token_beyond_the_embedding(folder: Path, tmp_path: Path) -> None:
    tokenizer, last, rows = with_more_tokens(folder)
    text = f"roti <new{last}> " * 99
    message = f"holds the token '<new{last}>' with id {last}, but the embedding has {rows} rows"
    with pytest.raises(UserError, match=message):
        tokenize([text], limited(tokenizer, rows), tokens=64, seq_len=8, shuffle=False, description="t.txt")
    assert len(tokenize(["roti " * 99], limited(tokenizer, rows), tokens=64, seq_len=8, shuffle=False)) == 8
    tokenizer.save_pretrained(folder)
    (tmp_path / "t.txt").write_text(text)
    words = ["--calibration", tmp_path / "t.txt", "--tokens", 64, "--seq-len", 8]
    done = invoke("compress", folder, "-o", tmp_path / "out", "--layers", 4, *words)
    assert done.exit_code == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()


REFUSED = {
    "rope_type": {"rope_parameters": {"rope_type": "fancy", "rope_theta": 1e4}},
    "rope_scaling": {"rope_parameters": ..., "rope_scaling": {"rope_type": "fancy", "factor": 2.0}},
    "activation": {"hidden_act": "fancy"},
    "padding": {"pad_token_id": "zero"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_transformers_refuses(case: str, folder: Path, text_file: Path, tmp_path: Path) -> None:
    set_json(folder / "config.json", **REFUSED[case])
    schema.save(recipe_of(str(folder), [select(0), select(5)]), tmp_path / "r.yaml")
    small = ["--calibration", text_file, "--tokens", 64, "--seq-len", 8]
    for words in (
        ["build", tmp_path / "r.yaml", "-o", tmp_path / "out"],
        ["compress", folder, "-o", tmp_path / "out", "--layers", 4, *small],
        ["compress", folder, "-o", tmp_path / "out", "--layers", 4, *small, "--stream", "--heal", "none"],
    ):
        done = invoke(*words)
        assert done.exit_code == 2, done.output
        assert "cannot load" in done.stderr and len(done.stderr.splitlines()) < 5
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_transformers_refuses(name: str, folder: Path, text_file: Path, tmp_path: Path) -> None:
    (folder / name).write_text('{"model": 3}')
    small = ["--calibration", text_file, "--tokens", 64, "--seq-len", 8, *LITTLE]
    done = invoke("compress", folder, "-o", tmp_path / "out", "--layers", 4, *small)
    assert done.exit_code == (2 if name == "tokenizer.json" else 0), done.output


@pytest.mark.parametrize("family", ["llama", "opt", "gpt-neox"])
def test_keys_of_the_base_class(family: str, tmp_path: Path) -> None:
    model = families.make_model(family)
    model.base_model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError) as caught:
        Checkpoint.open(tmp_path / "model", model="m")
    (problem,) = caught.value.problems
    assert "of a base class, without the prefix" in problem.message and "AutoModelForCausalLM" in problem.hint


def test_keys_with_a_longer_prefix(folder: Path) -> None:
    set_tensors(folder, lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(UserError, match=r"start with `module\.`") as caught:
        Checkpoint.open(folder, model="m")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("depth", [1, 4, 7, 60])
def test_a_config_of_another_depth(depth: int, folder: Path) -> None:
    set_json(folder / "config.json", num_hidden_layers=depth, layer_types=...)
    with pytest.raises(UserError) as caught:
        Checkpoint.open(folder, model="m")
    (problem,) = caught.value.problems
    assert f"num_hidden_layers is {depth} in the config, but the files hold 6 layers" in problem.message


UNKNOWN = {
    "block_configs": [{"attention": {"n_heads_in_group": 4}}] * 6,
    "ffn_multipliers": [1.0] * 6,
    "global_attn_every_n_layers": 3,
    "skip_layers": [1, 3],
    "pruned_heads": {"3": [0]},
    "attn_config": {"window_pattern": 4},
    "nested": {"deeper": {"scales": [1, 2, 3, 4, 5, 6]}},
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_unknown_per_layer_settings_are_refused(key: str, folder: Path, text_file: Path, tmp_path: Path) -> None:
    set_json(folder / "config.json", **{key: UNKNOWN[key]})
    small = ["--calibration", text_file, "--tokens", 64, "--seq-len", 8]
    done = invoke("compress", folder, "-o", tmp_path / "out", "--layers", 4, *small)
    assert done.exit_code == 2 and key in done.stderr and "remove it from the config" in done.stderr
    assert not (tmp_path / "out").exists()


def test_settings_without_effect_stay(folder: Path) -> None:
    none = {"mlp_only_layers": [], "decoder_sparse_step": 1, "num_nextn_predict_layers": 0, "attn_layer_period": None}
    set_json(folder / "config.json", **none, eos_token_id=[1, 2, 3, 4, 5, 6], pruned_heads={})
    config = json.loads((build(folder) / "config.json").read_text())
    assert none.items() <= config.items() and config["eos_token_id"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["n_layer", "num_layers"])
def test_other_names_of_the_depth(name: str, folder: Path) -> None:
    set_json(folder / "config.json", **{name: 6})
    assert json.loads((build(folder) / "config.json").read_text())[name] == 3
    set_json(folder / "config.json", **{name: 7})
    with pytest.raises(UserError, match="6 layers, like num_hidden_layers; found 7"):
        Checkpoint.open(folder, model="m")


# Layers 0, 2 and 5 stay, of six.
FOLLOWING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "numbers": ({"mlp_only_layers": [1, 2, 5]}, {"mlp_only_layers": [1, 2]}),
    "the first": ({"first_k_dense_replace": 3}, {"first_k_dense_replace": 2}),
    "a pattern": ({"hybrid_override_pattern": "MM*MM-"}, {"hybrid_override_pattern": "M*-"}),
    "a period": ({"attn_layer_period": 5, "attn_layer_offset": 0}, {"attn_layer_period": 2, "attn_layer_offset": 0}),
    "a step": ({"decoder_sparse_step": 3}, {"decoder_sparse_step": 1, "mlp_only_layers": [0]}),
}


@pytest.mark.parametrize("kind", FOLLOWING)
def test_settings_that_follow_the_layers(kind: str, folder: Path) -> None:
    given, expected = FOLLOWING[kind]
    set_json(folder / "config.json", **given)
    config = json.loads((build(folder, (0, 2, 5)) / "config.json").read_text())
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("layers", "listed", "found"),
    [
        ((0, 2, 5), False, 2),
        ((0, 1, 2, 4), True, 3),
        ((5, 0), True, ...),
        ((5, 0), False, ...),
        ((4, 5), False, 0),
    ],
)
def test_leading_layers(layers: tuple[int, ...], listed: bool, found: Any, tmp_path: Path) -> None:
    folder = families.save(families.make_model("qwen3"), tmp_path / "model", chat=True)
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 3
    set_json(folder / "config.json", max_window_layers=3, use_sliding_window=listed, sliding_window=8)
    set_json(folder / "config.json", layer_types=kinds if listed else ...)
    config = json.loads((build(folder, layers) / "config.json").read_text())
    assert config.get("max_window_layers", ...) == found
    assert config.get("layer_types") == ([kinds[layer] for layer in layers] if listed else None)


def test_unknown_settings_inside_a_wrapper(tmp_path: Path) -> None:
    wrappers.save(wrappers.make_wrapper("gemma3"), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    depth = json.loads(file.read_text())["text_config"]["num_hidden_layers"]
    set_json(file, text_config={**json.loads(file.read_text())["text_config"], "block_configs": [{}] * depth})
    with pytest.raises(UserError, match="block_configs"):
        Checkpoint.open(tmp_path / "model", model="m")


def said_at(folder: Path) -> list[str]:
    listener = Listener()
    with progress.reporting_to(listener):
        Checkpoint.open(folder, model="m")
    return listener.said


@pytest.mark.parametrize("stated", [{"dtype": "bfloat16"}, {"torch_dtype": "float16", "dtype": ...}])
def test_a_dtype_that_the_tensors_do_not_have(stated: dict[str, Any], folder: Path) -> None:
    set_json(folder / "config.json", **stated)
    (line,) = said_at(folder)
    assert line.endswith("embed_tokens.weight is stored in float32, which is used")
    failed = {check.check for check in intarsia.verify(folder, load=False).checks if check.outcome == "failed"}
    assert "dtype" in failed
    config = json.loads((build(folder) / "config.json").read_text())
    assert config["dtype"] == "float32" and "torch_dtype" not in config


def test_a_dtype_inside_a_wrapper(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    wrappers.save(wrappers.make_wrapper("gemma3"), folder)
    config = json.loads((folder / "config.json").read_text())
    depth = config["text_config"]["num_hidden_layers"]
    set_json(folder / "config.json", dtype="bfloat16", num_hidden_layers=depth)
    set_json(folder / "config.json", text_config={**config["text_config"], "dtype": "float16"})
    built = json.loads((build(folder) / "config.json").read_text())
    assert (built["dtype"], built["text_config"]["dtype"]) == ("float32", "float32")
    assert (built["num_hidden_layers"], built["text_config"]["num_hidden_layers"]) == (3, 3)


def sharded(folder: Path) -> list[Path]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    return sorted(folder.glob("*.safetensors"))


def test_a_second_weight_file(folder: Path) -> None:
    assert said_at(folder) == []
    save_file({"model.norm.weight": torch.zeros(3)}, folder / "consolidated.safetensors")
    assert said_at(folder) == [f"ignoring consolidated.safetensors in {folder}: using model.safetensors"]
    save_file({}, folder / "adapter_model.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    first, second = said_at(folder)
    assert "using the single file" in first and second.startswith("ignoring consolidated.safetensors in")
    built = build(folder)
    assert [file.name for file in built.glob("*.safetensors*")] == ["model.safetensors"]


def test_an_index_and_its_shards(folder: Path) -> None:
    first, second, *_ = sharded(folder)
    assert said_at(folder) == []
    tensors = load_file(first)
    name = next(iter(load_file(second)))
    save_file({**tensors, name: torch.zeros(3)}, first)
    (line,) = said_at(folder)
    assert f"also holds {name}" in line and "using the index" in line
    save_file(tensors, first)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    set_json(folder / "model.safetensors.index.json", metadata={**index["metadata"], "total_size": 3})
    (line,) = said_at(folder)
    assert "total_size is 3" in line and "using the files" in line
    build(folder)


def test_another_class_than_that_of_the_model_type(folder: Path) -> None:
    set_json(folder / "config.json", architectures=["MistralForCausalLM"])
    listener = Listener()
    with progress.reporting_to(listener):
        build(folder)
    assert any("['LlamaForCausalLM'] in the output, by model_type" in line for line in listener.said)
