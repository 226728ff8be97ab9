"""The closed form inside the search, on tokens of the search's own examples, toward the same blend uncut.

A fit makes a candidate look better on what it was fitted to than elsewhere. So it takes examples from the end of the
order, and of texts windows are drawn for it that no budget of the search reaches. Where an objective's examples are
few, those of the largest budgets serve for both; items outside the splits are seen by neither. Each objective gives
the same number of windows, as far as it has them: a question with its right answer, a query with its target, one
after the other, or windows of text.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from intarsia.activations.batches import Batches
from intarsia.activations.loop import Loop
from intarsia.building.loaded_model import LoadedModel
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.healing.closed_form import fit
from intarsia.healing.layer_map import fit_forwards
from intarsia.healing.settings import ClosedFormSettings
from intarsia.healing.teacher import TeacherStates
from intarsia.healing.training import load_state, save_state
from intarsia.recipe import schema
from intarsia.recipe.algebra import reference_layers
from intarsia.recipe.recipe import Recipe
from intarsia.tailoring.objective import Objective

TOKENS = 16384
_SETTINGS = ClosedFormSettings()
_LEAST_WINDOWS = 2 * _SETTINGS.held_out  # so that something is held out, and more is not


def heal_windows(seq_len: int) -> int:
    """How many windows of one text a fit takes at most."""
    return TOKENS // seq_len


def heal_corpus(objectives: Sequence[Objective], *, seq_len: int, eos: int | None, tokens: int = TOKENS) -> Corpus:
    """Windows of the examples' tokens, objectives taking turns.

    Args:
        eos: stands between two examples, where there is one.
        tokens: about how many.

    Raises:
        UserError: the examples are too few for a fit.
    """
    wanted = max(tokens // seq_len // len(objectives), 1)
    parts = [list(_windows(objective, seq_len, eos, wanted)) for objective in objectives]
    order = sorted((place, number) for number, part in enumerate(parts) for place in range(len(part)))
    if len(order) < _LEAST_WINDOWS:
        raise UserError(
            f"The examples have {len(order) * seq_len} tokens; healing trials in closed form needs at least "
            f"{_LEAST_WINDOWS * seq_len}.",
            "Widen the splits, add an objective on a text, or set heal: none.",
        )
    ids = torch.tensor([parts[number][place] for place, number in order])
    names = ", ".join(objective.name for objective in objectives)
    return Corpus.of(ids, description=f"examples of {names}", documents=len(order))


def heal_trial(recipe: Recipe, model: LoadedModel, corpus: Corpus) -> Recipe:
    """A recipe with its output projections fitted toward what it would be with no layer removed."""
    teacher_layers = [model.module(op) for op in reference_layers(recipe)]
    with TeacherStates(Loop(model, Batches(corpus, model.device)), layers=teacher_layers) as teacher:
        return fit(recipe, teacher, settings=_SETTINGS)[0]


def heal_work(recipe: Recipe, model: LoadedModel, corpus: Corpus) -> float:
    """What that fit takes, in layer-forwards times tokens."""
    return float(fit_forwards(recipe, _SETTINGS, model.architecture) * corpus.tokens)


def _windows(objective: Objective, seq_len: int, eos: int | None, most: int) -> Iterator[list[int]]:
    """Full windows alone: what is left over at the end is not used."""
    waiting: list[int] = []
    for example in reversed(objective.examples):
        request = example.requests[example.gold or 0]
        tokens = [*request.context, *request.continuation]
        if len(tokens) == seq_len and not waiting:
            yield tokens
            most -= 1
        else:
            waiting += tokens if eos is None else [*tokens, eos]
        while len(waiting) >= seq_len and most > 0:
            yield waiting[:seq_len]
            waiting = waiting[seq_len:]
            most -= 1
        if most <= 0:
            return


class KeptFits:
    """Fitted tensors of trials in a folder, by the hash of the recipe; nothing is kept where there is no folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, recipe: Recipe) -> Recipe | None:
        """A recipe as it was healed before, if it was."""
        try:
            state = load_state(self._path(schema.content_hash(recipe)))
        except UserError:  # damaged; it is fitted again
            return None
        if state is None:
            return None
        fitted: dict[int, dict[str, npt.NDArray[np.float32]]] = {}
        for key, tensor in state[0].items():
            index, _, name = key.partition(" ")
            fitted.setdefault(int(index), {})[name] = tensor.numpy()
        return replace(recipe, fitted=fitted)

    def keep(self, recipe: Recipe, healed: Recipe) -> None:
        """Keep what was fitted. On a full disk nothing is kept, and the fit is made again."""
        if self._folder.is_dir():
            fitted = healed.fitted.items()
            tensors = {f"{i} {name}": torch.from_numpy(array) for i, arrays in fitted for name, array in arrays.items()}
            with suppress(UserError, OSError):
                save_state(self._path(schema.content_hash(recipe)), tensors, {})

    def keep_only(self, hashes: Collection[str]) -> None:
        """Delete the fits of all other recipes."""
        for path in self._folder.glob("*.safetensors"):
            if path.stem not in hashes:
                path.unlink(missing_ok=True)

    def start(self) -> None:
        """Make the folder: from now on fits are kept."""
        self._folder.mkdir(parents=True, exist_ok=True)

    def end(self) -> None:
        """Delete all of them."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"
