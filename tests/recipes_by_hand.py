"""Small recipes and ops for tests."""

from __future__ import annotations

import random
from collections.abc import Sequence

from intarsia.architecture.spec import PARTS, Architecture
from intarsia.recipe.recipe import Concat, Cut, LayerRef, NormMode, Op, Recipe, Select, Variant, derive_spans


def ref(layer: int) -> LayerRef:
    """That layer of the only variant."""
    return LayerRef(variant="base", layer=layer)


def select(layer: int) -> Select:
    """That layer, whole."""
    return Select(source=ref(layer))


def shared(architecture: Architecture, layers: Sequence[int], *, seed: int = 0, norm: NormMode = "fold") -> Concat:
    """Pieces of these layers, dealt out and laid down at random, with random weights; every layer gives some."""
    rng = random.Random(seed)
    dealt: dict[str, list[list[int]]] = {}
    weights: dict[str, list[float]] = {}
    for part in PARTS:
        whole = architecture.n_pieces(part)
        owners = [*range(len(layers)), *(rng.randrange(len(layers)) for _ in range(whole))][:whole]
        rng.shuffle(owners)
        # The same piece number may come from any of the layers: each deals from a pack of its own.
        packs = [rng.sample(range(whole), whole) for _ in layers]
        dealt[part] = [packs[index][: owners.count(index)] for index in range(len(layers))]
        shares = [rng.uniform(0.5, 2.0) for _ in layers]
        weights[part] = [share / sum(shares) for share in shares]
    return Concat(
        cuts=tuple(
            Cut(
                source=ref(layer),
                kv_groups=tuple(dealt["attention"][index]),
                channels=tuple(dealt["mlp"][index]),
                weights={part: weights[part][index] for part in PARTS},
            )
            for index, layer in enumerate(layers)
        ),
        norm=norm,
    )


def recipe_of(model: str, layers: Sequence[Op], *, depth: int = 6) -> Recipe:
    """A recipe over one model."""
    return Recipe(
        variants=(Variant(name="base", model=model),),
        base="base",
        depth=depth,
        layers=tuple(layers),
        spans=derive_spans(layers, depth),
    )
