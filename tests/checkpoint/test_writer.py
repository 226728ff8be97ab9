"""What is written loads everywhere, and a folder appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from intarsia import disk
from intarsia.checkpoint import writer
from intarsia.checkpoint.files import TensorPlan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.writer import checkpoint_writer, copy_side_files, write_config
from intarsia.disk import check_out, staged_folder
from intarsia.errors import UserError

Make = Callable[..., Path]


def planned(tensors: dict[str, torch.Tensor]) -> list[TensorPlan]:
    return [TensorPlan(name=name, dtype=t.dtype, shape=tuple(t.shape)) for name, t in tensors.items()]


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "wide": torch.randn(5, 2, generator=generator),
        "none": torch.empty(0, 4),
        "turned": torch.randn(4, 6, generator=generator).T,
        "one": torch.tensor(7, dtype=torch.int64),
    }


def write(out: Path, tensors: dict[str, torch.Tensor], *, overwrite: bool = False, most: int = 10**9) -> None:
    with checkpoint_writer(out, planned(tensors), overwrite=overwrite, max_shard_bytes=most) as target:
        for name, tensor in tensors.items():
            target.write(name, tensor)
        (target.folder / "config.json").write_text("{}")


def nothing_left(folder: Path, *, but: tuple[str, ...] = ()) -> bool:
    return sorted(entry.name for entry in folder.iterdir() if entry.name != "cache") == sorted(but)


def test_single_file(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path / "out", tensors)
    assert sorted(os.listdir(tmp_path / "out")) == ["SHA256SUMS", "config.json", "model.safetensors"]
    file = tmp_path / "out" / "model.safetensors"
    found = load_file(file)
    assert set(found) == set(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    assert nothing_left(tmp_path, but=("out",))


def test_shards(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path / "out", tensors, most=45)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{number:05d}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    homes = {"half": 0, "byte": 0, "wide": 1, "none": 1, "turned": 2, "one": 3}
    assert index["weight_map"] == {name: shards[home] for name, home in homes.items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in tensors.values())
    found = {name: (shard, tensor) for shard in shards for name, tensor in load_file(tmp_path / "out" / shard).items()}
    assert {name: shard for name, (shard, _) in found.items()} == index["weight_map"]
    assert all(torch.equal(found[name][1], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("most", [10**9, 15_000, 1])
def test_a_model_that_is_copied_is_the_same_model(saved: dict[str, Path], tmp_path: Path, most: int) -> None:
    source = Checkpoint.open(saved["sharded"], model="m")
    plan = list(source.headers.values())
    with checkpoint_writer(tmp_path / "new" / "deep" / "out", plan, max_shard_bytes=most) as target:
        for entry in plan:
            target.write(entry.name, source.tensor(entry.name))
        write_config(source, range(3), target.folder)
        copy_side_files(source.folder, target.folder)
    out = tmp_path / "new" / "deep" / "out"
    assert len(list(out.glob("*.safetensors"))) == {10**9: 1, 15_000: 7, 1: len(plan)}[most]
    ids = torch.arange(12)[None]
    logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (saved["single"], out)]
    assert torch.equal(*logits)
    again = Checkpoint.open(out, model="m")
    assert all(torch.equal(again.tensor(name), source.tensor(name)) for name in source.headers)


def test_plan_is_kept_to(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(AssertionError, match="expected a"), checkpoint_writer(tmp_path / "o", planned(tensors)) as w:
        w.write("b", tensors["b"])
    with pytest.raises(AssertionError, match="planned"), checkpoint_writer(tmp_path / "o", planned(tensors)) as w:
        w.write("a", torch.zeros(3))
    with pytest.raises(AssertionError, match="planned"), checkpoint_writer(tmp_path / "o", planned(tensors)) as w:
        w.write("a", torch.zeros(2, dtype=torch.float16))
    with pytest.raises(AssertionError, match="1 planned"), checkpoint_writer(tmp_path / "o", planned(tensors)) as w:
        w.write("a", tensors["a"])
    assert nothing_left(tmp_path)


# ---- outputs that cannot be


def test_existing_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(UserError, match=r"exists already.*--overwrite"):
        write(out, some_tensors())
    assert (out / "mine").read_text() == "kept"
    (tmp_path / "file").write_text("kept")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is a file"):
            write(tmp_path / "file", some_tensors(), overwrite=overwrite)
    with pytest.raises(UserError):
        write(tmp_path / "file" / "below", some_tensors())
    assert nothing_left(tmp_path, but=("out", "file"))


def test_overwrite_replaces(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, some_tensors(0))
    (out / "stale").write_text("x")
    write(out, some_tensors(1), overwrite=True)
    assert sorted(os.listdir(out)) == ["SHA256SUMS", "config.json", "model.safetensors"]
    assert torch.equal(load_file(out / "model.safetensors")["wide"], some_tensors(1)["wide"])
    assert nothing_left(tmp_path, but=("out",))


def test_overwrite_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    write(tmp_path / "real", some_tensors(0))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", some_tensors(1), overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(load_file(tmp_path / "real" / "model.safetensors")["wide"], some_tensors(1)["wide"])


def test_overwrite_deletes_only_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "a.jpg").write_text("x")
    with pytest.raises(UserError, match=r"has no config.json"):
        check_out(out, overwrite=True)
    (out / "config.json").write_text("{}")
    check_out(out, overwrite=True)
    (out / "inside").mkdir()
    for here in (out, out / "inside"):
        monkeypatch.chdir(here)
        with pytest.raises(UserError, match="working directory"):
            check_out(out, overwrite=True)


def test_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, some_tensors(0))
    with pytest.raises(RuntimeError), staged_folder(out, overwrite=True):
        raise RuntimeError
    assert torch.equal(load_file(out / "model.safetensors")["wide"], some_tensors(0)["wide"])
    assert nothing_left(tmp_path, but=("out",))


def test_failed_rename_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, some_tensors(0))
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".staging-" in self.name:
            raise OSError(errno.EIO, "I/O error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="I/O"):
        write(out, some_tensors(1), overwrite=True)
    assert torch.equal(load_file(out / "model.safetensors")["wide"], some_tensors(0)["wide"])
    assert nothing_left(tmp_path, but=("out",))


def test_output_that_appears_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError), staged_folder(out):
        out.mkdir()
        (out / "theirs").write_text("x")
    assert (out / "theirs").exists()
    assert nothing_left(tmp_path, but=("out",))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interrupted(tmp_path: Path, error: type[BaseException]) -> None:
    tensors = some_tensors()
    with pytest.raises(error), checkpoint_writer(tmp_path / "new" / "out", planned(tensors)) as target:
        target.write("half", tensors["half"])
        raise error
    assert nothing_left(tmp_path)


# ---- full disks


def test_too_little_space_is_said_before_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20 + 100))
    with pytest.raises(UserError, match="MB of free disk space"):
        write(tmp_path / "new" / "out", some_tensors())
    assert nothing_left(tmp_path)
    check_out(tmp_path / "out", nbytes=100)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_fills_up_in_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    class Small(FileIO):
        def write(self, data: memoryview) -> int:  # type: ignore[override]
            if self.tell() + len(data) > 700:
                if self.tell() < 700:
                    return super().write(data[: 700 - self.tell()])
                raise OSError(code, "full")
            return super().write(data)

    monkeypatch.setattr(writer, "FileIO", Small)
    tensors = {f"t{i}": torch.ones(40) for i in range(10)}
    with pytest.raises(UserError, match=r"a full disk.*Nothing was left there"):
        write(tmp_path / "new" / "out", tensors)
    assert nothing_left(tmp_path)


def test_disk_fills_up_while_the_index_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    tensors = some_tensors()
    with (
        pytest.raises(UserError, match="a full disk"),
        checkpoint_writer(tmp_path / "out", planned(tensors), max_shard_bytes=1) as target,
    ):
        for name, tensor in tensors.items():
            target.write(name, tensor)
        monkeypatch.setattr(Path, "write_text", full)
    assert nothing_left(tmp_path)


def test_disk_fills_up_at_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="a full disk"):
        write(tmp_path / "out", some_tensors())
    assert nothing_left(tmp_path)


def test_other_errors_are_not_dressed_up(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), staged_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no")
    assert nothing_left(tmp_path)


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written to"):
        write(tmp_path / ("x" * 300), some_tensors())
    assert nothing_left(tmp_path)


# ---- what killed runs leave

_SLEEPER = """
import sys, time
from pathlib import Path
from intarsia.disk import staged_folder
with staged_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not locked there")
def test_killed_run_is_cleaned_up_and_a_live_one_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "o[u]t*"
    command = [sys.executable, "-c", _SLEEPER, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            with staged_folder(out) as other:
                names = {entry.name for entry in tmp_path.iterdir() if ".staging-" in entry.name}
                assert len(names) == 2
                assert other.name in names
        finally:
            process.send_signal(signal.SIGKILL)
    shutil.rmtree(out)
    left = [entry for entry in tmp_path.iterdir() if ".staging-" in entry.name]
    assert [(entry / "half").read_text() for entry in left] == ["x"]
    (tmp_path / ".other.staging-1234").mkdir()
    time.sleep(0.05)
    with staged_folder(out):
        pass
    assert nothing_left(tmp_path, but=(out.name, ".other.staging-1234"))


def test_run_killed_between_the_two_renames(tmp_path: Path) -> None:
    old = tmp_path / ".out.old-1234"
    old.mkdir()
    (old / "config.json").write_text("{}")
    with pytest.raises(UserError, match="exists already"), staged_folder(tmp_path / "out"):
        raise AssertionError("not reached")
    assert (tmp_path / "out" / "config.json").exists()
    (tmp_path / "out").rename(old)
    with staged_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert os.listdir(tmp_path / "out") == ["new"]
    assert nothing_left(tmp_path, but=("out",))


def test_locks_that_a_file_system_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_lock", lambda folder: None)
    (tmp_path / ".out.staging-1234").mkdir()
    write(tmp_path / "out", some_tensors())
    # Nobody knows whether that run is alive.
    assert nothing_left(tmp_path, but=("out", ".out.staging-1234"))


@pytest.mark.parametrize("name", ["model", "link", "model/inside", ".", "deep/../model"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_is_never_an_output(name: str, overwrite: bool, tmp_path: Path) -> None:
    """Neither by its name, nor through a link or a detour, nor by a folder in it or around it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "deep").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model", target_is_directory=True)
    with pytest.raises(UserError, match=r"is, contains or lies in the input .*model"):
        check_out(tmp_path / name, overwrite=overwrite, inputs=[tmp_path / "model"])
    with (
        pytest.raises(UserError, match="lies in the input"),
        staged_folder(tmp_path / name, overwrite=overwrite, inputs=[tmp_path / "link"]),
    ):
        pytest.fail("no work is done")
    check_out(tmp_path / "other", inputs=[tmp_path / "model", tmp_path / "gone"])
