"""The model as it is in the middle of progressive pruning, what it was before, and the original beside it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.stats import LayerMeasure
from intarsia.healing.teacher import TeacherStates
from intarsia.planning.current_layers import Layer, is_whole, original_ops
from intarsia.planning.measured import Measured


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What is measured on a model, beside its hidden states."""

    layers: list[Layer]
    measures: list[LayerMeasure]
    losses_N: Tensor
    distances: dict[tuple[int, int, str], float]


class Intermediate(Measured):
    """The current layers with what is measured on them, which can be kept and come back to.

    The original's hidden states are shared, where they are there.
    """

    _kept: _Kept | None = None
    _original: TeacherStates | None = None
    _held_original = False

    def keep(self) -> None:
        """Keep what is measured now: `rewind` comes back to it, whatever is measured in between.

        So methods that change the model, one after the other, share one pass over the whole one.
        """
        self._hold()
        self._kept = _Kept(
            layers=list(self._measured),
            measures=list(self.measures),
            losses_N=self.losses_N.clone(),
            distances=dict(self._distances),
        )

    def rewind(self) -> None:
        """Be what it was at `keep` again; nothing is run."""
        assert self._kept is not None, "nothing was kept"
        self.hidden.restore()
        self.measures, self._measured = list(self._kept.measures), list(self._kept.layers)
        self.losses_N, self._distances = self._kept.losses_N.clone(), dict(self._kept.distances)
        self.become([op for op, _ in self._kept.layers])
        for index, (_, fitted) in enumerate(self._kept.layers):
            self.fit(index, fitted)

    def original(self, sequences: int) -> TeacherStates:
        """The hidden states of the original on so many sequences, kept from now on.

        They are those that were measured, where the whole model is what was kept or measured last, and else cost a
        layer-forward for each layer.
        """
        if self._original is None or self._original.sequences < sequences:
            if self._original is not None:
                self._original.close()
            self._original = self._known_original(sequences)
            self._original.learn(range(self.architecture.n_layers + 1))
            self.spend(self._original.cost, slice(0, sequences))
        return self._original

    def beside(self, original: TeacherStates) -> Intermediate:
        """Another one, made of the original's layers and with its hidden states on the whole text; nothing is run."""
        other = Intermediate(
            self.resident, self.corpus, original_ops(self.ops, self.architecture.n_layers), progress=self.progress
        )
        other.batches, other.room, other.counts_N = self.batches, self.room, self.counts_N
        other.hidden = HiddenStore(self.hidden.shape, self.hidden.dtype, room=self.room, held=original.states)
        return other

    def close(self) -> None:
        """Free the hidden states, the original's with them."""
        if self._original is not None:
            self._original.close()
        super().close()

    def _known_original(self, sequences: int) -> TeacherStates:
        """The original with what is measured of it."""
        measured = self._is_original()
        if measured and self.hidden.held is None and sequences == len(self.corpus):
            self._hold()
        if self._held_original:
            return TeacherStates(self.resident, self.batches, sequences=sequences, known=self.hidden.held)
        original = TeacherStates(
            self.resident, self.batches, sequences=sequences, room=self.room, progress=self.progress
        )
        if measured:
            original.copy(self.hidden)
        return original

    def _hold(self) -> None:
        """Keep the hidden states that are there; those that are measured later are stored besides."""
        self.hidden.hold()
        self._held_original = self._is_original()

    def _is_original(self) -> bool:
        """Whether what was measured last is the whole model as it was."""
        return is_whole(self._measured, self.architecture.n_layers)
