"""NaN is found and named; the hash is over what the weights are, not over how they are filed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from intarsia.checkpoint import hashing as module
from intarsia.checkpoint.hashing import acting_config, scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from intarsia.progress import Progress, Task, reporting_to

Make = Callable[..., Path]


class Watched(Progress, Task):
    """Progress that counts."""

    def __init__(self) -> None:
        self.done = 0.0
        self.totals: list[float] = []

    @contextmanager
    def task(self, title: str, total: float, *, units: float | None = None) -> Iterator[Task]:
        self.totals.append(total)
        yield self

    def advance(self, n: float = 1.0) -> None:
        self.done += n

    def note(self, text: str) -> None:
        pass


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, model="m")


def poison(folder: Path, **values: float) -> None:
    tensors = load((folder / "model.safetensors").read_bytes())
    for name, value in values.items():
        tensors[name.replace("__", ".")].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors")


def test_hash_does_not_depend_on_shards(saved: dict[str, Path]) -> None:
    single, sharded = scan(opened(saved["single"])), scan(opened(saved["sharded"]))
    assert single == sharded
    assert re.fullmatch("[0-9a-f]{64}", single)
    assert scan(opened(saved["tied"])) != single


def test_hash_depends_on_name_dtype_shape_and_bytes(model: Make) -> None:
    folder = model()
    plain = load((folder / "model.safetensors").read_bytes())
    norm = plain["model.norm.weight"]
    changes = [
        {},
        {"model.norm.weight": norm + 1},
        {"model.norm.weight": norm.view(4, 8)},
        {"model.norm.weight": norm.view(torch.int32)},
        {"model.norm.weight": norm, "extra": torch.empty(0)},
    ]
    hashes = set()
    for change in changes:
        save_file({**plain, **change}, folder / "model.safetensors")
        hashes.add(scan(opened(folder)))
    assert len(hashes) == len(changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("chunk", [7, 2**22])
def test_not_finite(model: Make, monkeypatch: pytest.MonkeyPatch, value: float, chunk: int, cache: Path) -> None:
    monkeypatch.setattr(module, "_BLOCK", chunk)
    folder = model()
    scan(opened(folder))
    poison(folder, model__layers__1__mlp__up_proj__weight=value, model__norm__weight=value)
    remembered = sorted((cache / "scan").iterdir())
    with pytest.raises(UserError) as caught:
        scan(opened(folder))
    assert [problem.message.split(": ")[1].split()[0] for problem in caught.value.problems] == [
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ]
    assert "in 1 of 1,280 entries" in str(caught.value)
    assert sorted((cache / "scan").iterdir()) == remembered
    with pytest.raises(UserError):
        scan(opened(folder))


def test_only_the_first_few_are_named(model: Make) -> None:
    folder = model()
    poison(folder, **{name.replace(".", "__"): float("nan") for name in load_file(folder / "model.safetensors")})
    with pytest.raises(UserError) as caught:
        scan(opened(folder))
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_finite_numbers_are_fine(dtype: torch.dtype) -> None:
    # Their sum is infinite.
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert module.not_finite(largest) == 0
    largest[3] = float("nan")
    assert module.not_finite(largest) == 1


def test_integers_are_not_asked(model: Make) -> None:
    folder = model()
    tensors = load((folder / "model.safetensors").read_bytes())
    save_file({**tensors, "model.buffer": torch.full((4,), -1)}, folder / "model.safetensors")
    scan(opened(folder))


def test_second_scan_is_remembered(model: Make, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    folder = model("sharded")
    first = Watched()
    with reporting_to(first):
        digest = scan(opened(folder))
    assert first.done == first.totals[0] == opened(folder).nbytes

    def never(self: Checkpoint, name: str) -> torch.Tensor:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "tensor", never)
        assert scan(opened(folder)) == digest
    # Touched or changed files are read again.
    shard = next(folder.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    second = Watched()
    with reporting_to(second):
        assert scan(opened(folder)) == digest
    assert second.done == first.done
    for file in (cache / "scan").iterdir():
        file.write_text("{")
    assert scan(opened(folder)) == digest


def test_cache_that_cannot_be_written(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "file" / "below"))
    assert len(scan(opened(saved["single"]))) == 64


def test_what_of_a_config_changes_the_numbers() -> None:
    acting = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 1e4}, "unheard_of": 3}
    idle = {"torch_dtype": "bfloat16", "eos_token_id": 2, "attention_dropout": 0.1, "transformers_version": "5.0"}
    assert acting_config({**idle, **acting, "_name_or_path": "there", "use_cache": False}) == acting
