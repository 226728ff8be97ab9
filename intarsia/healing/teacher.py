"""The teacher: hidden states by depth, the targets of layers, and logits, the targets of whole models.

`TeacherStates` depend on the model and the text alone, so several fits may share them, and a student starts at its
first layer that differs from the teacher's. If the whole model was measured before, its hidden states are reused.

Logits come from the teacher itself, or from its likeliest tokens, which are written to the run folder once, whole or
not at all, and memory-mapped from then on.

Shape suffixes: `N` sequences, `B` sequences of a batch, `T` tokens, `D` residual width, `K` kept tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import HiddenStore, MemoryBudget
from intarsia.activations.loop import Loop
from intarsia.activations.loss import Likeliest
from intarsia.activations.statistics import require_finite
from intarsia.architecture.spec import Architecture
from intarsia.building.loaded_model import LoadedModel, Placed
from intarsia.disk import staged_folder
from intarsia.errors import check
from intarsia.healing.stages.end_to_end import EndToEndSettings
from intarsia.healing.student import Lesson, SplitModel
from intarsia.healing.training import Text
from intarsia.progress import current
from intarsia.recipe.recipe import Recipe

_SIGN = "facts.json"
_ROWS = 256


class TeacherStates:
    """Hidden states by depth: 0 is the output of the embedding, b that of layer b - 1.

    Freed by `close`, or at the end of a `with` block.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        layers: Sequence[nn.Module] | None = None,
        known: HiddenStore | None = None,
        keep: bool = False,
    ) -> None:
        """Nothing is run yet; `learn` does that.

        Args:
            loop: over the text, of the original model.
            layers: of another teacher, between the original's embedding and head.
            known: hidden states of the teacher measured before; they must not change.
            keep: keep every depth on the way, for later fits that need others.
        """
        # Those of the teacher.
        self.layers: Sequence[nn.Module] = loop.resident.layers if layers is None else layers
        self.loop, self.resident, self.batches, self.keep = loop, loop.resident, loop.batches, keep
        # Layers run so far.
        self.cost = 0
        # Hidden states computed here, by depth.
        self.store = loop.store()
        self._stores = [self.store, *([] if known is None else [known])]

    @torch.no_grad()
    def learn(self, depths: Iterable[int]) -> None:
        """Compute depths that are not known yet, in one pass from the deepest known one before them."""
        known = {depth for store in self._stores for depth in store.depths()}
        missing = set(depths) - known
        if not missing:
            return
        before = [depth for depth in known if depth < min(missing)]
        first, last = max(before, default=0), max(missing)
        wanted = sorted(missing | set(range(first, last) if self.keep else ()) - known)
        if not before:
            self.loop.embed(self.store, wanted[0])
        # The depth that the states go into before each layer, and after the last.
        at = [
            first if before else wanted[0],
            *[next(depth for depth in wanted if depth > layer) for layer in range(first, last)],
        ]
        layers = [Placed(self.layers[layer], layer) for layer in range(first, last)]
        read, name = partial(self.at, at[0]), "output of layer {} of the original".format
        with current().task("running the original", last - first) as task:
            for _ in self.loop.through(layers, self.store, read=read, at=at, name=lambda number: name(first + number)):
                self.cost += 1
                task.advance()

    def at(self, depth: int, rows: slice) -> Tensor:
        """`h_BTD` of some sequences at a known depth, on the device."""
        store = next(store for store in self._stores if depth in store.depths())
        return store.get(depth, rows.start, rows.stop, self.resident.device)

    def known(self, n_layers: int) -> HiddenStore | None:
        """The store that holds every depth from 0 to `n_layers`, not to be changed; None where there is none."""
        return next((store for store in self._stores if len(store.depths()) > n_layers), None)

    def forget(self, depth: int) -> None:
        """Release a depth that this fit no longer needs."""
        if not self.keep:
            self.store.drop(depth)

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> TeacherStates:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fits_in_memory(resident: LoadedModel, batches: Batches, memory_budget: MemoryBudget) -> bool:
    """Whether the teacher's hidden states at all depths fit into memory, so that several fits can share them."""
    state = batches.corpus.input_ids.numel() * resident.architecture.width * resident.model.dtype.itemsize
    return (resident.architecture.n_layers + 1) * state <= memory_budget.memory_bytes


def check_teacher(recipe: Recipe, base: Architecture, teacher: Architecture, *, name: str) -> None:
    """Check that a teacher fits a recipe.

    Args:
        base: the architecture of the recipe's base.
        name: what the user calls the teacher.

    Raises:
        UserError: with every difference.
    """
    compared = (
        ("vocabulary", base.vocabulary, teacher.vocabulary),
        ("width", base.width, teacher.width),
        ("number of layers", recipe.depth, teacher.n_layers),
    )
    hint = "Leave --teacher out to learn from the recipe's own base, or name a fine-tune of it."
    check(
        *(
            (ours == theirs, f"The teacher {name} has {what} {theirs}, the recipe's base {ours}.", hint)
            for what, ours, theirs in compared
        )
    )


class Teacher:
    """A teacher in memory, without gradients."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture, depths: Sequence[int]) -> None:
        """`depths`: those of hidden-state losses."""
        self.split = SplitModel(model.eval(), architecture)
        self.depths = tuple(depths)

    @torch.no_grad()
    def lesson(self, ids_BT: Tensor, mask_BT: Tensor | None, *, logits: bool) -> Lesson:
        """The targets for a batch."""
        rows, hidden = self.split.trunk(ids_BT, mask_BT, hidden=bool(self.depths))
        return Lesson(
            rows=rows.reshape(-1, rows.shape[-1]) if logits else None,
            hidden=tuple(hidden[depth] for depth in self.depths),
        )


class TopK:
    """The teacher's K likeliest tokens at every position of a text, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.log_p = np.load(folder / "log_p.npy", mmap_mode="r")
        self.index = np.load(folder / "index.npy", mmap_mode="r")

    def rows(self, sequences: Sequence[int], device: torch.device) -> Likeliest:
        """Those of some sequences, `[B * T, K]`."""
        copied = (torch.from_numpy(array[list(sequences)]) for array in (self.log_p, self.index))
        return Likeliest(*(array.flatten(0, 1).to(device) for array in copied))


def write_top_k(
    folder: Path,
    text: Text,
    teacher: Callable[[], Teacher],
    settings: EndToEndSettings,
    *,
    vocabulary: int,
    batch: int,
) -> None:
    """Run the teacher over a text and write its K likeliest tokens, unless the folder exists.

    Raises:
        UserError: the disk is full, or the teacher's logits are not finite.
    """
    assert settings.top_k is not None
    temperature, ids_NT, mask_NT = settings.temperature, text.ids_NT, text.mask_NT
    k = min(settings.top_k, vocabulary)
    if (folder / _SIGN).exists():
        return
    shape = (*ids_NT.shape, k)
    nbytes = ids_NT.numel() * k * 8
    with staged_folder(folder, nbytes=nbytes, sign=_SIGN) as staging:
        model = teacher()
        device = next(model.split.model.parameters()).device
        task_name = f"the teacher's {k} likeliest tokens"
        with current().task(task_name, len(ids_NT)) as task, ExitStack() as stack:
            files = [stack.enter_context((staging / f"{name}.npy").open("wb")) for name in ("log_p", "index")]
            for file, dtype in zip(files, ("<f4", "<i4"), strict=True):
                np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
            for start in range(0, len(ids_NT), batch):
                part = slice(start, min(start + batch, len(ids_NT)))
                mask_BT = None if mask_NT is None else mask_NT[part].to(device)
                found = _likeliest(model, ids_NT[part].to(device), mask_BT, k, temperature)
                for file, rows in zip(files, found, strict=True):
                    file.write(rows.numpy().tobytes())
                task.advance(part.stop - part.start)
        facts = {"k": k, "temperature": temperature, "sequences": shape[0], "seq_len": shape[1]}
        (staging / _SIGN).write_text(json.dumps(facts) + "\n", encoding="utf-8")


@torch.no_grad()
def _likeliest(teacher: Teacher, ids_BT: Tensor, mask_BT: Tensor | None, k: int, temperature: float) -> Likeliest:
    lesson = teacher.lesson(ids_BT, mask_BT, logits=True)
    assert lesson.rows is not None
    found = [Likeliest.of(teacher.split.head(rows), k, temperature) for rows in lesson.rows.split(_ROWS)]
    log_p, tokens = (torch.cat(each).cpu() for each in zip(*found, strict=True))
    if mask_BT is not None:
        log_p[~mask_BT.reshape(-1).cpu()] = 0.0
    require_finite(log_p, "A next-token probability of the teacher")
    return Likeliest(log_p, tokens)
