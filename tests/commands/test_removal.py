"""Models without a family file: their layers are removed, from the command line to a folder that runs."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.decoders import KNOWN, REFUSED, REMOVAL, Decoder, config_of, decoder, kinds, page
from intarsia.building.materialize import materialize
from intarsia.building.tiny_model import small_model
from intarsia.checkpoint.reader import Checkpoint, architecture_of
from intarsia.errors import UserError
from intarsia.inspection.small import small_config
from intarsia.inspection.structure import inspected, problem_of
from intarsia.recipe.recipe import Variant, identity
from tests import families
from tests.command import LITTLE, invoke

SHAPES = ("qwen3_5_text", "gemma4_text", "glm4_moe", "lfm2")
QUICK = (*SHAPES, "nemotron_h")
TABLE = Path(__file__).parents[2] / "docs" / "FAMILIES.md"


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the folder of a small random model of a type, with its class's own config made small."""

    @cache
    def made(kind: str) -> Path:
        large = architecture_of(config_of(kind).to_dict(), where=kind)
        config = {**small_config(large), "vocab_size": families.VOCABULARY, "eos_token_id": 0, "pad_token_id": None}
        config |= {"vocab_size_per_layer_input": families.VOCABULARY} if "vocab_size_per_layer_input" in config else {}
        model = small_model(config, seed=1)
        return families.save(model, tmp_path_factory.mktemp("removal") / kind)

    return made


def listed() -> dict[str, Decoder]:
    """The rows of the table in the documentation, by model type."""
    rows = re.findall(r"^\| ([\w-]+) \| (\w*) \| (.*) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return {kind: Decoder(kind=kind, tier=tier, note=note) for kind, tier, note in rows if kind != "model type"}


@pytest.mark.parametrize(
    "kind", [*QUICK, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in kinds() if each not in QUICK)]
)
def test_a_row_of_the_table(kind: str) -> None:
    found, told = decoder(kind), listed()[kind]
    assert found.tier == told.tier, found.note
    assert page([found]).splitlines()[-1] == f"| {told.kind} | {told.tier} | {told.note} |"


def test_the_table_has_every_decoder() -> None:
    rows = listed()
    assert list(rows) == kinds() and {each.tier for each in rows.values()} == {KNOWN, REMOVAL, REFUSED, ""}


@pytest.mark.parametrize(
    "kind", ["gemma4_text", "lfm2", *(pytest.param(each, marks=pytest.mark.exhaustive) for each in SHAPES[::2])]
)
def test_compress(kind: str, folder_of: Any, text_file: Path, tmp_path: Path) -> None:
    folder, out = folder_of(kind), tmp_path / "out"
    depth = Checkpoint.open(folder, model="m").architecture.n_layers
    small = ["--calibration", text_file, "--tokens", 1024, "--seq-len", 64, "--eval-windows", 2, *LITTLE]
    done = invoke("compress", folder, "-o", out, "--layers", depth - 2, *small)
    assert done.exit_code == 0, done.output
    verified = invoke("verify", out, "--json")
    assert verified.exit_code == 0, verified.output
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert model.config.num_hidden_layers == depth - 2
    prompt = torch.arange(3, 20)[None]
    wanted = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, plain = (model.generate(prompt, use_cache=use, **wanted) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    "method",
    [
        "taylor",
        "shortgpt --stream",
        *(
            pytest.param(each, marks=pytest.mark.exhaustive)
            for each in ("shortgpt", "angular", "sleb", "reverse", "magnitude")
        ),
    ],
)
def test_methods(method: str, folder_of: Any, text_file: Path, tmp_path: Path) -> None:
    name, *more = method.split()
    small = ["--calibration", text_file, "--tokens", 512, "--seq-len", 64, *LITTLE, "--heal", "none"]
    done = invoke("compress", folder_of("lfm2"), "-o", tmp_path / "out", "--layers", 4, "--method", name, *small, *more)
    assert done.exit_code == 0, done.output
    assert Checkpoint.open(tmp_path / "out", model="m").architecture.n_layers == 4


@pytest.mark.parametrize("method", ["come", "come-p", "laco", "mka"])
def test_methods_that_join_layers_are_refused(method: str, folder_of: Any, tmp_path: Path) -> None:
    done = invoke("compress", folder_of("lfm2"), "-o", tmp_path / "out", "--layers", 4, "--method", method)
    assert done.exit_code == 2 and "can only be removed" in done.stderr and "shortgpt" in done.stderr


def built(folder: Path, kept: list[int], out: Path) -> Path:
    checkpoint = Checkpoint.open(folder, model=str(folder))
    whole = identity(Variant(name="base", model=str(folder)), checkpoint.architecture.n_layers)
    materialize(whole.with_layers([whole.layers[layer] for layer in kept]), {"base": checkpoint}, out)
    return out


def test_layers_that_predict_further_tokens_are_numbered_anew(folder_of: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of("glm4_moe"), tmp_path / "model")
    depth = Checkpoint.open(folder, model="m").architecture.n_layers
    tensors = load_file(folder / "model.safetensors")
    further = torch.rand(3, 4)
    save_file({**tensors, f"model.layers.{depth}.eh_proj.weight": further}, folder / "model.safetensors")
    out = built(folder, [0, *range(2, depth)], tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert torch.equal(found[f"model.layers.{depth - 1}.eh_proj.weight"], further)
    assert torch.equal(found["model.layers.1.input_layernorm.weight"], tensors["model.layers.2.input_layernorm.weight"])
    assert json.loads((out / "config.json").read_text())["first_k_dense_replace"] == 1


def test_a_table_with_a_part_for_each_layer(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("gemma4_text")
    architecture = Checkpoint.open(folder, model="m").architecture
    assert architecture.inspected is not None
    name = "model.embed_tokens_per_layer.weight"
    assert architecture.inspected.tables == {name: 1, "model.per_layer_model_projection.weight": 0}
    kept = [layer for layer in range(architecture.n_layers) if layer != 1]
    found, whole = (
        load_file(each / "model.safetensors")[name] for each in (built(folder, kept, tmp_path / "out"), folder)
    )
    parts = whole.chunk(architecture.n_layers, dim=1)
    assert torch.equal(found, torch.cat([parts[layer] for layer in kept], dim=1))


def test_the_text_model_of_a_multimodal_one(folder_of: Any, text_file: Path, tmp_path: Path) -> None:
    text = json.loads((folder_of("qwen3_5_text") / "config.json").read_text())
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    ids = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    parts = {"text_config": text, "vision_config": {**vision, "num_position_embeddings": 16}}
    config = CONFIG_MAPPING["qwen3_5"].from_dict({**parts, **ids})
    model = AutoModelForImageTextToText.from_config(config)
    families.randomise(model, 0)
    families.save(model, tmp_path / "model")
    small = ["--calibration", text_file, "--tokens", 512, "--seq-len", 64, *LITTLE, "--heal", "none"]
    done = invoke("compress", tmp_path / "model", "-o", tmp_path / "out", "--layers", 6, "--method", "shortgpt", *small)
    assert done.exit_code == 0, done.output
    verified = invoke("verify", tmp_path / "out")
    assert verified.exit_code == 0, verified.output
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("model", "out"))
    seen = [name for name in before if "visual" in name]
    assert seen and all(torch.equal(before[name], after[name]) for name in seen)
    assert len(json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["layer_types"]) == 6


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no such type": ({"model_type": "llama9", "transformers_version": "6.0"}, "no model type 'llama9'.*written by 6.0"),
    "code of its own": ({"model_type": "mine", "auto_map": {}}, "code of its own that is not run"),
    "an encoder-decoder": (CONFIG_MAPPING["bart"]().to_dict(), "an encoder-decoder"),
    "no language model": (CONFIG_MAPPING["vit"]().to_dict(), "no causal language model"),
    "a refused config": ({"model_type": "lfm2", "hidden_size": "wide"}, "transformers refuses this config"),
    "shared keys and values": (CONFIG_MAPPING["gemma3n_text"]().to_dict(), "keys and values of other layers"),
    "several lists of layers": (CONFIG_MAPPING["xlm"]().to_dict(), "one list of 12 layers"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be(what: str) -> None:
    config, message = REFUSALS[what]
    with pytest.raises(UserError, match=message):
        inspected(config, None, where="config.json", reason="-")


def test_what_a_config_cannot_describe() -> None:
    jamba = architecture_of(CONFIG_MAPPING["jamba"]().to_dict(), where="jamba")
    assert problem_of(jamba, range(1, 32)) is None  # the period starts elsewhere
    assert "attn_layer_period" in str(problem_of(jamba, [*range(5), *range(6, 32)]))
    gemma = architecture_of(CONFIG_MAPPING["gemma4_text"]().to_dict(), where="gemma4")
    assert problem_of(gemma, range(29)) is not None  # the last layer attends fully in any case
    assert problem_of(gemma, range(1, 30)) is None


def test_tensors_of_another_model(folder_of: Any, tmp_path: Path) -> None:
    config = json.loads((folder_of("lfm2") / "config.json").read_text())
    shapes = {name: header.shape for name, header in Checkpoint.open(folder_of("lfm2"), model="m").headers.items()}
    wrong = {name: shape for name, shape in shapes.items() if name != "model.layers.1.feed_forward.w2.weight"}
    with pytest.raises(UserError, match=r"layers\.1\.feed_forward\.w2\.weight: expected shape .* found no such tensor"):
        inspected(config, wrong, where="m", reason="-")
    with pytest.raises(UserError, match="only tensors of the model's class"):
        inspected(config, {**shapes, "model.layers.1.more.weight": (2,)}, where="m", reason="-")


def test_inspect(folder_of: Any) -> None:
    done = invoke("inspect", folder_of("qwen3_5_text"), "--json")
    facts = json.loads(done.stdout)
    assert facts["tier"].startswith("removal") and facts["kinds"] == "linear_attention: 6, full_attention: 2"
    assert len(facts) <= 12
