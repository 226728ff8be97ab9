"""Text and a recipe to heal, for any tiny model: two layers joined into one, and one removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands import heal as verb
from intarsia.commands.heal import HealedModel, HealResult, TrainingText
from intarsia.data.corpus import Corpus
from intarsia.healing.stages.end_to_end import EndToEndSettings
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.options import PerplexityTexts
from intarsia.recipe.recipe import Recipe
from tests import families
from tests.conftest import Opened
from tests.recipes_by_hand import recipe_of, select, shared

Cut = Callable[[str], tuple[Checkpoint, Recipe]]
Tokens = Callable[..., tuple[Corpus, Corpus]]

SEQ_LEN = 16
LAYERWISE = LayerwiseSettings(batch_tokens=128, evaluations=3, lr=3e-3)
WHOLE = EndToEndSettings(batch_tokens=128, micro_tokens=64, evaluations=3, lr=1e-3, lora=None, top_k=None)


def heal(
    source: Path,
    out: Path,
    data: str | Sequence[str],
    *,
    stages: Sequence[Any] = ("closed-form",),
    eval_text: Sequence[str] = (),
    teacher: str | None = None,
    run: Path | None = None,
    overwrite: bool = False,
    **text: int,
) -> HealResult:
    """`intarsia.heal` of little text, with little training."""
    quick = {"layerwise": LAYERWISE, "end-to-end": WHOLE}
    sources = (data,) if isinstance(data, str) else tuple(data)
    return verb.heal(
        source,
        HealedModel(path=out, run=run, overwrite=overwrite),
        TrainingText(**{"sources": sources, "tokens": 1024, "seq_len": 32, **text}),  # type: ignore[arg-type]
        stages=[quick.get(stage, stage) if isinstance(stage, str) else stage for stage in stages],
        teacher=teacher,
        evaluation=PerplexityTexts(text=tuple(eval_text), windows=(4,), answers=2, answer_tokens=8),
    )


@pytest.fixture(autouse=True)
def cache_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INTARSIA_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def cut(checkpoint_of: Opened) -> Cut:
    """Gives a tiny model and a recipe of four layers: 0, 1, pieces of 2 and 3, and 4 (which stands for 5 as well)."""

    def made(family: str) -> tuple[Checkpoint, Recipe]:
        checkpoint = checkpoint_of(family)
        joined = shared(checkpoint.architecture, (2, 3), seed=3)
        return checkpoint, recipe_of(str(checkpoint.folder), [select(0), select(1), joined, select(4)])

    return made


@pytest.fixture(scope="session")
def tokens() -> Tokens:
    """Gives random tokens to train on, and others to measure on."""

    def made(*, sequences: int = 24, held_out: int = 5, padded: bool = False, seed: int = 0) -> tuple[Corpus, Corpus]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, families.VOCABULARY, (sequences + held_out, SEQ_LEN), generator=generator)
        lengths = torch.randint(SEQ_LEN // 2, SEQ_LEN + 1, (len(ids), 1), generator=generator)
        mask = torch.arange(SEQ_LEN)[None, :] < lengths if padded else None
        parts = (slice(0, sequences), slice(sequences, None))
        train, rest = (
            Corpus.of(ids[part], mask=None if mask is None else mask[part], description="tokens", documents=1)
            for part in parts
        )
        return train, rest

    return made


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> tuple[Path, Recipe]:
    """A tiny model that has learnt a little of `text_file`, so that its perplexity means something; and a cut of it."""
    model = families.make_model("llama")
    tokenizer = families.make_tokenizer()
    ids = torch.tensor(tokenizer(text_file.read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        batch = windows[torch.randint(len(windows), (16,), generator=generator)]
        model(batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    folder = families.save(model.eval(), tmp_path_factory.mktemp("learned") / "llama")
    joined = shared(Checkpoint.open(folder, model=str(folder)).architecture, (2, 3), seed=3)
    return folder, recipe_of(str(folder), [select(0), select(1), joined, select(4)])
