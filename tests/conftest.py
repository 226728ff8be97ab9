"""Tiny models of every family, made once a session."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia import registry
from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint.reader import Checkpoint
from tests import families

REPRESENTATIVE = {"llama", "qwen3", "gemma3", "opt", "mixtral", "gpt-neox"}
"""One family of each kind: plain, QK-norm, sliding with post-norms, biases, experts, parallel residual."""


@contextmanager
def registry_restored() -> Iterator[None]:
    """What is registered in the block is forgotten after it."""
    assert all(kind.names for kind in registry.KINDS)  # what is built in is found now, and stays known after the block
    registered: list[dict[str, Any]] = [*(kind._entries for kind in registry.KINDS), registry._LOADED]
    known = [(each, dict(each)) for each in registered]
    try:
        yield
    finally:
        for changed, before in known:
            changed.clear()
            changed.update(before)


@pytest.fixture
def own_registry() -> Iterator[None]:
    """What the test registers is forgotten after it."""
    with registry_restored():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases",
        choices=("quick", "rest", "all"),
        default="quick",
        help="quick: the representative families; rest: other families and tests marked `exhaustive`; all: both",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the cases that --cases names."""
    cases = config.getoption("--cases")
    if cases == "all":
        return
    others = {*families.FAMILIES, *families.VARIATIONS} - REPRESENTATIVE

    def quick(item: pytest.Item) -> bool:
        if item.get_closest_marker("exhaustive") is not None:
            return False
        params = (
            item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
        )
        return not any(isinstance(value, str) and value in others for value in params)

    selected = [item for item in items if quick(item) == (cases == "quick")]
    config.hook.pytest_deselected(items=[item for item in items if quick(item) != (cases == "quick")])
    items[:] = selected


def pytest_collection_finish() -> None:
    """What was imported stays: from now on garbage is looked for in what tests make."""
    gc.freeze()


Folder = Callable[[str], Path]
Opened = Callable[[str], Checkpoint]
InMemory = Callable[[str], LoadedModel]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Gives the checkpoint folder of a tiny model of a family. Tests must not change it."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda family: families.save(families.make_model(family), root / family))


@pytest.fixture(scope="session")
def checkpoint_of(model_folder: Folder) -> Opened:
    """Gives the opened checkpoint of a tiny model of a family."""
    return cache(lambda family: Checkpoint.open(model_folder(family), model=str(model_folder(family))))


@pytest.fixture(scope="session")
def resident_of(checkpoint_of: Opened) -> InMemory:
    """Gives a tiny model of a family in memory, for tests that leave it as it is."""
    return cache(lambda family: LoadedModel(checkpoint_of(family), device=torch.device("cpu")))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of about 15,000 tokens."""
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(families.sample_text(5000, seed=1), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _same_dtype_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of 16 bits are computed in 16 bits, also where that is slow."""
    from intarsia.building import loaded_model

    monkeypatch.setattr(loaded_model, "fast_products", lambda dtype, device: True)
