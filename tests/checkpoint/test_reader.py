"""Reading gives what safetensors gives; everything that is wrong with a folder is said before a weight is read."""

from __future__ import annotations

import gc
import json
import mmap
import re
import struct
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file

from intarsia.checkpoint.files import DTYPES, let_go, read_headers
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError

Make = Callable[..., Path]


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, model=str(folder))


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
def test_tensors_equal_those_of_safetensors(saved: dict[str, Path], kind: str) -> None:
    expected: dict[str, torch.Tensor] = {}
    for file in saved[kind].glob("*.safetensors"):
        expected |= load_file(file)
    found = opened(saved[kind])
    assert set(found.headers) == set(expected)
    for name, tensor in expected.items():
        assert found.tensor(name).dtype == tensor.dtype
        assert torch.equal(found.tensor(name), tensor)
    files = [header.file.name for header in found.headers.values()]
    assert files == sorted(files)
    assert (len(set(files)) > 2) == (kind == "sharded")


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_every_dtype_is_read(tmp_path: Path, model: Make, dtype: torch.dtype) -> None:
    folder = model()
    tensors = load((folder / "model.safetensors").read_bytes())
    # A scalar, an empty tensor, odd sizes: what layers never have, and a checkpoint may.
    bits = torch.arange(7 * dtype.itemsize, dtype=torch.uint8) % (2 if dtype == torch.bool else 64)
    tensors |= {"extra.odd": bits.view(dtype), "extra.one": bits.view(dtype)[3].clone()}
    tensors["extra.none"] = torch.empty(0, 3, dtype=dtype)
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except KeyError:
        pytest.skip(f"this version of safetensors does not write {dtype}")
    found = opened(folder)
    for name in ("extra.odd", "extra.one", "extra.none"):
        assert found.tensor(name).dtype == dtype
        assert found.tensor(name).shape == tensors[name].shape
        assert torch.equal(found.tensor(name), tensors[name])
    for name in tensors:
        if tensors[name].dtype != dtype or not name.startswith("extra"):
            assert torch.equal(found.tensor(name), tensors[name])


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "wide": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    file = tmp_path / "a.safetensors"
    text = json.dumps(header).encode()
    write_raw(file, text + b" " * (-len(text) % 8), b"\x07" + struct.pack("<2f", 1.5, -2.0))
    headers = {entry.name: entry for entry in read_headers(file)}
    assert headers["wide"].start % 4
    # Only `headers` matters to tensor().
    checkpoint = Checkpoint(folder=tmp_path, model="", revision=None, config={}, architecture=None, headers=headers)  # type: ignore[arg-type]
    assert checkpoint.tensor("wide").tolist() == [1.5, -2.0]
    assert checkpoint.tensor("byte").tolist() == [7]


def test_reading_is_without_warnings_and_writing_stays_in_memory(model: Make) -> None:
    folder = model()
    before = (folder / "model.safetensors").read_bytes()
    tensor = opened(folder).tensor("model.norm.weight")
    tensor.zero_()
    assert float(tensor.abs().sum()) == 0
    del tensor
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_map_goes_with_the_tensor(saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    maps: list[weakref.ref[mmap.mmap]] = []
    sizes: list[int] = []

    class Watched(mmap.mmap):
        def __new__(cls, *args: Any, **kwargs: Any) -> Watched:
            made = super().__new__(cls, *args, **kwargs)
            maps.append(weakref.ref(made))
            sizes.append(len(made))
            return made

    monkeypatch.setattr("intarsia.checkpoint.files.mmap.mmap", Watched)
    found = opened(saved["single"])
    tensor = found.layer_tensor(1, "mlp.up_proj.weight")
    row = tensor[3]
    assert tensor.shape == (40, 32)
    assert sizes[0] < 40 * 32 * 4 + mmap.ALLOCATIONGRANULARITY
    del tensor
    gc.collect()
    assert maps[0]() is not None  # a view still needs it
    del row
    gc.collect()
    assert maps[0]() is None


def test_counts(saved: dict[str, Path], model: Make) -> None:
    single, tied = opened(saved["single"]), opened(saved["tied"])
    layer = single.architecture.layer_parameters
    assert single.parameters == 3 * layer + 2 * 48 * 32 + 32
    assert single.nbytes == 4 * single.parameters
    assert tied.parameters == 3 * tied.architecture.layer_parameters + 48 * 32 + 32
    assert sorted(single.outside_names()) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]

    folder = model("tied")
    tensors = load((folder / "model.safetensors").read_bytes())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    twice = opened(folder)
    assert twice.parameters == tied.parameters
    assert twice.nbytes == tied.nbytes + 48 * 32 * 4


def test_file_that_shrinks_after_opening(model: Make) -> None:
    folder = model()
    found = opened(folder)
    last = list(found.headers)[-1]
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="has shrunk"):
        found.tensor(last)


# ---- folders that cannot be used


def refused(folder: Path, *patterns: str) -> UserError:
    with pytest.raises(UserError) as caught:
        opened(folder)
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), str(caught.value)
    return caught.value


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "does not exist")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file, not a model folder")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("pytorch_model.bin", "pickled weights.*save_pretrained"),
        ("m.Q4.gguf", "GGUF.*Give the file itself: .*m.Q4.gguf"),
        ("consolidated.safetensors", "but consolidated.safetensors"),
        (None, "no weights"),
    ],
)
def test_no_safetensors_weights(model: Make, name: str | None, found: str) -> None:
    folder = model()
    (folder / "model.safetensors").unlink()
    if name:
        (folder / name).write_bytes(b"x")
    refused(folder, found)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe{}", b"3", b"[" * 100_000, None])
def test_invalid_config(model: Make, text: bytes | None) -> None:
    folder = model()
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_bytes(text)
    refused(folder, "config.json: expected a file with one JSON object")


def test_all_problems_of_a_folder_come_together(model: Make) -> None:
    folder = model("sharded")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    (folder / "config.json").write_text("{")
    error = refused(
        folder, f"{shards[0].name}.*this shard of the index is missing", f"{shards[1].name}.*truncated", "config.json"
    )
    assert len(error.problems) == 3


def test_adapter_and_quantised(model: Make, tmp_path: Path) -> None:
    folder = model()
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    refused(folder, "quantization_config describes gptq weights")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(adapter, "PEFT adapter.*merge_and_unload")


def test_unknown_family_and_wrong_shapes(model: Make) -> None:
    folder = model()
    edit(folder / "config.json", intermediate_size=41)
    error = refused(folder, r"gate_proj.weight: expected shape \[41, 32\] by the config; found shape \[40, 32\]")
    assert len(error.problems) == 9
    edit(folder / "config.json", model_type="unheard-of")
    refused(folder, "has no model type 'unheard-of'")


def test_missing_layer_and_missing_head(model: Make) -> None:
    folder = model()
    file = folder / "model.safetensors"
    tensors = load(file.read_bytes())
    head = tensors.pop("lm_head.weight")
    save_file(tensors, file)
    refused(folder, "lm_head.weight is missing, .*does not tie it")
    save_file({**tensors, "lm_head.weight": head[:-1].clone()}, file)
    refused(folder, r"lm_head.weight has shape \[47, 32\]")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file({**tensors, "lm_head.weight": head}, file)
    refused(folder, "model.layers.2.mlp.up_proj.weight: .*no such tensor")


def test_integer_weights_are_refused(model: Make) -> None:
    folder = model()
    file = folder / "model.safetensors"
    tensors = load(file.read_bytes())
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file)
    refused(folder, f"{name} is stored in int8")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_truncated_single_file(model: Make, keep: float) -> None:
    folder = model()
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refused(folder, "truncated or damaged")


def test_trailing_bytes(model: Make) -> None:
    file = model() / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    refused(file.parent, "truncated or damaged")


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, [], {"a": 3}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": "model.bin"}],
)
def test_bad_index(model: Make, weight_map: Any) -> None:
    folder = model("sharded")
    edit(folder / "model.safetensors.index.json", weight_map=weight_map)
    refused(folder, "index.json: (weight_map|a)")


def test_index_that_places_tensors_wrongly(model: Make) -> None:
    folder = model("sharded")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))[:2]
    moved = next(name for name, shard in weight_map.items() if shard == first)
    edit(index, weight_map={**weight_map, moved: second})
    refused(folder, f"{second} lacks {moved}")


# ---- headers that lie


def write_raw(file: Path, header: Any, data: bytes, *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, *, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 9)},
        {"a": entry(0, 10**18)},
        {"a": entry(0, 5), "b": entry(4, 8)},
        {"a": entry(0, 8), "b": entry(0, 8)},
        {"a": entry(0, 3), "b": entry(4, 8)},
        {"a": entry(0, 7)},
        {},
        {"a": entry(0, 8, dtype="F4")},
        {"a": entry(0, 8, dtype=["F32"])},
        {"a": entry(0, 8, dtype="F32", shape=[3])},
        {"a": entry(0, 8, shape=[-8])},
        {"a": entry(0, 8, shape=[8.0])},
        {"a": entry(0, 8, shape=[True, 8])},
        {"a": entry(0, 8, shape="8")},
        {"a": entry(0, 0, shape=[0, 10**30]), "b": entry(0, 8)},
        {"a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 0]}},
        {"a": {"dtype": "U8", "shape": [8], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "U8", "shape": [8], "data_offsets": [0]}},
        {"a": {"dtype": "U8", "shape": [8]}},
        {"a": 3},
        [1],
        b"{",
        b"\xff\xff",
        b"[" * 100_000,
    ],
)
def test_lying_header(tmp_path: Path, header: Any) -> None:
    file = tmp_path / "model.safetensors"
    write_raw(file, header, bytes(8))
    with pytest.raises(UserError, match=r"truncated or damaged|none of the known dtypes"):
        read_headers(file)


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 1])
def test_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    file = tmp_path / "model.safetensors"
    write_raw(file, {"a": entry(0, 8)}, bytes(8), length=length)
    with pytest.raises(UserError, match="header"):
        read_headers(file)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match="a readable file"):
        read_headers(tmp_path / "model.safetensors")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors"
    write_raw(
        file, {"__metadata__": {"format": "pt"}, "a": entry(0, 4), "b": entry(4, 8, dtype="F32", shape=[1])}, bytes(8)
    )
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        headers = read_headers(file)
    except UserError:
        return
    assert all(header.start + header.nbytes <= file.stat().st_size for header in headers)


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages as Linux does")
def test_pages_that_are_let_go_of_leave_memory_and_come_back(tmp_path: Path) -> None:
    values = torch.arange(2**23, dtype=torch.float32)
    save_file({"w": values}, tmp_path / "w.safetensors")
    (header,) = read_headers(tmp_path / "w.safetensors")
    process, mapped = psutil.Process(), header.tensor()
    assert torch.equal(mapped, values)
    touched = process.memory_info().shared
    let_go(mapped.view(2, -1))
    let_go(values)
    assert touched - process.memory_info().shared > 0.9 * mapped.nbytes
    assert torch.equal(mapped, values), "it is read from the file again, and what is not mapped stays"
