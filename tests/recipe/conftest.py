"""Small architectures without any model, and hypothesis strategies for recipes over them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

from intarsia.architecture.detect import detect
from intarsia.architecture.spec import PARTS, Architecture, Part
from intarsia.recipe.recipe import Concat, Cut, LayerRef, Merge, NormMode, Op, Recipe, Select, Variant, derive_spans

MakeArchitecture = Callable[..., Architecture]


def make_architecture(**changes: Any) -> Architecture:
    """Six layers of 3 KV groups and 8 channels."""
    config = {
        "model_type": "llama",
        "hidden_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 8,
        "vocab_size": 50,
    }
    return detect({**config, **changes})


def random_concat(rng: random.Random, sources: list[LayerRef], architecture: Architecture, norm: NormMode) -> Concat:
    """A valid concatenation of some of these layers; a cut may have no pieces of a part, or of both."""
    used = rng.sample(sources, rng.randint(1, min(3, len(sources))))
    pieces: dict[Part, list[list[int]]] = {}
    weights: dict[Part, list[float]] = {}
    for part in PARTS:
        whole = architecture.n_pieces(part)
        counts = [0] * len(used)
        for _ in range(whole):
            counts[rng.randrange(len(used))] += 1
        pieces[part] = [rng.sample(range(whole), count) for count in counts]
        shares = [rng.choice([0, 1, 2, 5]) for _ in used]
        shares[0] += 1
        weights[part] = [share / sum(shares) for share in shares]
    return Concat(
        cuts=tuple(
            Cut(
                source=source,
                kv_groups=tuple(pieces["attention"][index]),
                channels=tuple(pieces["mlp"][index]),
                weights={part: weights[part][index] for part in PARTS},
            )
            for index, source in enumerate(used)
        ),
        norm=norm,
    )


@st.composite
def recipes(
    draw: st.DrawFn,
    architecture: Architecture,
    depth: int = 6,
    norm: NormMode | None = None,
    merges: bool = True,
    variants: tuple[str, ...] = ("base", "math"),
) -> Recipe:
    """A valid recipe over models of that depth."""
    rng = draw(st.randoms(use_true_random=False))
    sources = [LayerRef(variant=name, layer=layer) for name in variants for layer in range(depth)]
    layers: list[Op] = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["select", "concat", "merge"] if merges else ["select", "concat"]))
        if kind == "select":
            layers.append(Select(source=rng.choice(sources)))
        elif kind == "concat":
            mode: NormMode = norm or rng.choice(["fold", "average"])
            layers.append(random_concat(rng, sources, architecture, mode))
        else:
            used = tuple(rng.sample(sources, rng.randint(1, 3)))
            layers.append(Merge(sources=used, weights=tuple(rng.uniform(-2, 2) for _ in used)))
    return Recipe(
        variants=tuple(Variant(name=name, model=f"models/{name}") for name in variants),
        base=variants[0],
        depth=depth,
        layers=tuple(layers),
        spans=derive_spans(layers, depth),
    )


@pytest.fixture(scope="session")
def architecture() -> Architecture:
    return make_architecture()


@pytest.fixture(scope="session")
def architecture_with() -> MakeArchitecture:
    return make_architecture


@pytest.fixture(scope="session")
def recipes_over() -> Callable[..., st.SearchStrategy[Recipe]]:
    return recipes
