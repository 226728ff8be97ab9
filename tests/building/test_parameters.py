"""Tensors of files and parameters of modules are the same, whatever they are called and however they lie."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from intarsia.activations.stream import LayerStream
from intarsia.building import loaded_model, offload
from intarsia.building.layer import parameter_name, parameter_names, tensor_names, to_parameters, to_tensors
from intarsia.building.loaded_model import LoadedModel, load_model
from intarsia.building.offload import blocks
from intarsia.checkpoint.adapter import open_variant
from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.job import Job
from intarsia.options import Runtime
from tests import families
from tests.conftest import InMemory, Opened
from tests.recipes_by_hand import shared

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", [*families.FAMILIES, *families.VARIATIONS])
def test_there_and_back(family: str, checkpoint_of: Opened, resident_of: InMemory) -> None:
    checkpoint, architecture = checkpoint_of(family), checkpoint_of(family).architecture
    stored = {name: checkpoint.layer_tensor(2, name) for name in architecture.layer_shapes()}
    in_memory = dict(resident_of(family).layers[2].named_parameters())
    found = to_parameters(stored, architecture)
    assert set(found) == set(in_memory) == set(parameter_names(architecture))
    assert all(torch.equal(found[name], parameter) for name, parameter in in_memory.items())
    back = to_tensors(in_memory, architecture)
    assert set(back) == set(stored)
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())
    assert {name: parameter_name(name, architecture) for name in stored} == {
        stored_name: name for name in in_memory for stored_name in tensor_names(name, architecture)
    }


def test_where_an_expert_lies(checkpoint_of: Opened) -> None:
    architecture = checkpoint_of("mixtral").architecture
    assert parameter_name("block_sparse_moe.experts.3.w3.weight", architecture) == "mlp.experts.gate_up_proj"
    assert parameter_name("block_sparse_moe.gate.weight", architecture) == "mlp.gate.weight"
    assert tensor_names("mlp.gate.weight", architecture) == ("block_sparse_moe.gate.weight",)
    assert len(tensor_names("mlp.experts.gate_up_proj", architecture)) == 2 * families.EXPERTS


@pytest.mark.parametrize("family", ["gpt-neox", "mixtral", "qwen2-moe"])
def test_streamed_as_in_memory(family: str, checkpoint_of: Opened, resident_of: InMemory) -> None:
    whole, streamed = resident_of(family), LoadedModel(checkpoint_of(family), device=CPU, stream=True)
    ids = torch.randint(2, families.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    ops = [shared(whole.architecture, [2, 3], seed=1)]
    found = []
    for resident in (whole, streamed):
        stream = LayerStream(resident.model, resident.architecture)
        with torch.no_grad():
            entry = stream.enter(ids, None)
            h = entry.h_BTD
            modules = [*resident.layers[:2], *(resident.module(op) for op in ops)]
            for module, call in zip(resident.walk(modules), entry.calls, strict=False):
                h = stream.run(module, h, call)
            found.append(stream.logits(h, ids, None))
    assert torch.equal(*found)


@pytest.mark.parametrize("module", ["self_attn.q_proj", "block_sparse_moe.experts.4.w3", "block_sparse_moe.gate"])
def test_an_adapter_reaches_the_parameter_that_holds_its_tensor(
    module: str, checkpoint_of: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    checkpoint = checkpoint_of("mixtral")
    name = checkpoint.architecture.tensor_name(1, f"{module}.weight")
    rows, columns = checkpoint.headers[name].shape
    a, b = torch.randn(2, columns), torch.randn(rows, 2)
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": rf".*layers\.1\.{module}"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "cache"))
    model = load_model(open_variant(str(tmp_path), base=checkpoint), device=CPU)
    stored = to_tensors(dict(model.model.layers[1].named_parameters()), checkpoint.architecture)
    own = {local: checkpoint.layer_tensor(1, local) for local in checkpoint.architecture.layer_shapes()}
    torch.testing.assert_close(stored[f"{module}.weight"], own[f"{module}.weight"] + 2.0 * b @ a)
    assert all(torch.equal(stored[local], own[local]) for local in own if local != f"{module}.weight")


@pytest.mark.parametrize(
    ("sizes", "free", "expected"),
    [
        ([1] * 6, [10.0, 10.0], [0, 0, 0, 1, 1, 1]),
        ([1] * 6, [20.0, 10.0], [0, 0, 0, 0, 1, 1]),
        ([1] * 6, [5.0, 10.0, 15.0], [0, 1, 1, 2, 2, 2]),
        ([1] * 4, [-3.0, 10.0], [1, 1, 1, 1]),  # embeddings alone fill the first
        ([1] * 4, [0.0, 0.0], [0, 0, 1, 1]),
        ([3, 1, 1, 1], [10.0, 10.0], [0, 1, 1, 1]),
        ([1], [1.0, 1.0, 1.0], [1]),
    ],
)
def test_blocks_follow_the_memory_that_is_free(sizes: list[int], free: list[float], expected: list[int]) -> None:
    found = blocks(sizes, free)
    assert found == expected
    assert found == sorted(found), "blocks are contiguous"


def test_the_rest_of_a_model_counts_once(checkpoint_of: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first device has room for all that is outside the layers and for half of them, the second for half."""
    first, read = torch.device("meta"), list[torch.nn.Module]()
    plain = load_model(checkpoint_of("llama"), device=CPU)
    layers = sum(parameter.nbytes for parameter in plain.model.layers.parameters())
    outside = sum(parameter.nbytes for parameter in plain.parameters()) - layers

    def load(*args: Any, **kwargs: Any) -> torch.nn.Module:
        read.append(load_model(*args, **kwargs))
        return read[0]

    def free(device: torch.device) -> int:
        there = sum(parameter.nbytes for parameter in read[0].parameters() if parameter.device == device)
        room = outside + layers // 2 - there if device == first else layers // 2
        return int(room / 0.8)

    monkeypatch.setattr(loaded_model, "load_model", load)
    monkeypatch.setattr(offload, "free_bytes", free)
    resident = LoadedModel(checkpoint_of("llama"), device=first, devices=(first, CPU))
    devices = [next(layer.parameters()).device for layer in resident.layers]
    assert devices == [first] * 3 + [CPU] * 3
    assert resident.model.get_input_embeddings().weight.device == first


@pytest.mark.parametrize(
    ("fast", "gigabytes", "stream", "expected"),
    [
        (True, 64.0, False, torch.bfloat16),
        (False, 64.0, False, torch.float32),
        # All weights fill more than a quarter of the memory; one layer with embedding and head does not.
        (False, 5e-4, False, torch.bfloat16),
        (False, 5e-4, True, torch.float32),
    ],
)
def test_slow_16_bit_products_are_computed_in_float32(
    fast: bool,
    gigabytes: float,
    stream: bool,
    expected: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    families.save(families.make_model("llama").bfloat16(), tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model", model="model")
    monkeypatch.setattr(loaded_model, "fast_products", lambda dtype, device: fast)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=gigabytes * 1e9, available=8e9))
    job = Job(checkpoint, runtime=Runtime(device="cpu", stream=stream))
    assert job.dtype == job.resident.model.dtype == expected
    if not stream:
        assert load_model(checkpoint, device=torch.device("cpu")).dtype == expected
    assert Job(checkpoint, runtime=Runtime(device="cpu", dtype="bfloat16")).dtype == torch.bfloat16


def test_float32_and_devices_other_than_the_cpu_are_fast() -> None:
    assert loaded_model.fast_products(torch.float32, torch.device("cpu"))
    assert loaded_model.fast_products(torch.bfloat16, torch.device("cuda"))
