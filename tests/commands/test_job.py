"""What the parts of a command share: the text in three parts, the target, the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.commands.job import Job, check_text, pin_text, target_depth
from intarsia.data.corpus import Corpus
from intarsia.data.parts import TextParts
from intarsia.data.text import load_corpus
from intarsia.errors import UserError
from intarsia.options import Runtime, Target, TextSpec
from intarsia.run_dir import RunDir
from tests import families
from tests.conftest import Folder, Opened
from tests.data.letters import Letters


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def sequences(*parts: Corpus | None) -> list[tuple[int, ...]]:
    return [tuple(row) for part in parts if part is not None for row in part.input_ids.tolist()]


def depth_for(checkpoint: Any, **target: Any) -> int:
    return target_depth(Target(**target), checkpoint.architecture, checkpoint.parameters)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{name}.txt" for name in "abc"]
    for i, path in enumerate(paths):
        path.write_text("".join(chr(300 * (i + 1) + j) * 4 for j in range(100)), encoding="utf-8")
    return [str(path) for path in paths]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("tokens", [40, 92, 96])
def test_three_disjoint_parts_of_files(files: list[str], number: int, tokens: int) -> None:
    spec = TextSpec(sources=tuple(files[:number]), tokens=tokens, seq_len=4, seed=3)
    parts = TextParts(spec, Letters())
    found = sequences(parts.calibration, parts.selection, parts.test)
    assert len(found) == tokens // 4 + 2 * max(tokens // 32, 1) == len(set(found))
    assert (
        parts.calibration.sha256 == load_corpus(list(spec.sources), Letters(), tokens=tokens, seq_len=4, seed=3).sha256
    )


def test_a_source_without_more_text_has_no_held_out_parts(files: list[str]) -> None:
    parts = TextParts(TextSpec(sources=(files[0],), tokens=400, seq_len=4), Letters())
    assert len(parts.calibration) == 100 and parts.test is None and parts.selection is None
    with pytest.raises(UserError, match="at least 404 tokens"):
        _ = TextParts(TextSpec(sources=(files[0],), tokens=404, seq_len=4), Letters()).calibration
    with pytest.raises(UserError, match="for 3 sources"):
        TextParts(TextSpec(sources=tuple(files), tokens=8, seq_len=4), Letters())


@pytest.mark.parametrize("mixed", [False, True])
def test_text_that_the_model_writes_has_held_out_parts_too(mixed: bool, text_file: Path) -> None:
    model = families.make_model("llama")

    def drawn(seed: int) -> list[Corpus]:
        sources = ("self", str(text_file)) if mixed else ("self",)
        spec = TextSpec(sources=sources, tokens=256, seq_len=16, seed=seed)
        parts = TextParts(spec, families.make_tokenizer(), writer=lambda: model)
        assert parts.test is not None and parts.selection is not None
        return [parts.calibration, parts.test, parts.selection]

    calibration, test, selection = drawn(0)
    assert [len(calibration), len(test), len(selection)] == [16, 2, 2]
    found = sequences(calibration, test, selection)
    assert len(found) == len(set(found))
    # What one seed is tested on is not what another calibrates with.
    assert not set(sequences(drawn(1)[0])) & set(sequences(test, selection)) - set(sequences(calibration))


def test_a_run_knows_its_text_by_its_tokens(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    def job(source: str | Path, **how: Any) -> Job:
        spec = TextSpec(sources=(str(source),), tokens=256, seq_len=16)
        return Job(str(model_folder("llama")), spec, Runtime(device="cpu", **how))

    run = RunDir(tmp_path / "run")
    copy, other = tmp_path / "copy.txt", tmp_path / "other.txt"
    copy.write_text(text_file.read_text())
    other.write_text(families.sample_text(5000, seed=7))
    with run.opened({}):
        pin_text(run, job(text_file))
        pin_text(run, job(copy, batch_tokens=16))
        with pytest.raises(UserError, match="started with sources"):
            check_text(run, job(other))
        with pytest.raises(UserError, match="started with sources"):
            check_text(run, job("self"))
    with pytest.raises(UserError, match="read anew for every token"):
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
