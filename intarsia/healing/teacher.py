"""The teacher: hidden states by depth, which layers are fitted and trained toward, and logits for whole models.

`TeacherStates` depend on the model and the text alone, so several fits may share them, and a student whose first layers
are the teacher's own starts where it differs. Where the whole model was measured already, they are read and not run
again.

Logits come from the teacher itself, or from a cache of its likeliest tokens on disk. The cache is written once for a
teacher, a text, a K and a temperature, under a name made of these, and memory-mapped from then on. It appears whole or
not at all.

Shape suffixes: `N` sequences, `B` sequences of a batch, `T` tokens, `D` residual width, `K` kept tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intarsia.activations.hidden_store import HiddenStore, Room
from intarsia.activations.loop import Batches
from intarsia.activations.statistics import require_finite
from intarsia.activations.stream import LayerStream
from intarsia.architecture.spec import Architecture
from intarsia.building.loaded_model import Resident
from intarsia.checkpoint.staging import staged_folder
from intarsia.errors import UserError
from intarsia.healing.losses import top_k_of
from intarsia.healing.settings import EndToEndSettings
from intarsia.healing.student import Lesson, SplitModel
from intarsia.healing.training import Text
from intarsia.progress import Progress, Silent

_SIGN = "facts.json"
_ROWS = 256


class TeacherStates:
    """Hidden states by depth: 0 is what the embedding gives, b what layer b - 1 gives.

    Freed by `close`, or at the end of a `with` block.
    """

    def __init__(
        self,
        resident: Resident,
        batches: Batches,
        *,
        layers: Sequence[nn.Module] | None = None,
        sequences: int | None = None,
        known: HiddenStore | None = None,
        keep: bool = False,
        room: Room | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Nothing is run yet; `learn` does that.

        Args:
            resident: the original model.
            batches: of the text.
            layers: of another teacher, between the resident one's embedding and head.
            sequences: how many of the text, from the first on; default: all.
            known: hidden states of the teacher that were measured already; they must stay as they are.
            keep: keep every depth that is passed, for later fits, which may ask for others.
        """
        # Those of the teacher.
        self.layers: Sequence[nn.Module] = resident.layers if layers is None else layers
        self.resident, self.batches, self.keep = resident, batches, keep
        # Layers that were run on these sequences so far.
        self.cost = 0
        corpus = batches.corpus
        self.sequences = len(corpus) if sequences is None else sequences
        self._stream = LayerStream(resident.model, resident.architecture)
        self._progress = progress or Silent()
        shape = (self.sequences, corpus.seq_len, resident.architecture.width)
        # What was run here, by depth.
        self.store = HiddenStore(shape, resident.model.dtype, room=room)
        self._stores = [self.store, *([] if known is None else [known])]

    @torch.no_grad()
    def learn(self, depths: Iterable[int]) -> None:
        """One pass of the teacher for the depths that are not known yet, from the deepest one before them.

        Raises:
            UserError: hidden states are not finite, or the disk is full.
        """
        known = self._depths()
        missing = set(depths) - known
        if not missing:
            return
        before = [depth for depth in known if depth < min(missing)]
        first = max(before, default=0)
        wanted = sorted(missing | set(range(first, max(missing)) if self.keep else ()) - known)
        with self._progress.task("running the original", max(missing) - first) as task:
            at = first
            if not before:
                at = wanted[0]
                self.batches.each(partial(self._enter, at), self._all)
            for layer, module in enumerate(self.resident.walk(self.layers[first : max(missing)]), first):
                after = next(depth for depth in wanted if depth > layer)
                self._through(layer, module, at, after)
                self.cost += 1
                at = after
                task.advance()

    def copy(self, hidden: HiddenStore) -> None:
        """Take over what was measured, which may change from now on."""
        for depth in hidden.depths():
            for rows, _, _ in self.batches.over(self._all):
                self.store.put(depth, rows.start, hidden.get(depth, rows.start, rows.stop, torch.device("cpu")))

    def at(self, depth: int, rows: slice) -> Tensor:
        """`h_BTD` of some sequences at a depth that is known, on the device."""
        store = next(store for store in self._stores if depth in store.depths())
        return store.get(depth, rows.start, rows.stop, self.resident.device)

    @property
    def states(self) -> HiddenStore:
        """All depths, of a teacher of which every depth is known; not to be changed."""
        found = [store for store in self._stores if len(store.depths()) > len(self.layers)]
        assert found, "it has not learned every depth"
        return found[0]

    def forget(self, depth: int) -> None:
        """A depth is not asked for again by this fit."""
        if not self.keep:
            self.store.drop(depth)

    def close(self) -> None:
        """Free what is stored here."""
        self.store.close()

    def __enter__(self) -> TeacherStates:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _all(self) -> slice:
        return slice(0, self.sequences)

    def _depths(self) -> set[int]:
        return {depth for store in self._stores for depth in store.depths()}

    def _enter(self, depth: int, rows: slice, ids: Tensor, mask: Tensor | None) -> None:
        self.store.put(depth, rows.start, self._stream.enter(ids, mask).h_BTD)

    def _through(self, layer: int, module: nn.Module, before: int, after: int) -> None:
        """Run one layer from the states at one depth; what it gives is stored at another."""

        def work(rows: slice, ids: Tensor, mask: Tensor | None) -> None:
            h_BTD = self._stream.run(module, self.at(before, rows), self._stream.calls(ids, mask)[layer])
            require_finite(h_BTD, f"output of layer {layer} of the original")
            self.store.put(after, rows.start, h_BTD)

        self.batches.each(work, self._all)


def has_room(resident: Resident, batches: Batches, room: Room) -> bool:
    """Whether memory has room for the teacher's hidden states at every depth, for several fits to share."""
    state = batches.corpus.input_ids.numel() * resident.architecture.width * resident.model.dtype.itemsize
    return (resident.architecture.n_layers + 1) * state <= room.memory_bytes


class Teacher:
    """A teacher in memory, without gradients."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture, depths: Sequence[int]) -> None:
        """`depths`: those at which hidden states are learnt from."""
        self.split = SplitModel(model.eval(), architecture)
        self.depths = tuple(depths)

    @torch.no_grad()
    def lesson(self, ids_BT: Tensor, mask_BT: Tensor | None, *, logits: bool) -> Lesson:
        """What it says of a batch."""
        rows, hidden = self.split.trunk(ids_BT, mask_BT, hidden=bool(self.depths))
        return Lesson(
            rows=rows.reshape(-1, rows.shape[-1]) if logits else None,
            hidden=tuple(hidden[depth] for depth in self.depths),
        )


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """A teacher that is only loaded when it is needed, and which one it is."""

    load: Callable[[], Teacher]
    sha256: str
    # Where its likeliest tokens are kept; None: in the run folder.
    cache: Path | None = None


class TopK:
    """The teacher's K likeliest tokens at every position of a text, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.log_p = np.load(folder / "log_p.npy", mmap_mode="r")
        self.index = np.load(folder / "index.npy", mmap_mode="r")

    def rows(self, sequences: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Log-probabilities and tokens of some sequences, `[B * T, K]` each."""
        found = []
        for array in (self.log_p, self.index):
            copied = np.ascontiguousarray(array[list(sequences)])
            found.append(torch.from_numpy(copied).reshape(-1, array.shape[-1]).to(device))
        return found[0], found[1]


def top_k_folder(root: Path, teacher: TeacherSource, text: Text, settings: EndToEndSettings) -> Path:
    """Where the cache for these is."""
    facts = json.dumps([1, teacher.sha256, text.sha256, settings.top_k, settings.temperature])
    return root / f"top-{settings.top_k}-{hashlib.sha256(facts.encode()).hexdigest()[:24]}"


def write_top_k(
    folder: Path,
    text: Text,
    teacher: TeacherSource,
    settings: EndToEndSettings,
    *,
    vocabulary: int,
    batch: int,
    progress: Progress,
) -> None:
    """Run the teacher over a text and keep its K likeliest tokens; a cache that is there is left as it is.

    Raises:
        UserError: K is more than the vocabulary, the disk is full, or the teacher's logits are not finite.
    """
    assert settings.top_k is not None
    k, temperature, ids_NT, mask_NT = settings.top_k, settings.temperature, text.ids_NT, text.mask_NT
    if k > vocabulary:
        raise UserError.of(
            where="--top-k",
            expected=f"at most {vocabulary}, the size of the vocabulary",
            found=str(k),
            remedy="Ask for fewer tokens, or leave it out to learn from all.",
        )
    if (folder / _SIGN).exists():
        return
    shape = (*ids_NT.shape, k)
    nbytes = ids_NT.numel() * k * 8
    with staged_folder(folder, nbytes=nbytes, sign=_SIGN) as staging:
        log_p = np.lib.format.open_memmap(staging / "log_p.npy", mode="w+", dtype=np.float32, shape=shape)
        index = np.lib.format.open_memmap(staging / "index.npy", mode="w+", dtype=np.int32, shape=shape)
        for name in ("log_p.npy", "index.npy"):
            if hasattr(os, "posix_fallocate"):  # a disk that runs full under a memory map kills the process
                with (staging / name).open("rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        model = teacher.load()
        device = next(model.split.model.parameters()).device
        with progress.task(f"the teacher's {k} likeliest tokens", len(ids_NT)) as task:
            for start in range(0, len(ids_NT), batch):
                part = slice(start, min(start + batch, len(ids_NT)))
                mask_BT = None if mask_NT is None else mask_NT[part].to(device)
                found = _likeliest(model, ids_NT[part].to(device), mask_BT, k, temperature)
                log_p[part] = found[0].reshape(-1, *shape[1:]).numpy()
                index[part] = found[1].reshape(-1, *shape[1:]).numpy()
                task.advance(part.stop - part.start)
        log_p.flush()
        index.flush()
        facts = {"k": k, "temperature": temperature, "sequences": shape[0], "seq_len": shape[1]}
        (staging / _SIGN).write_text(json.dumps(facts) + "\n", encoding="utf-8")


@torch.no_grad()
def _likeliest(
    teacher: Teacher, ids_BT: Tensor, mask_BT: Tensor | None, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    lesson = teacher.lesson(ids_BT, mask_BT, logits=True)
    assert lesson.rows is not None
    values, tokens = [], []
    for start in range(0, len(lesson.rows), _ROWS):
        log_p, index = top_k_of(teacher.split.head(lesson.rows[start : start + _ROWS]), k, temperature)
        values.append(log_p.cpu())
        tokens.append(index.to(torch.int32).cpu())
    log_p = torch.cat(values)
    if mask_BT is not None:
        log_p[~mask_BT.reshape(-1).cpu()] = 0.0
    if not bool(torch.isfinite(log_p).all()):
        raise UserError.of(
            where="the teacher's next-token probabilities",
            expected="finite numbers",
            found="NaN or infinity",
            remedy="The teacher overflows in this dtype; use bfloat16 or float32.",
        )
    return log_p, torch.cat(tokens)
