"""A merged layer that is merged again, built at once, is the layer that comes of building twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intarsia.activations.stream import LayerStream
from intarsia.architecture.spec import PARTS
from intarsia.building.loaded_model import LoadedModel
from intarsia.building.materialize import materialize
from intarsia.checkpoint.reader import Checkpoint
from intarsia.recipe.algebra import concat_of
from intarsia.recipe.ops import Concat
from tests import families
from tests.conftest import InMemory, Opened
from tests.recipes_by_hand import recipe_of, select, shared


@pytest.mark.parametrize("norm", ["fold", "average"])
@pytest.mark.parametrize("family", [*families.FAMILIES, *families.VARIATIONS])
def test_joined_twice_is_built_twice(
    family: str, norm: str, checkpoint_of: Opened, resident_of: InMemory, tmp_path: Path
) -> None:
    source, original = checkpoint_of(family), resident_of(family)
    inner = recipe_of("m", [shared(source.architecture, [0, 1], seed=3, norm=norm), select(4), select(5)])
    outer = recipe_of("m", [shared(source.architecture, [1, 0], seed=4, norm=norm), select(2)], depth=3)
    again = outer.layers[0]
    assert isinstance(again, Concat)
    joined = concat_of(
        [inner.layers[cut.source.layer] for cut in again.cuts],
        [{part: cut.pieces(part) for part in PARTS} for cut in again.cuts],
        weights=[cut.weights for cut in again.cuts],
        norm=again.norm,
        architecture=source.architecture,
    )
    flat = inner.with_layers([joined, select(5)])
    assert {ref.layer for ref in joined.sources} == {0, 1, 4} and flat.spans == ((0, 5), (5, 6))
    materialize(inner, {"base": source}, tmp_path / "inner")
    built = Checkpoint.open(tmp_path / "inner", model="inner")
    ids = torch.randint(2, families.VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    found = []
    for resident, recipe in ((original, flat), (LoadedModel(built, device=torch.device("cpu")), outer)):
        stream = LayerStream(resident.model, resident.architecture)
        with torch.no_grad():
            entry = stream.enter(ids, None)
            h = entry.h_BTD
            for op in recipe.layers:
                h = stream.run(resident.module(op), h, entry.calls[op.sources[0].layer])
            found.append(stream.logits(h, ids, None))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
