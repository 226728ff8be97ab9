"""Folders that are damaged or odd in any way: exit code 0 with an output that passes `verify`, or 2; the input stays.

python -m tests.test_mutations 5000        # as many mutations, from seed 0
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from intarsia.recipe import schema
from intarsia.recipe.recipe import LayerRef, Select, Variant
from tests import families
from tests.command import LITTLE, invoke
from tests.recipes_by_hand import recipe_of, select

peft = pytest.importorskip("peft")

QUICK, MORE = 15, 500
INDEX = "model.safetensors.index.json"
FILES = ("config.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "weights")
VALUES: tuple[Any, ...] = (None, -1, 0, 1, 3, 2.5, 1e40, "", "fancy", True, False, [], [1], {}, {"type": "fancy"})


def places(value: Any, path: tuple[Any, ...] = (), most: int = 400) -> list[tuple[Any, ...]]:
    """Where something stands in a JSON value; of long lists the first few entries."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key in list(value)[:most]:
            found += places(value[key], (*path, key), most)
    elif isinstance(value, list):
        for index in range(min(len(value), 4)):
            found += places(value[index], (*path, index), most)
    return found


def mutated(value: Any, rng: random.Random) -> Any:
    """Another value in the place of one."""
    others: list[Callable[[], Any]] = [lambda: rng.choice(VALUES)]
    if isinstance(value, int | float) and not isinstance(value, bool):
        others += [lambda: value + 1, lambda: value - 1, lambda: value * 2, lambda: str(value)]
    if isinstance(value, list):
        others += [lambda: value[:-1], lambda: [*value, *value[-1:]], lambda: value * 2]
    return rng.choice(others)()


def change_json(file: Path, rng: random.Random) -> str:
    data = json.loads(file.read_text(encoding="utf-8"))
    where = rng.choice(places(data))
    holder = data
    for step in where[:-1]:
        holder = holder[step]
    if rng.random() < 0.3:
        del holder[where[-1]]
        what = "removed"
    else:
        holder[where[-1]] = mutated(holder[where[-1]], rng)
        what = repr(holder[where[-1]])[:60]
    file.write_text(json.dumps(data), encoding="utf-8")
    return f"{file.name} {'.'.join(map(str, where))}: {what}"


def change_weights(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    kind = rng.choice(("header", "header", "cut", "byte", "length"))
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:  # damaged by another mutation
        kind = "cut" if kind == "header" else kind
    if kind == "header":
        name = rng.choice(list(header))
        if rng.random() < 0.4:
            header[f"{name}.other"] = header.pop(name)
        else:
            where = rng.choice(places(header[name]) or [()])
            if where:
                holder = header[name]
                for step in where[:-1]:
                    holder = holder[step]
                holder[where[-1]] = mutated(holder[where[-1]], rng)
        text = json.dumps(header).encode()
        data = bytearray(len(text).to_bytes(8, "little") + text + data[8 + size :])
    elif kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "byte":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        data[:8] = rng.randrange(2**40).to_bytes(8, "little")
    file.write_bytes(data)
    return f"weights: {kind}"


def change(folder: Path, kind: str, rng: random.Random) -> str:
    """Change one thing in a folder; what it was."""
    files = {"whole": FILES, "sharded": (*FILES, INDEX, INDEX), "adapter": ("adapter_config.json",) * 4 + ("weights",)}
    name = rng.choice(files[kind])
    if name == "weights":
        return change_weights(rng.choice(sorted(folder.glob("*.safetensors"))), rng)
    return change_json(folder / name, rng)


def state(folder: Path) -> dict[str, str]:
    return {str(file): sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()}


def models(place: Path) -> dict[str, Path]:
    """A model in one file, one in several, and an adapter for it."""
    whole = families.save(families.make_model("llama"), place / "whole", chat=True)
    sharded = Path(shutil.copytree(whole, place / "sharded"))
    (sharded / "model.safetensors").unlink()
    families.make_model("llama").save_pretrained(sharded, max_shard_size="30KB")
    base: Any = families.make_model("llama")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(place / "adapter")
    return {"whole": whole, "sharded": sharded, "adapter": place / "adapter"}


def of_adapter(base: Path, adapter: Path, file: Path) -> Path:
    """A recipe with layers of an adapter and of its base, written to a file."""
    variants = (Variant(name="base", model=str(base)), Variant(name="tuned", model=str(adapter)))
    layers = [select(0), Select(source=LayerRef(variant="tuned", layer=2)), select(5)]
    whole = recipe_of(str(base), layers)
    schema.save(replace(whole, variants=variants), file)
    return file


def fault(originals: dict[str, Path], text: Path, place: Path, seed: int) -> str | None:
    """What is wrong with how a command takes a mutation; None if nothing is."""
    rng = random.Random(seed)
    kind = rng.choice(("whole", "whole", "whole", "sharded", "adapter"))
    folder, out = Path(shutil.copytree(originals[kind], place / "model")), place / "out"
    what = "; ".join(change(folder, kind, rng) for _ in range(rng.choice((1, 1, 2))))
    if kind == "adapter":
        words: list[Any] = ["build", of_adapter(originals["whole"], folder, place / "r.yaml"), "-o", out, "-q"]
    else:
        small = ("--layers", 4, "--method", "shortgpt", "--calibration", text, "--tokens", 256, "--seq-len", 32, "-q")
        how = rng.choice(((), ("--stream",)))
        words = ["compress", folder, "-o", out, *small, *how, "--heal", "none", *LITTLE]
    before = state(folder)
    done = invoke(*words)
    said = done.stderr[-400:]
    shown = f"seed {seed}, {kind}: {what} {'--stream' if '--stream' in words else ''}: "
    if done.exit_code not in (0, 2) or "Traceback" in done.output:
        return f"{shown}exit code {done.exit_code}: {said}"
    if state(folder) != before:
        return f"{shown}the input was changed"
    if done.exit_code == 2:
        return f"{shown}an output is there: {said}" if out.exists() else None
    verified = invoke("verify", out)
    return None if verified.exit_code == 0 else f"{shown}its output fails verify: {verified.output[-900:]}"


def run(seeds: range, folder: Path) -> list[str]:
    """The faults of many mutations."""
    originals = models(folder)
    text = folder / "text.txt"
    text.write_text(families.sample_text(800, seed=1), encoding="utf-8")
    faults = []
    for seed in seeds:
        place = folder / "place"
        place.mkdir()
        found = fault(originals, text, place, seed)
        shutil.rmtree(place)
        if found is not None:
            faults.append(found)
            print(found, flush=True)
        if (seed + 1) % 100 == 0:
            print(f"seeds up to {seed}: {len(faults)} faults", flush=True)
    return faults


@pytest.mark.parametrize("seeds", [range(QUICK), pytest.param(range(QUICK, MORE), marks=pytest.mark.exhaustive)])
def test_mutations(seeds: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run(seeds, tmp_path) == []


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        os.environ["INTARSIA_CACHE"] = str(Path(place) / "cache")
        first, stop = (0, int(sys.argv[1])) if len(sys.argv) == 2 else (int(sys.argv[1]), int(sys.argv[2]))
        found = run(range(first, stop), Path(place))
        print(f"{stop - first} mutations, {len(found)} faults")
        sys.exit(bool(found))
