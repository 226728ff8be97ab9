"""What the parts of a command share: the text in three parts, the target, the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.commands.job import Job, calibration_of, pin_text, target_depth
from intarsia.errors import UserError
from intarsia.options import Runtime, Target, TextSpec
from intarsia.run_dir import RunDir
from tests import families
from tests.conftest import Folder, Opened


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def depth_for(checkpoint: Any, **target: Any) -> int:
    return target_depth(Target(**target), checkpoint.architecture, checkpoint.parameters)


def test_a_run_knows_its_text_by_its_tokens(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    def job(source: str | Path, **how: Any) -> Job:
        spec = TextSpec(sources=(str(source),), tokens=256, seq_len=16)
        return Job(str(model_folder("llama")), spec, Runtime(device="cpu", **how))

    run = RunDir(tmp_path / "run")
    copy, other = tmp_path / "copy.txt", tmp_path / "other.txt"
    copy.write_text(text_file.read_text())
    other.write_text(families.sample_text(5000, seed=7))
    assert calibration_of(run, job(text_file)) == str(text_file)
    with run.opened({"calibration": str(text_file)}):
        pin_text(run, job(text_file))
        assert calibration_of(run, job(copy, batch_tokens=16)) == str(text_file)
        pin_text(run, job(copy))
        assert calibration_of(run, job(other)) == str(other)
        assert calibration_of(run, job("self")) == "self"
        with pytest.raises(UserError, match="started with sha256"):
            pin_text(run, job(other))
    with pytest.raises(UserError, match="read all layers for every token"):
        _ = job("self", stream=True).text


def test_a_job_loads_its_model_once(model_folder: Folder) -> None:
    job = Job(str(model_folder("llama")), TextSpec(seq_len=16, tokens=16), Runtime(device="cpu", dtype="float32"))
    assert not job.in_memory and job.resident is job.resident and job.in_memory
    assert job.resident.model.dtype == torch.float32
    job.release()
    assert not job.in_memory


@pytest.mark.parametrize(
    ("text", "runtime", "message"),
    [
        ({"seq_len": 2 * families.POSITIONS, "tokens": 10**5}, {}, "the model has 1024 positions"),
        ({}, {"device": "gpu"}, "There is no device 'gpu'"),
        ({}, {"devices": ("cpu", "tpu9")}, "There is no device 'tpu9'"),
    ],
)
def test_what_cannot_be(model_folder: Folder, text: Any, runtime: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Job(str(model_folder("llama")), TextSpec(**text), Runtime(**runtime))


@pytest.mark.parametrize("layers", range(1, families.DEPTH))
def test_layers_are_taken_as_they_are(layers: int, checkpoint_of: Opened) -> None:
    assert depth_for(checkpoint_of("llama"), layers=layers) == layers


@settings(deadline=None)  # the first of a family is made on the way
@given(sparsity=st.floats(0.001, 0.999), family=st.sampled_from(families.FAMILIES))
def test_the_greatest_depth_that_removes_at_least_the_share(
    checkpoint_of: Opened, sparsity: float, family: str
) -> None:
    checkpoint = checkpoint_of(family)
    share = checkpoint.architecture.layer_parameters / checkpoint.parameters
    enough = [depth for depth in range(1, families.DEPTH) if (families.DEPTH - depth) * share >= sparsity - 1e-9]
    if enough:
        assert depth_for(checkpoint, sparsity=sparsity) == max(enough)
    else:
        with pytest.raises(UserError, match="all layers but one hold"):
            depth_for(checkpoint, sparsity=sparsity)


@pytest.mark.parametrize("removed", range(1, families.DEPTH))
def test_the_exact_share_of_some_layers_is_reached(removed: int, checkpoint_of: Opened) -> None:
    checkpoint = checkpoint_of("llama")
    sparsity = removed * checkpoint.architecture.layer_parameters / checkpoint.parameters
    assert depth_for(checkpoint, sparsity=sparsity) == families.DEPTH - removed


@pytest.mark.parametrize(
    "target", [{"layers": 0}, {"layers": 6}, {"sparsity": 0.0}, {"sparsity": 30.0}, {"layers": 3, "sparsity": 0.3}, {}]
)
def test_a_target_that_cannot_be_reached(target: Any, checkpoint_of: Opened) -> None:
    with pytest.raises(UserError):
        depth_for(checkpoint_of("llama"), **target)
