"""A family without weights, with the sensitivities of its pieces; and tiny families with weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from intarsia.architecture.detect import detect
from intarsia.architecture.spec import PARTS, Architecture
from intarsia.recipe.methods import METHODS as KINDS
from intarsia.recipe.recipe import LayerRef, Variant
from intarsia.tailoring.candidate import Menu
from intarsia.tailoring.family import Family, open_family
from intarsia.tailoring.family_file import MemberSpec
from intarsia.tailoring.recipes import PieceScores, Translator
from intarsia.tailoring.space import Space
from tests import families

MEMBERS = ("base", "math", "code")
HASHES = {"base": "b" * 64, "math": "a" * 64, "code": "c" * 64}
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "model_stock")
DEPTH = 6


def make_architecture(**changes: object) -> Architecture:
    """Six layers of 3 KV groups and 20 channels."""
    config = {
        "model_type": "llama",
        "hidden_size": 48,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 20,
        "vocab_size": 50,
    }
    return detect({**config, **changes})


def make_scores(architecture: Architecture) -> PieceScores:
    rng = random.Random(0)
    return {
        LayerRef(variant=name, layer=layer): {
            part: torch.tensor([rng.random() for _ in range(architecture.n_pieces(part))]) for part in PARTS
        }
        for name in MEMBERS
        for layer in range(architecture.n_layers)
    }


def make_translator(**changes: object) -> Translator:
    values = {"lead": (0.3, 0.5, 0.7), "lambda": (0.5, 1.0), "density": (0.2, 0.6)}
    grids = {method: {name: values[name] for name in KINDS[method].search} for method in METHODS}
    menu = Menu(members=MEMBERS, select=True, methods=METHODS, grids=grids)
    settings = {"depth": DEPTH, "target": 4, "menu": menu, "shares": (0.2, 0.5, 0.8), "scales": (0.9, 1.0), **changes}
    if settings["target"] != 4:
        settings["shares"] = ()
    architecture = make_architecture()
    variants = tuple(Variant(name=name, model=f"models/{name}", sha256=HASHES[name]) for name in MEMBERS)
    return Translator(
        space=Space(**settings),  # type: ignore[arg-type]
        architecture=architecture,
        variants=variants,
        scores=make_scores(architecture),
        seed=5,
    )


@pytest.fixture(params=["cut", "halves", "separate", "fusion", "groups", "stack"])
def translator(request: pytest.FixtureRequest) -> Translator:
    kinds: dict[str, dict[str, object]] = {
        "cut": {},
        "halves": {"half_layers": True},
        "separate": {"separate": True},
        "fusion": {"target": DEPTH, "separate": True},
        "groups": {"target": DEPTH, "groups": 3},
        "stack": {"target": 8},
    }
    return make_translator(**kinds[request.param])


def family_of(base: Path, **members: Path) -> Family:
    paths = {"base": base, **members}
    return open_family({name: MemberSpec(model=str(path)) for name, path in paths.items()})


@pytest.fixture(scope="session")
def pair(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Gives a base of a family of models with one full variant, `math`. Tests must not change it."""
    root = tmp_path_factory.mktemp("variants")

    def made(family: str) -> Family:
        variant = families.save(families.make_model(family, seed=7), root / family)
        return family_of(model_folder(family), math=variant)

    return cache(made)


@pytest.fixture(scope="session")
def trio(pair: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A llama with a full variant, `math`, and an adapter, `lora`. Tests must not change it."""
    peft = pytest.importorskip("peft")
    two = pair("llama")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(two.members[0].model, dtype=torch.float32)
    changed = ["q_proj", "o_proj", "down_proj"]
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=changed, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    out = tmp_path_factory.mktemp("lora") / "adapter"
    wrapped.save_pretrained(str(out))
    return family_of(Path(two.members[0].model), math=Path(two.members[1].model), lora=out)


@pytest.fixture
def broken(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[], Family]:
    """Gives a llama with a variant, `sick`, one tensor of whose layer 4 is not finite."""

    def made() -> Family:
        model = families.make_model("llama", seed=3)
        with torch.no_grad():
            model.get_parameter("model.layers.4.mlp.down_proj.weight")[0, 0] = float("nan")
        return family_of(model_folder("llama"), sick=families.save(model, tmp_path / "sick"))

    return made
