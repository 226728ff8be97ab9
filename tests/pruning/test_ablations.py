"""The ablations of the CoMe paper: a weighted sum of whole layers, and fusion of what is left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from intarsia.architecture.spec import PARTS
from intarsia.building.layer import layer_tensors
from intarsia.errors import UserError
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.methods.come import Come, ComeSettings
from intarsia.pruning.methods.come_p import ComeP, ComePSettings
from intarsia.recipe import schema
from intarsia.recipe.recipe import Concat, Cut, Merge, Select
from tests import families
from tests.conftest import InMemory, Opened
from tests.pruning.by_hand import ladder_of
from tests.pruning.conftest import corpus_of
from tests.recipes_by_hand import recipe_of, ref, select, shared

WHOLE = [select(layer) for layer in range(families.DEPTH)]
WEIGHT_SUM = ComeSettings(combine="weight-sum")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_weighted_sum_of_whole_layers(family: str, resident_of: InMemory) -> None:
    """Span and shares as ever; every tensor is the sum by share."""
    resident, corpus = resident_of(family), corpus_of()
    model = Intermediate(resident, corpus, WHOLE)
    model.measure()
    concat = Come(ComeSettings()).decide(model, 5, [])
    step = Come(WEIGHT_SUM).decide(model, 5, [])
    assert step is not None and concat is not None and isinstance(step.op, Merge)
    assert (step.start, step.evidence["prior_ratios"]) == (concat.start, concat.evidence["prior_ratios"])
    pair = model.measures[step.start].influence, model.measures[step.start + 1].influence
    first = pair[0] / sum(pair)
    states = [layer.state_dict() for layer in resident.layers[step.start : step.start + 2]]
    for name, tensor in resident.module(step.op).state_dict().items():
        torch.testing.assert_close(tensor, first * states[0][name] + (1 - first) * states[1][name])


def test_sums_of_sums_are_one_sum(resident_of: InMemory, tmp_path: Path) -> None:
    run, stopped, model = ladder_of("come", resident_of("llama"), corpus_of(), tmp_path / "run", 1, WEIGHT_SUM)
    assert stopped is None and run.depths() == [5, 4, 3, 2, 1]
    (op,) = run.recipe(1).layers
    assert isinstance(op, Merge)
    assert sorted(source.layer for source in op.sources) == list(range(families.DEPTH))
    assert sum(op.weights) == pytest.approx(1.0)
    # Step by step, on state dictionaries.
    states = [dict(layer.state_dict()) for layer in resident_of("llama").layers]
    for entry in run.log():
        start, stop = entry["merged"]
        shares = entry["evidence"]["prior_ratios"]
        total = {
            name: sum(share * state[name] for share, state in zip(shares, states[start:stop], strict=True))
            for name in states[start]
        }
        states[start:stop] = [total]
    for name, tensor in model.modules[0].state_dict().items():
        torch.testing.assert_close(tensor, states[0][name], rtol=1e-4, atol=1e-6)


def test_the_posterior_form_takes_the_best_sum_of_the_grid(resident_of: InMemory) -> None:
    resident, corpus = resident_of("llama"), corpus_of()
    settings = ComePSettings(combine="weight-sum", granularity=4, racing=False, spans=1)
    model = Intermediate(resident, corpus, WHOLE)
    model.measure()
    step = ComeP(settings).decide(model, 5, [])
    assert step is not None
    losses = {}
    for quarters in range(5):
        first = quarters / 4
        source = [ref.source for ref in WHOLE[step.start : step.start + 2]]
        op = Merge(sources=tuple(source), weights=(first, 1 - first))
        other = Intermediate(resident, corpus, [*WHOLE[: step.start], op, *WHOLE[step.start + 2 :]])
        other.measure()
        losses[first] = other.loss
    best = min(losses, key=lambda first: losses[first])
    weights = step.op.weights if isinstance(step.op, Merge) else None
    if best in (0.0, 1.0):
        assert step.op == WHOLE[step.start + (best == 0.0)] and isinstance(step.op, Select)
    else:
        assert weights == pytest.approx((best, 1 - best))
    found = {entry["ratios"][0]: entry["loss"] for entry in step.evidence["grid"]}
    assert found == pytest.approx(losses, rel=1e-5)


# Fusion


def rows_of(resident: Any, layer: int, part: Any, piece: int) -> list[np.ndarray]:
    """What a piece reads with, norm folded in, one array a projection; that of v or up comes last."""
    architecture, module = resident.architecture, resident.layers[layer]
    scale, norm = 1.0, architecture.norm_before(part)
    if norm is not None and norm.weight:
        scale = module.get_submodule(norm.module).weight.double().numpy() + norm.offset
    found = []
    for linear in architecture.linears:
        if linear.part == part and linear.side == "reads":
            weight = module.get_submodule(linear.module).weight.double().numpy()
            for segment in linear.segments:
                unit = architecture.unit(segment)
                own, weight = np.split(weight, [unit * architecture.n_pieces(part)])
                rows = (own[piece * unit : (piece + 1) * unit] * scale).reshape(-1)
                # A group's queries, key and value one after the other: the value's rows are the last.
                value = len(rows) - architecture.head_dim * architecture.width
                found += np.split(rows, [value]) if segment == "qkv" else [rows]
    return found


def fused_by_hand(resident: Any, op: Concat, part: Any) -> np.ndarray:
    """The writing weight, piece by piece."""
    architecture = resident.architecture
    kept = [(cut.source.layer, piece) for cut in op.cuts for piece in cut.pieces(part)]

    def columns(layer: int, piece: int) -> np.ndarray:
        weight = resident.layers[layer].get_submodule(architecture.writer(part).module).weight.double().numpy()
        unit = weight.shape[1] // architecture.n_pieces(part)
        return weight[:, piece * unit : (piece + 1) * unit].copy()

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    out = [columns(layer, piece) for layer, piece in kept]
    features = [np.concatenate(rows_of(resident, layer, part, piece)) for layer, piece in kept]
    for cut in op.cuts:
        for piece in set(range(architecture.n_pieces(part))) - set(cut.pieces(part)):
            rows = rows_of(resident, cut.source.layer, part, piece)
            likeness = [cosine(np.concatenate(rows), other) for other in features]
            best = likeness.index(max(likeness))
            target = rows_of(resident, kept[best][0], part, kept[best][1])[-1]
            out[best] += (rows[-1] @ target) / (target @ target) * columns(cut.source.layer, piece)
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize("norm", ["fold", "average"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_what_is_left_out_is_added_to_what_is_most_similar(family: str, norm: Any, resident_of: InMemory) -> None:
    resident = resident_of(family)
    plain = shared(resident.architecture, [0, 1], norm=norm)
    fused = replace(plain, fuse=True)
    before, after = resident.module(plain).state_dict(), resident.module(fused).state_dict()
    writers = {
        part: f"{resident.architecture.writer(part).module}.weight"
        for part in PARTS
        if not resident.architecture.is_mixture(part)  # experts are left as they are
    }
    for part, name in writers.items():
        expected = fused_by_hand(resident, fused, part)
        np.testing.assert_allclose(after[name].numpy(), expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(before[name], after[name])
    for name, tensor in before.items():
        assert name in writers.values() or torch.equal(tensor, after[name])


def test_where_nothing_is_left_out_nothing_is_added(resident_of: InMemory) -> None:
    resident = resident_of("opt")
    op = Concat(
        cuts=(
            Cut(
                source=ref(0),
                kv_groups=tuple(range(resident.architecture.n_kv_heads)),
                channels=tuple(range(families.CHANNELS)),
                weights={"attention": 1.0, "mlp": 1.0},
            ),
        ),
        fuse=True,
    )
    whole = resident.layers[0].state_dict()
    found = resident.module(op).state_dict()
    for part in PARTS:
        name = f"{resident.architecture.writer(part).module}.weight"
        assert torch.equal(found[name], whole[name])


def test_fused_ladders_are_made_from_the_original_layers(resident_of: InMemory, tmp_path: Path) -> None:
    settings = ComeSettings(combine="fuse")
    run, stopped, model = ladder_of("come", resident_of("llama"), corpus_of(), tmp_path / "run", 2, settings)
    assert stopped is None and run.depths() == [5, 4, 3, 2]
    joined = [op for op in run.recipe(2).layers if isinstance(op, Concat)]
    assert joined and all(op.fuse for op in joined)
    for op, module in zip(model.ops, model.modules, strict=True):
        if isinstance(op, Concat):
            for part in PARTS:
                name = f"{resident_of('llama').architecture.writer(part).module}.weight"
                expected = fused_by_hand(resident_of("llama"), op, part)
                np.testing.assert_allclose(module.state_dict()[name].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_recipes_keep_what_is_fused(resident_of: InMemory, tmp_path: Path) -> None:
    plain = recipe_of("m", [shared(resident_of("llama").architecture, [0, 1]), select(2)])
    fused = replace(plain, layers=(replace(plain.layers[0], fuse=True), plain.layers[1]))
    for recipe in (plain, fused):
        schema.save(recipe, tmp_path / "recipe.yaml")
        assert schema.load(tmp_path / "recipe.yaml") == recipe
    assert schema.content_hash(plain) != schema.content_hash(fused)
    text = (tmp_path / "recipe.yaml").read_text().replace("fuse: true", "fuse: perhaps")
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match="fuse"):
        schema.load(tmp_path / "recipe.yaml")


def test_fused_on_disk_as_in_memory(resident_of: InMemory, checkpoint_of: Opened, tmp_path: Path) -> None:
    resident, checkpoint = resident_of("qwen3"), checkpoint_of("qwen3")
    op = replace(shared(resident.architecture, [0, 1]), fuse=True)
    tensors = layer_tensors(op, resident.architecture, lambda source, name: checkpoint.layer_tensor(source.layer, name))
    for name, tensor in resident.module(op).state_dict().items():
        assert torch.equal(tensor, tensors[name])
