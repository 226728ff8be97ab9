"""Mutated recipe files: a `UserError` or a valid recipe, never another exception."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from intarsia.architecture.spec import Architecture
from intarsia.data_file import dump_yaml, parse_yaml
from intarsia.errors import UserError
from intarsia.recipe.schema import content_hash, load, save
from intarsia.recipe.validate import check

SEED = """\
version: 1
variants:
  base: {model: demo, revision: main, sha256: %s}
  math: {model: org/math}
base: base
depth: 6
layers:
- select: 0
- select: math:1
- concat:
    norm: fold
    cuts:
    - {from: 2, kv_groups: [0, 2], channels: "0-3, 7", weights: {attention: 0.5, mlp: 0.25}}
    - {from: math:3, kv_groups: 1, channels: {tensor: c}, weights: {attention: 0.5, mlp: 0.75}}
- merge: {method: linear, from: [4, math:5], weights: [0.5, 0.5]}
spans: [[0, 1], [1, 2], [2, 4], [4, 6]]
tensors: {file: side.safetensors}
fitted: {3: [mlp.down_proj.weight]}
provenance: {planner: come, scores: [0.5, 1.0e-3], seed: 3}
""" % ("0a" * 32)

NASTY: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    6,
    7,
    2**31,
    2**63,
    -(10**30),
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "-1",
    "0-3",
    "3-0",
    "0-99999999",
    "base",
    "nobody:1",
    "base:",
    ":1",
    "base:1:2",
    "math:99",
    "c",
    "../x.safetensors",
    "\u2028",
    "\U0001f9e9",
    "x" * 5000,
    [],
    [[]],
    [[[[1]]]],
    [0, 0, 0],
    {},
    {"tensor": "c"},
    {"tensor": "fitted.3.mlp.down_proj.weight"},
    {"from": 1},
    {"select": 1},
    {1: 2},
    {"attention": 1, "mlp": 1},
]
SNIPPETS = [
    "", "\n", "  ", "\t", ":", "- ", "[", "]", "{", "}", "'", '"', "&a ", "*a", "!!int ", "<<: ", "#", "? ", "|", ">",
    "%", "\0", "\ufeff", "\x85", "---\n", "...\n", "NaN", ".nan", ".inf", "1e999", "-0", "0x10", "1_000", "1:30", "~",
    "yes", "9" * 700, "2024-01-01", "version: 1\n", "layers: []\n", "\\ud800", '"\\ud800"',
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutations")
    down = np.zeros((48, 8), dtype=np.float32)
    save_file(
        {"c": np.array([0, 1, 2], dtype=np.int32), "fitted.3.mlp.down_proj.weight": down}, folder / "side.safetensors"
    )
    return folder


def outcome(text: str, folder: Path, architecture: Architecture) -> bool:
    """Whether the text is a valid recipe; one that is also survives being saved."""
    path = folder / "mutated.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    longest = 0
    try:
        recipe = load(path)
        check(recipe, {variant.name: architecture for variant in recipe.variants})
    except UserError as error:
        longest = max(len(str(problem)) for problem in error.problems)
    assert longest < 10_000, "nobody reads such a message"
    if longest:
        return False
    save(recipe, folder / "again.yaml")
    assert content_hash(load(folder / "again.yaml")) == content_hash(recipe)
    return True


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a nested value."""
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutate(value: Any, rng: random.Random) -> Any:
    """One random change somewhere in a nested value."""
    container, key = rng.choice(places(value) or [([value], 0)])
    kind = rng.choice(["delete", "nasty", "copy", "wrap", "rename", "duplicate"])
    if kind == "delete":
        del container[key]
    elif kind == "nasty":
        container[key] = copy.deepcopy(rng.choice(NASTY))
    elif kind == "copy":
        other, place = rng.choice(places(value))
        container[key] = copy.deepcopy(other[place])
    elif kind == "wrap":
        container[key] = rng.choice([[container[key]], {"a": container[key]}, str(container[key])])
    elif isinstance(container, dict):
        name = rng.choice(["a", 3, "layers", "select", "from", ""])
        container[name] = copy.deepcopy(container[key]) if kind == "duplicate" else container.pop(key)
    else:
        container.insert(rng.randint(0, len(container)), copy.deepcopy(container[key]))
    return value


def mutate_text(text: str, rng: random.Random) -> str:
    start = rng.randint(0, len(text))
    stop = min(len(text), start + rng.choice([0, 1, 2, 10, 60]))
    kind = rng.choice(["insert", "delete", "duplicate", "replace"])
    middle = {
        "insert": rng.choice(SNIPPETS) + text[start:stop],
        "delete": "",
        "duplicate": text[start:stop] * rng.choice([2, 3]),
        "replace": rng.choice(SNIPPETS),
    }[kind]
    return text[:start] + middle + text[stop:]


def test_seed_is_valid(folder: Path, architecture: Architecture) -> None:
    assert outcome(SEED, folder, architecture)
    assert outcome(dump_yaml(parse_yaml(SEED)), folder, architecture)


def test_mutated_structures(folder: Path, architecture: Architecture) -> None:
    @settings(deadline=None)
    @given(st.randoms(use_true_random=False), st.integers(1, 3))
    def run(rng: random.Random, times: int) -> None:
        value = parse_yaml(SEED)
        for _ in range(times):
            value = mutate(value, rng)
        text = dump_yaml(value) if rng.random() < 0.7 else json.dumps(value, default=str)
        outcome(text, folder, architecture)

    run()


def test_mutated_text(folder: Path, architecture: Architecture) -> None:
    @settings(deadline=None)
    @given(st.randoms(use_true_random=False), st.integers(1, 3))
    def run(rng: random.Random, times: int) -> None:
        text = SEED
        for _ in range(times):
            text = mutate_text(text, rng)
        outcome(text, folder, architecture)

    run()


@pytest.mark.parametrize("index", range(len(NASTY)))
def test_every_nasty_value_in_every_fourth_place(folder: Path, architecture: Architecture, index: int) -> None:
    for number in range(index % 4, len(places(parse_yaml(SEED))), 4):
        value = parse_yaml(SEED)
        container, key = places(value)[number]
        container[key] = NASTY[index]
        outcome(dump_yaml(value), folder, architecture)


def test_every_key_missing(folder: Path, architecture: Architecture) -> None:
    valid = []
    for number in range(len(places(parse_yaml(SEED)))):
        value = parse_yaml(SEED)
        container, key = places(value)[number]
        del container[key]
        if outcome(dump_yaml(value), folder, architecture):
            valid.append(key)
    assert {"revision", "sha256", "norm", "method", "spans", "provenance"} <= set(valid)
    assert not {"version", "variants", "base", "depth", "layers", "from", "cuts", "channels", "tensors"} & set(valid)


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_any_text(text: str, folder: Path, architecture: Architecture) -> None:
    assert not outcome(text, folder, architecture)
