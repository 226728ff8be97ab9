"""Cost on paper: the formulas by hand, and the table that they give."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from intarsia.errors import UserError
from intarsia.planning.shapes import known_shapes, shape_of
from intarsia.planning.sizes import BASE_BYTES, Held, Sizes
from intarsia.stages.paper import plan_on_paper
from tests import families
from tests.conftest import Opened


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-3-70b", 70_553_706_496), ("llama-3.2-1b", 1_235_814_400)],
)
def test_parameters_of_well_known_models(name: str, parameters: int) -> None:
    assert Sizes.on_paper(shape_of(name)).weight_bytes == 2 * parameters


def test_every_shape_is_of_a_known_family() -> None:
    for name in known_shapes():
        assert shape_of(name).n_layers == known_shapes()[name]["num_hidden_layers"]


def test_sizes_of_a_checkpoint_are_those_of_its_files(checkpoint_of: Opened) -> None:
    for family in families.FAMILIES[:6]:
        checkpoint = checkpoint_of(family)
        assert Sizes.of(checkpoint, None).weight_bytes == checkpoint.nbytes, family
        assert Sizes.of(checkpoint, torch.bfloat16).weight_bytes == checkpoint.nbytes // 2


def test_layers_in_memory() -> None:
    """13 to 13.5 GB of weights; streamed: two layers (on a device half a one more), and embeddings twice (not tied)
    where they are used."""
    sizes = Sizes.on_paper(shape_of("llama-2-7b"))
    held = {"apart": True, "memory_bytes": 0, "batch_tokens": 512}
    layer, outside = 404_766_720, 524_296_192
    assert (sizes.layer_bytes, sizes.outside_bytes) == (layer, outside)
    assert Held(stream=False, devices=1, **held).weights(sizes) == 32 * layer + outside  # type: ignore[arg-type]
    assert Held(stream=False, devices=2, **held).weights(sizes) == 16 * layer + outside  # type: ignore[arg-type]
    streamed = Held(stream=True, devices=1, **held)  # type: ignore[arg-type]
    assert streamed.weights(sizes) == streamed.weights(sizes, outside=False) == 2.5 * layer + outside
    on_host = replace(streamed, apart=False)
    assert on_host.weights(sizes, layers=1.5) == 1.5 * layer + outside
    assert on_host.weights(sizes, outside=False) == 2 * layer
    assert on_host.weights(replace(sizes, mapped=False), outside=False) == 2 * layer + outside
    # H^l of 64k tokens in bfloat16; two for every weight of a layer, and causal attention over 512 tokens.
    assert sizes.hidden(65536) == 65536 * 4096 * 2
    assert sizes.flops(65536, 512) == 65536 * (2 * layer / 2 + 2 * 512 * 4096)


def test_the_table() -> None:
    paper = plan_on_paper(["llama-2-7b", "llama-3.1-405b"], [24 * 10**9, 80 * 10**9], sparsity=0.25)
    small, large, *giant = paper.rows
    assert (small.layers, small.target, giant[0].target) == (32, 23, 94)
    # Steps from 32 to 23 layers: one pass, and at most all layers behind each change.
    assert small.layer_forwards == 32 + sum(range(23, 32))
    assert small.hidden_bytes == 33 * 65536 * 4096 * 2
    assert small.disk_bytes == small.hidden_bytes - 8 * 10**9
    # The host has a layer on its way to the device, and a tokenizer of 32,000 entries.
    assert small.host_bytes == 8 * 10**9 + BASE_BYTES + 32_000_000 + 404_766_720
    assert small.in_memory_device_bytes is not None and small.in_memory_device_bytes <= 24 * 10**9
    assert large.streamed_device_bytes is not None and large.streamed_device_bytes < small.in_memory_device_bytes
    # A layer of 6.4 GB: two and a half of them and the embeddings are more than 24 GB.
    assert giant[0].streamed_device_bytes is None and giant[0].batch_tokens is None
    assert giant[1].streamed_device_bytes is not None and giant[1].in_memory_device_bytes is None


def test_a_config_file_is_a_shape(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(known_shapes()["llama-3-8b"]))
    assert shape_of(str(path)) == shape_of(str(tmp_path)) == shape_of("llama-3-8b")
    path.write_text("[]")
    for wrong in (str(path), str(tmp_path / "none"), "llama-9"):
        with pytest.raises(UserError):
            shape_of(wrong)
    with pytest.raises(UserError, match="device-memory"):
        plan_on_paper(["llama-2-7b"], [], sparsity=0.25)
