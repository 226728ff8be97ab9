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
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.decoders import KNOWN, REFUSED, REMOVAL, Decoder, config_of, decoder, kinds, page
from intarsia.activations.architecture_checks import state_of
from intarsia.activations.stream import LayerStream
from intarsia.architecture.per_layer import for_layers
from intarsia.architecture.spec import PARTS
from intarsia.building.loaded_model import LoadedModel
from intarsia.building.materialize import materialize
from intarsia.checkpoint.reader import Checkpoint, architecture_of
from intarsia.errors import UserError
from intarsia.inspection.small import small_config, small_model
from intarsia.inspection.structure import Possible, inspected, problem_of, removals
from intarsia.recipe import schema
from intarsia.recipe.recipe import Concat, Cut, LayerRef, Merge, Variant, identity
from tests import families
from tests.command import LITTLE, invoke

SHAPES = ("qwen3_5_text", "gemma4_text", "glm4_moe", "lfm2")
QUICK = (*SHAPES, "nemotron_h")
SHARING = {
    "gemma4_text": {"num_kv_shared_layers": 20, "num_hidden_layers": 35, "use_double_wide_mlp": True},
    "gemma3n_text": {},
}
"""Configs with layers that read the keys and values of others, as of Gemma 4 E2B and Gemma 3n E4B."""
WIDE = {"hidden_size": 256, "intermediate_size": 640, "moe_intermediate_size": 160, "linear_value_head_dim": 64}
TABLE = Path(__file__).parents[2] / "docs" / "FAMILIES.md"


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the folder of a small random model of a type, with its class's own config made small; a `wide` one has a
    few million parameters, a `sharing` one layers that read others' keys and values."""

    @cache
    def made(kind: str, how: str = "") -> Path:
        config = config_of(kind).to_dict()
        if how == "sharing":
            config = CONFIG_MAPPING[kind](**SHARING[kind]).to_dict()
        small = small_config(architecture_of(config, where=kind))
        small |= {"vocab_size": families.VOCABULARY, "eos_token_id": 0, "pad_token_id": None}
        small |= {"vocab_size_per_layer_input": families.VOCABULARY} if "vocab_size_per_layer_input" in small else {}
        small |= {key: value for key, value in WIDE.items() if key in small and how == "wide"}
        model = small_model(small, seed=1)
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
    found, row = decoder(kind), listed()[kind]
    assert found.tier == row.tier, found.note
    assert page([found]).splitlines()[-1] == f"| {row.kind} | {row.tier} | {row.note} |"


def test_the_table_has_every_decoder() -> None:
    rows = listed()
    assert list(rows) == kinds() and {each.tier for each in rows.values()} == {KNOWN, REMOVAL, REFUSED}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("lfm2", "wide"),
        *(pytest.param(kind, "wide", marks=pytest.mark.exhaustive) for kind in SHAPES if kind != "lfm2"),
        ("gemma4_text", "sharing"),
        pytest.param("gemma3n_text", "sharing", marks=pytest.mark.exhaustive),
    ],
)
def test_compress(kind: str, how: str, folder_of: Any, text_file: Path, tmp_path: Path) -> None:
    folder, out = folder_of(kind, how), tmp_path / "out"
    checkpoint = Checkpoint.open(folder, model="m")
    depth = checkpoint.architecture.n_layers
    assert how != "wide" or 2_000_000 < checkpoint.parameters < 10_000_000
    small = ["--calibration", text_file, "--tokens", 512, "--seq-len", 64, "--eval-windows", 2, *LITTLE]
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
        *("taylor", "shortgpt --stream", "evolve[generations=2,offspring=4,half-layers=false]"),
        *(
            pytest.param(each, marks=pytest.mark.exhaustive)
            for each in ("shortgpt", "angular", "sleb", "reverse", "magnitude", "come-p[removals=true]")
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


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no such type": ({"model_type": "llama9", "transformers_version": "6.0"}, "no model type 'llama9'.*written by 6.0"),
    "code of its own": ({"model_type": "mine", "auto_map": {}}, "code of its own that is not run"),
    "an encoder-decoder": (CONFIG_MAPPING["bart"]().to_dict(), "an encoder-decoder"),
    "no language model": (CONFIG_MAPPING["vit"]().to_dict(), "AutoModelForCausalLM of transformers does not load"),
    "a refused config": ({"model_type": "lfm2", "hidden_size": "wide"}, "transformers refuses this config"),
    "several lists of layers": (CONFIG_MAPPING["xlm"]().to_dict(), "one list of 12 layers"),
    "layers that need an image": (
        CONFIG_MAPPING["mllama"]().get_text_config().to_dict(),
        "layers that can be removed one by one; found cross-attention layers",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be(what: str) -> None:
    config, message = REFUSALS[what]
    with pytest.raises(UserError, match=message):
        inspected(config, None, where="config.json", reason="-")


@pytest.mark.parametrize("kind", SHARING)
def test_keys_and_values_that_others_read(kind: str) -> None:
    """A layer whose keys and values others read stays; without one of these the others are numbered anew."""
    config = CONFIG_MAPPING[kind](**SHARING[kind]).to_dict()
    architecture, shared = architecture_of(config, where=kind), config["num_kv_shared_layers"]
    depth, possible = architecture.n_layers, Possible(architecture)
    first, types = depth - shared, config["layer_types"]
    assert architecture.layer_types is not None
    sources = {max(layer for layer in range(first) if types[layer] == kind) for kind in set(types)}
    for layer in [0, *sources, first, depth - 2]:
        kept = [other for other in range(depth) if other != layer]
        assert possible(kept) == (layer not in sources)
        if layer not in sources:
            assert for_layers(architecture, config, kept, "-")["num_kv_shared_layers"] == shared - (layer >= first)
        else:
            assert architecture.layer_types[layer] == f"{types[layer]} (store_full_length_kv)"


def test_tensors_that_the_class_does_not_use_stay(folder_of: Any, tmp_path: Path) -> None:
    """Files of Gemma 3n and 4 hold keys and values of layers that read others'."""
    folder = shutil.copytree(folder_of("gemma3n_text", "sharing"), tmp_path / "model")
    architecture = Checkpoint.open(folder, model="m").architecture
    last = architecture.n_layers - 1
    tensors, more = load_file(folder / "model.safetensors"), torch.rand(3, 4)
    save_file({**tensors, f"model.layers.{last}.self_attn.k_proj.weight": more}, folder / "model.safetensors")
    kept = next(left for left in removals(architecture) if last in left)
    found = load_file(built(folder, kept, tmp_path / "out") / "model.safetensors")
    assert torch.equal(found[f"model.layers.{len(kept) - 1}.self_attn.k_proj.weight"], more)


@pytest.mark.parametrize(("kind", "more"), [("gemma3n_text", 3), ("gemma4_text", 0)])
def test_the_state_seen_from_the_class(kind: str, more: int, folder_of: Any) -> None:
    """The estimate counts all that layers hand on: further streams, and keys and values."""
    checkpoint = Checkpoint.open(folder_of(kind, "sharing"), model="m")
    resident = LoadedModel(checkpoint, device=torch.device("cpu"))
    found = state_of(checkpoint.architecture)
    assert found == LayerStream(resident.model, checkpoint.architecture).state
    assert found.streams == 1 + more and len(found.shared) == 2 and found.size > found.width * found.streams


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
    shown = invoke("inspect", folder_of("qwen3_5_text")).stdout.strip().splitlines()
    assert len(shown) <= 10 and "8, of width 64 (linear_attention: 6, full_attention: 2)" in shown[3]


def test_the_last_layer_of_a_kind_stays(folder_of: Any, text_file: Path, tmp_path: Path) -> None:
    small = ["--calibration", text_file, "--tokens", 512, "--seq-len", 64, *LITTLE, "--heal", "none"]
    done = invoke("compress", folder_of("lfm2"), "-o", tmp_path / "out", "--layers", 1, "--method", "reverse", *small)
    assert done.exit_code == 2 and "every layer is the last of its kind" in done.stderr


def test_a_recipe_may_leave_no_layer_of_a_kind(folder_of: Any, tmp_path: Path) -> None:
    """With an explicit option it is done, and logged."""
    folder = folder_of("lfm2")
    kinds = Checkpoint.open(folder, model="m").architecture.layer_types
    assert kinds is not None
    whole = identity(Variant(name="base", model=str(folder)), len(kinds))
    layers = [op for op, kind in zip(whole.layers, kinds, strict=True) if kind == "conv"]
    schema.save(whole.with_layers(layers), tmp_path / "recipe.yaml")
    done = invoke("build", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert done.exit_code == 0 and "no layer of kind full_attention is left" in done.stderr


@pytest.mark.parametrize(
    "op",
    [
        lambda refs: Merge(sources=refs, weights=(0.5, 0.5)),
        lambda refs: Concat(
            cuts=tuple(
                Cut(source=ref, kv_groups=(0,), channels=(0,), weights=dict.fromkeys(PARTS, 0.5)) for ref in refs
            )
        ),
    ],
    ids=["merge", "concat"],
)
def test_a_recipe_that_joins_layers_is_refused(op: Any, folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("nemotron_h")
    kinds = Checkpoint.open(folder, model="m").architecture.layer_types
    assert kinds is not None
    first, second = [index for index, kind in enumerate(kinds) if kind == kinds[0]][:2]
    whole = identity(Variant(name="base", model=str(folder)), len(kinds))
    joined = op(tuple(LayerRef(variant="base", layer=layer) for layer in (first, second)))
    rest = [each for index, each in enumerate(whole.layers) if index not in (first, second)]
    schema.save(whole.with_layers([joined, *rest]), tmp_path / "recipe.yaml")
    done = invoke("build", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert done.exit_code == 2 and not (tmp_path / "out").exists()
    assert re.search("(concat|merge), and layers of this model can only be removed: no family file", done.stderr)


@pytest.mark.parametrize("stage", ["end-to-end", "layerwise"])
def test_distillation(stage: str, folder_of: Any, text_file: Path, tmp_path: Path) -> None:
    small = ["--calibration", text_file, "--tokens", 2048, "--seq-len", 32, *LITTLE, "--method", "shortgpt"]
    done = invoke(
        "compress", folder_of("lfm2"), "-o", tmp_path / "out", "--layers", 6, *small, "--heal", stage, "--json"
    )
    assert done.exit_code == 0, done.output
    healed = json.loads(done.stdout)["healed"]
    assert (healed["method"], healed["tokens"]) == (stage, 2048)
    verified = invoke("verify", tmp_path / "out")
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("stage", [pytest.param("end-to-end", marks=pytest.mark.exhaustive), "layerwise"])
def test_distillation_of_layers_that_read_more(stage: str, folder_of: Any, text_file: Path, tmp_path: Path) -> None:
    folder = folder_of("gemma4_text", "sharing")
    depth = Checkpoint.open(folder, model="m").architecture.n_layers
    small = ["--calibration", text_file, "--tokens", 2048, "--seq-len", 32, *LITTLE, "--method", "shortgpt"]
    done = invoke("compress", folder, "-o", tmp_path / "out", "--layers", depth - 1, *small, "--heal", stage)
    if stage == "layerwise":
        assert done.exit_code == 2 and "read more than the hidden states before them" in done.stderr
    else:
        assert done.exit_code == 0, done.output


FAMILY = """
base: {base}
variants: {{other: {other}}}
target: {{layers: 5}}
operations: [remove, select{more}]
heal: {heal}
objectives: [{{name: prose, loss: {text}, split: "0:0.5"}}]
search: {{engine: evolve, trials: 8, min_budget: 4, max_budget: 12, seed: 0, warm_start: [random-middle, shortgpt]}}
"""


@pytest.fixture
def family(folder_of: Any, text_file: Path, tmp_path: Path) -> Any:
    """Writes a family file of a model and another one like it."""

    def write(kind: str, how: str = "", *, more: str = "", heal: str = "none") -> Path:
        base = folder_of(kind, how)
        other = shutil.copytree(base, tmp_path / "other")
        tensors = load_file(other / "model.safetensors")
        changed = {name: each + 0.02 * torch.randn_like(each) for name, each in tensors.items() if ".layers." in name}
        save_file({**tensors, **changed}, other / "model.safetensors")
        text = FAMILY.format(base=base, other=other, more=more, heal=heal, text=text_file)
        (tmp_path / "family.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "family.yaml"

    return write


@pytest.mark.parametrize("kind", ["lfm2", pytest.param("qwen3_5_text", marks=pytest.mark.exhaustive)])
def test_a_search(kind: str, family: Any, tmp_path: Path) -> None:
    """Layers are removed, or selected from another model; every trial is one that can be built."""
    done = invoke("tailor", family(kind, heal="finalists"), "-o", tmp_path / "run", "--tokens", 512, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["trials"], found["failed"]) == (8, 0)
    kinds = Checkpoint.open(tmp_path / "run" / "best", model="best").architecture.layer_types
    assert (
        kinds is not None
        and len(kinds) == 5
        and set(kinds) == {"conv" if kind == "lfm2" else "linear_attention", "full_attention"}
    )
    verified = invoke("verify", tmp_path / "run" / "best")
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("joins", ["merge, concat", "half-layers"])
def test_a_search_that_joins_layers_is_refused(joins: str, family: Any, tmp_path: Path) -> None:
    done = invoke("tailor", family("lfm2", more=f", {joins}"), "-o", tmp_path / "run")
    assert done.exit_code == 2 and not (tmp_path / "run").exists()
    assert f"{joins}: layers of this model can only be removed: no family file describes" in done.stderr
