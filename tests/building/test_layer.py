"""Tensors of output layers, of every kind of family."""

from __future__ import annotations

import json
import pickle
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM

from intarsia.activations.stream import LayerStream
from intarsia.architecture.detect import detect
from intarsia.architecture.spec import PARTS, Part
from intarsia.building import slicing
from intarsia.building.layer import layer_tensors, parts_of_tensors
from intarsia.building.loaded_model import LoadedModel, twin
from intarsia.building.materialize import assembled, materialize
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from intarsia.recipe.algebra import concat_of, half_layers
from intarsia.recipe.recipe import Concat, LayerRef, Merge, NormMode, Op, Recipe
from intarsia.recipe.validate import check
from tests import families
from tests.building import by_hand, by_parts
from tests.conftest import Folder, InMemory, Opened
from tests.families_dense import UNLIKE
from tests.recipes_by_hand import recipe_of, ref, select, shared

# In the Qwen3 model layers 2 and 3 are of another attention type than the rest.
SOURCES = {"two": (0, 1), "other type": (2, 3), "three": (5, 0, 4)}


def run(resident: LoadedModel, op: Op, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The op's module, and the definition, on the same hidden states."""
    stream = LayerStream(resident.model, resident.architecture)
    ids = torch.randint(2, families.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        entry = stream.enter(ids, None)
        call = entry.calls[op.sources[0].layer]
        h = entry.h_BTD
        define = by_parts if resident.architecture.family.name in by_parts.FAMILIES else by_hand
        return stream.run(resident.module(op), h, call), define.concat_output(op, resident, h, call)


@pytest.mark.parametrize("sources", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("family", [*families.FAMILIES, *families.VARIATIONS])
def test_a_concatenation_is_the_sum_of_its_pieces(family: str, sources: tuple[int, ...], resident_of: InMemory) -> None:
    resident = resident_of(family)
    found, by_hand = run(resident, shared(resident.architecture, sources, seed=len(sources)))
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*families.FAMILIES, *families.VARIATIONS])
def test_a_whole_layer_as_a_concatenation_is_that_layer(family: str, resident_of: InMemory) -> None:
    """Also checks the definition that the other tests compare with: here it must agree with transformers."""
    resident = resident_of(family)
    op = shared(resident.architecture, [2])
    found, by_hand = run(resident, op)
    stream = LayerStream(resident.model, resident.architecture)
    ids = torch.randint(2, families.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        entry = stream.enter(ids, None)
        original = stream.run(resident.layers[2], entry.h_BTD, entry.calls[2])
    torch.testing.assert_close(found, original, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_hand, original, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_merging_a_merged_layer_keeps_its_pieces(family: str, resident_of: InMemory) -> None:
    """Pieces of the intermediate layer, by their place in it, become the right pieces of original layers."""
    resident = resident_of(family)
    architecture = resident.architecture
    inner = shared(architecture, [0, 1], seed=3)
    whole = architecture.n_pieces("mlp")
    first, half = whole // 8, whole // 2
    kept = [
        {"attention": (1,), "mlp": tuple(range(first, first + half))},
        {"attention": tuple(range(architecture.n_kv_heads - 1)), "mlp": tuple(range(half))},
    ]
    weights = [{"attention": 0.25, "mlp": 0.5}, {"attention": 0.75, "mlp": 0.5}]
    op = concat_of([inner, select(4)], kept, weights=weights, norm="fold", architecture=architecture)
    assert isinstance(op, Concat)
    groups = [(cut.source.layer, group) for cut in inner.cuts for group in cut.kv_groups]
    channels = [(cut.source.layer, channel) for cut in inner.cuts for channel in cut.channels]
    expected_groups = {groups[1], *((4, group) for group in range(architecture.n_kv_heads - 1))}
    expected_channels = {*channels[first : first + half], *((4, channel) for channel in range(half))}
    assert {(cut.source.layer, group) for cut in op.cuts for group in cut.kv_groups} == expected_groups
    assert {(cut.source.layer, channel) for cut in op.cuts for channel in cut.channels} == expected_channels
    found, by_hand = run(resident, op)
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*families.FAMILIES, *families.VARIATIONS])
def test_half_layers_are_their_sub_blocks_to_the_bit(family: str, resident_of: InMemory) -> None:
    """The attention of 4 with the MLP of 5: their own tensors, and the original without the sub-blocks between."""
    resident = resident_of(family)
    architecture = resident.architecture
    op = half_layers(select(4), select(5), "fold", architecture)
    assert isinstance(op, Concat)

    def read(ref: LayerRef, name: str) -> torch.Tensor:
        return resident.checkpoint.layer_tensor(ref.layer, name)

    parts = parts_of_tensors(architecture)
    shared_norms = {norm.module for norm in architecture.norms if len(norm.parts) > 1}
    for name, tensor in layer_tensors(op, architecture, read).items():
        own = read(LayerRef(variant="base", layer=4 if parts[name] == "attention" else 5), name)
        if shared_norms:  # one norm for both parts is folded, as in every concatenation
            continue
        assert torch.equal(tensor, own), name
    if architecture.parallel:
        return
    stream = LayerStream(resident.model, architecture)
    ids = torch.randint(2, families.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        entry = stream.enter(ids, None)
        found = stream.run(resident.module(op), entry.h_BTD, entry.calls[4])
        skips = [_silenced(resident, layer, part) for layer, part in ((4, "mlp"), (5, "attention"))]
        h = stream.run(resident.layers[4], entry.h_BTD, entry.calls[4])
        h = stream.run(resident.layers[5], h, entry.calls[5])
        for skip in skips:
            skip.remove()
    assert torch.equal(found, h)


def _silenced(resident: LoadedModel, layer: int, part: Part) -> RemovableHandle:
    """A sub-block that adds nothing: the last of its modules gives zeros."""
    architecture, modules = resident.architecture, dict(resident.layers[layer].named_modules())
    after = architecture.norm_after(part)
    name = architecture.writer(part).module if after is None else after.module
    name = next(each for each in (name, name.split(".")[0], "mlp") if each in modules)  # experts are one module

    def zeros(_: object, __: object, output: Any) -> Any:
        return (output[0] * 0.0, *output[1:]) if isinstance(output, tuple) else output * 0.0

    return modules[name].register_forward_hook(zeros)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_everything_of_the_first_layer_and_nothing_of_the_second_is_the_first(
    family: str, resident_of: InMemory
) -> None:
    architecture = resident_of(family).architecture
    whole = {"attention": range(architecture.n_kv_heads), "mlp": range(architecture.n_pieces("mlp"))}
    nothing = {"attention": (), "mlp": ()}
    ones, zeros = {"attention": 1.0, "mlp": 1.0}, {"attention": 0.0, "mlp": 0.0}
    for norm in ("fold", "average"):
        op = concat_of(
            [select(1), select(0)], [whole, nothing], weights=[ones, zeros], norm=norm, architecture=architecture
        )
        assert op == select(1)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_average_mode(family: str, checkpoint_of: Opened) -> None:
    """As published: rows as they are, and norms, like everything that belongs to no piece, averaged by weight."""
    checkpoint = checkpoint_of(family)
    architecture = checkpoint.architecture
    op = shared(architecture, [0, 4, 5], norm="average")
    found = layer_tensors(op, architecture, lambda ref, name: checkpoint.layer_tensor(ref.layer, name))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == architecture.layer_shapes()

    def mean(name: str, part: str) -> torch.Tensor:
        return sum(cut.weights[part] * checkpoint.layer_tensor(cut.source.layer, name) for cut in op.cuts)

    def of_pieces(name: str, part: str, segments: Sequence[str], axis: int) -> torch.Tensor:
        rows, start = [], 0
        for segment in segments:
            unit = architecture.unit(segment)
            rows += [
                checkpoint.layer_tensor(cut.source.layer, name).movedim(axis, 0)[start + piece * unit + i]
                for cut in op.cuts
                for piece in cut.pieces(part)
                for i in range(unit)
            ]
            start += unit * architecture.n_pieces(part)
        return torch.stack(rows).movedim(0, axis)

    for norm in architecture.norms:
        names = [f"{norm.module}.{kind}" for kind in ("weight", "bias") if getattr(norm, kind)]
        for name in names:
            if norm.rows is None:
                torch.testing.assert_close(found[name], mean(name, norm.part), rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(found[name], of_pieces(name, norm.part, [norm.rows], 0))
    for linear in architecture.linears:
        weight = f"{linear.module}.weight"
        if linear.per_expert:
            kept = [(cut.source.layer, expert) for cut in op.cuts for expert in cut.channels]
            for place, (layer, expert) in zip(architecture.modules(linear), kept, strict=True):
                own = checkpoint.layer_tensor(layer, f"{architecture.modules(linear)[expert]}.weight")
                assert torch.equal(found[f"{place}.weight"], own)
            continue
        if linear.whole is not None:
            torch.testing.assert_close(found[weight], mean(weight, linear.part), rtol=1e-6, atol=1e-7)
            continue
        assert torch.equal(found[weight], of_pieces(weight, linear.part, linear.segments, linear.cut_axis))
        if linear.bias and linear.side == "writes":
            bias = f"{linear.module}.bias"
            torch.testing.assert_close(found[bias], mean(bias, linear.part), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("norm", ["fold", "average"])
@pytest.mark.parametrize("fused", [True, False])
def test_some_rows_at_a_time_are_all_rows(
    fused: bool, norm: NormMode, checkpoint_of: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of several sources, in blocks that end in the middle of them; two dtypes become the wider one."""
    checkpoint = checkpoint_of("phi3" if fused else "opt")
    architecture, matrices = checkpoint.architecture, list[weakref.ref[torch.Tensor]]()
    op = shared(architecture, [0, 4, 5], norm=norm)

    def read(source: LayerRef, name: str) -> torch.Tensor:
        tensor = checkpoint.layer_tensor(source.layer, name).to(torch.float64 if source.layer == 4 else torch.float32)
        if tensor.ndim == 2:
            assert not any(matrix() is not None for matrix in matrices), "one is in memory at a time"
            tensor = tensor.clone()
            matrices.append(weakref.ref(tensor))
        return tensor

    expected = layer_tensors(op, architecture, read)
    monkeypatch.setattr(slicing, "_ROWS", 3)
    found = layer_tensors(op, architecture, read)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.ndim == 1 or tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "gemma3", "stablelm"])
def test_folded_norms_are_neutral(family: str, checkpoint_of: Opened) -> None:
    checkpoint = checkpoint_of(family)
    architecture = checkpoint.architecture
    op = shared(architecture, [0, 1])
    found = layer_tensors(op, architecture, lambda ref, name: checkpoint.layer_tensor(ref.layer, name))
    for norm in architecture.norms:
        if norm.place == "before":
            assert torch.equal(found[f"{norm.module}.weight"] + norm.offset, torch.ones(architecture.width))
            if norm.bias:
                shift = 0.0 if architecture.shift_folds(norm.part) else 1.0
                assert torch.equal(found[f"{norm.module}.bias"], torch.full((architecture.width,), shift))


def test_a_merge_is_linear_in_every_tensor(checkpoint_of: Opened) -> None:
    checkpoint = checkpoint_of("opt")
    sources = tuple(LayerRef(variant="base", layer=layer) for layer in (3, 1, 2))
    op = Merge(sources=sources, weights=(0.5, -1.0, 2.0))
    found = layer_tensors(op, checkpoint.architecture, lambda ref, name: checkpoint.layer_tensor(ref.layer, name))
    assert set(found) == set(checkpoint.architecture.layer_shapes())
    for name, tensor in found.items():
        first, second, third = (checkpoint.layer_tensor(layer, name) for layer in (3, 1, 2))
        torch.testing.assert_close(tensor, 0.5 * first - second + 2.0 * third, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", ["llama-bias", "gemma2", "olmo3", "granite"])
def test_a_scaled_layer_adds_that_much_more(family: str, part: str, resident_of: InMemory) -> None:
    """Also where a norm stands after the part, which would take back a scale before it."""
    resident = resident_of(family)
    stream = LayerStream(resident.model, resident.architecture)
    ids = torch.randint(2, families.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    source = LayerRef(variant="base", layer=1)
    added = []
    for scale in (1.0, 0.25):
        module = twin(resident.module(Merge(sources=(source,), weights=(1.0,), scale=scale)))
        other = module.get_submodule(resident.architecture.writer("mlp" if part == "attention" else "attention").module)
        for name, parameter in list(other.named_parameters()):
            setattr(other, name, torch.nn.Parameter(torch.zeros_like(parameter), requires_grad=False))
        with torch.no_grad():
            entry = stream.enter(ids, None)
            added.append(stream.run(module, entry.h_BTD, entry.calls[1]) - entry.h_BTD)
    assert float(added[0].abs().max()) > 0.1
    torch.testing.assert_close(added[1], 0.25 * added[0], rtol=1e-4, atol=1e-5)


def test_a_twin_shares_parameters_and_no_hooks(resident_of: InMemory) -> None:
    """Later versions of transformers hang hooks on layers once hidden states are asked for; a twin can be pickled."""
    original = resident_of("llama").layers[0]
    with original.register_forward_hook(lambda *_: None), original.register_forward_pre_hook(lambda *_: None):
        copied = twin(original)
    names = dict(original.named_parameters())
    assert all(parameter is names[name] for name, parameter in copied.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in copied.modules())
    assert pickle.loads(pickle.dumps(copied)).state_dict().keys() == original.state_dict().keys()


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


# Longer than every window of the tiny models.
IDS = torch.randint(2, families.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


def mixed(checkpoint: Checkpoint) -> Recipe:
    """Both kinds of layers, all in new places: 1, 2, pieces of 0 and 4, 3, 5."""
    architecture = checkpoint.architecture
    return recipe_of(checkpoint.model, [select(1), select(2), shared(architecture, [0, 4]), select(3), select(5)])


@torch.no_grad()
@pytest.mark.parametrize("family", UNLIKE)
def test_a_layer_brings_its_kind_along(family: str, resident_of: InMemory, tmp_path: Path) -> None:
    """Reloaded from disk, assembled in memory, and chained layer by layer: one model."""
    resident = resident_of(family)
    recipe = mixed(resident.checkpoint)
    materialize(recipe, {"base": resident.checkpoint}, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    stream = LayerStream(resident.model, resident.architecture)
    entry = stream.enter(IDS, None)
    h = entry.h_BTD
    for index, op in enumerate(recipe.layers):
        h = stream.run(resident.module(op, recipe.fitted.get(index)), h, entry.calls[op.sources[0].layer])
    chain = stream.logits(h, IDS, None)
    torch.testing.assert_close(loaded(IDS).logits, chain, rtol=1e-5, atol=1e-5)
    assert torch.equal(assembled(recipe, resident)(IDS).logits, loaded(IDS).logits)
    cached, plain = (
        loaded.generate(IDS[:1, :6], use_cache=use, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


@torch.no_grad()
@pytest.mark.parametrize("family", UNLIKE)
def test_the_kind_of_a_layer_matters(family: str, resident_of: InMemory, tmp_path: Path) -> None:
    """Else the test above could not fail: with a list as for the old places, the logits are others."""
    resident = resident_of(family)
    materialize(mixed(resident.checkpoint), {"base": resident.checkpoint}, tmp_path / "out")
    right = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    name = "no_rope_layers" if family == "smollm3" else "layer_types"
    assert config[name] == [resident.checkpoint.config[name][layer] for layer in (1, 2, 0, 3, 5)]
    config[name] = resident.checkpoint.config[name][:5]
    file.write_text(json.dumps(config), encoding="utf-8")
    wrong = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    assert float((wrong - right).abs().max()) > 1e-3


RULES = {
    "gemma2": ({}, ()),
    "gemma3": ({"sliding_window_pattern": 2}, ("sliding_window_pattern",)),
    "olmo3": ({}, ()),
    "smollm3": ({"no_rope_layer_interval": 2}, ("no_rope_layer_interval",)),
}


def by_rule(family: str, folder: Path, out: Path) -> Checkpoint:
    """The family's model with a config that states its lists by a rule, as older ones do."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("layer_types", "no_rope_layers", "_sliding_window_pattern", "no_rope_layer_interval"):
        config.pop(name, None)
    (out / "config.json").write_text(json.dumps({**config, **RULES[family][0]}), encoding="utf-8")
    return Checkpoint.open(out, model="by-rule")


@torch.no_grad()
@pytest.mark.parametrize("family", RULES)
def test_a_rule_becomes_a_list(family: str, model_folder: Folder, tmp_path: Path) -> None:
    """The rule would distinguish the layers by their new places."""
    source = by_rule(family, model_folder(family), tmp_path / "source")
    theirs: Any = AutoConfig.from_pretrained(source.folder)
    for name, values in source.architecture.per_layer.items():
        assert list(values) == list(getattr(theirs, name))  # as transformers makes it
    kinds = source.architecture.layer_types
    assert kinds is not None and len(set(kinds)) == 2
    kept = [0, *range(2, families.DEPTH)]
    recipe = recipe_of("by-rule", [select(layer) for layer in kept])
    materialize(recipe, {"base": source}, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    for name, values in source.architecture.per_layer.items():
        assert written[name] == [values[layer] for layer in kept]
    assert not any(name in written for name in RULES[family][1])
    assert detect(written).layer_types == tuple(kinds[layer] for layer in kept)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    in_memory = assembled(recipe, LoadedModel(source, device=torch.device("cpu")))
    assert torch.equal(loaded(IDS).logits, in_memory(IDS).logits)


def test_a_rule_that_still_holds_stays(model_folder: Folder, tmp_path: Path) -> None:
    source = by_rule("gemma3", model_folder("gemma3"), tmp_path / "source")
    materialize(recipe_of("by-rule", [select(n) for n in range(4)]), {"base": source}, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert written["sliding_window_pattern"] == 2
    assert written["layer_types"] == ["sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize("family", UNLIKE)
def test_layers_of_different_kinds_are_not_joined(family: str, checkpoint_of: Opened) -> None:
    checkpoint = checkpoint_of(family)
    architecture = checkpoint.architecture
    kinds = architecture.layer_types
    assert kinds is not None
    for op in (shared(architecture, [1, 2]), Merge(sources=(ref(1), ref(2)), weights=(0.5, 0.5))):
        with pytest.raises(UserError, match=r"layers\[0\]: expected sources of one layer type") as caught:
            check(recipe_of(checkpoint.model, [op, *(select(n) for n in (0, 3))]), {"base": architecture})
        assert f"base:1 is {kinds[1]}, base:2 is {kinds[2]}" in str(caught.value)
        assert "Join layers of one type only." in str(caught.value)
