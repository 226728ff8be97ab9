"""End-to-end training under FSDP: parameters in shards over two processes.

Accelerate shards on accelerators alone. So that it can be tested on the CPU its processes say that they have some; what
is sharded, gathered, saved and read again is the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from intarsia.healing.training import read_curve
from intarsia.recipe import schema
from tests.healing.conftest import Cut

pytestmark = pytest.mark.exhaustive
pytest.importorskip("accelerate")

ROOT = Path(__file__).resolve().parents[2]

PROCESS = """
import os
import sys

import accelerate.state as state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from intarsia.cli.main import main
from intarsia.healing import end_to_end

begin = state.AcceleratorState.__init__

def sharded(self, *args, **kwargs):
    if state.PartialState(cpu=True).distributed_type == DistributedType.MULTI_CPU:
        state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    begin(self, *args, **kwargs)

state.AcceleratorState.__init__ = sharded
save, saved = end_to_end.save_snapshot, []

def stops(accelerator, folder, facts):
    (model,) = accelerator._models
    parts = [part for part in model.parameters() if part.requires_grad]
    assert all(isinstance(part, DTensor) and part.to_local().numel() < part.numel() for part in parts)
    save(accelerator, folder, facts)
    saved.append(facts)
    if len(saved) == int(os.environ.get("STOP_AT", "0")):
        os._exit(9)

end_to_end.save_snapshot = stops
main()
"""


def heal(words: list[str], *, processes: int, stop_at: int = 0, kept: str = "FULL_STATE_DICT") -> int:
    """Runs `intarsia heal`; its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "STOP_AT": str(stop_at)}
    command = [sys.executable, "-m", "intarsia"]
    if processes > 1:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": kept}
        environment |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--no-python"]
        command = [sys.executable, *launch, sys.executable, "-c", PROCESS]
    done = subprocess.run(
        [*command, "heal", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert stop_at or done.returncode == 0, done.stderr
    return done.returncode


def words(cut: Cut, family: str, text_file: Path, folder: Path, *options: str) -> list[str]:
    """What a heal of a cut model is called with, up to where it is written to."""
    _, recipe = cut(family)
    schema.save(recipe, folder / "cut.yaml")
    given = [str(folder / "cut.yaml"), "--data", str(text_file), "--tokens", "1024", "--seq-len", "32", *options]
    given += [
        "--stages",
        "end-to-end",
        "--step-tokens",
        "128",
        "--lr",
        "1e-3",
        "--micro-tokens",
        "32",
        "--top-k",
        "none",
    ]
    return [*given, "--evaluations", "3", "--device", "cpu", "-o"]


def curve_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.heal") / "stages" / "1-end-to-end" / "curve.jsonl"


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen2", ["--checkpointing", "--lora", "none"]), ("llama", ["--lora", "4"])],
    ids=["tied", "low rank"],
)
def test_shards_are_as_one(family: str, options: list[str], cut: Cut, text_file: Path, tmp_path: Path) -> None:
    given = words(cut, family, text_file, tmp_path, *options)
    one, two = tmp_path / "one", tmp_path / "two"
    heal([*given, str(one)], processes=1)
    heal([*given, str(two)], processes=2)
    wanted, found = (read_curve(curve_of(out)) for out in (one, two))
    assert len(found) == len(wanted) > 6
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-3)
    ours, theirs = (load_file(out / "model.safetensors") for out in (two, one))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # A step of 1e-3 goes by the sign of a gradient where it is about nothing.
        assert (ours[name] - tensor).abs().mean() < 1e-5, name


def test_killed_and_started_again(cut: Cut, text_file: Path, tmp_path: Path) -> None:
    given = words(cut, "llama", text_file, tmp_path, "--lora", "none")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    heal([*given, str(whole)], processes=2, kept="SHARDED_STATE_DICT")
    assert heal([*given, str(killed)], processes=2, kept="SHARDED_STATE_DICT", stop_at=2) != 0
    assert len(list(curve_of(killed).parent.glob("state-*"))) == 1 and not killed.exists()
    heal([*given, str(killed)], processes=2, kept="SHARDED_STATE_DICT")
    assert curve_of(killed).read_text() == curve_of(whole).read_text()
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
