"""The model during pruning: its layers and hidden states, and measures of them and of possible changes.

Shape suffixes: `N` sequences, `B` sequences of a batch, `T` tokens, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import MemoryBudget
from intarsia.activations.loop import Loop, Passed, Path
from intarsia.activations.loss import Likeliest
from intarsia.activations.statistics import LayerMeasure, cosines, last_real
from intarsia.building.loaded_model import Layer, LoadedModel, Placed, RecipeLayers, is_whole
from intarsia.data.corpus import Corpus
from intarsia.healing.teacher import TeacherStates
from intarsia.inspection.structure import Possible
from intarsia.progress import current
from intarsia.pruning.race import race
from intarsia.pruning.scores import angular_distance
from intarsia.pruning.step import Change, Criterion
from intarsia.recipe.recipe import Fitted, Op

# Sequences for the calibration loss after a step.
_LOSS_SEQUENCES = 8


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Measures of a model without its hidden states."""

    layers: list[Layer]
    measures: list[LayerMeasure]
    losses_N: Tensor
    distances: dict[tuple[int, int, str], float]


class Intermediate(RecipeLayers):
    """The current layers with their measures and hidden states; `keep` and `rewind` save and restore them.

    Healing shares the original's hidden states, if they exist.

    Attributes:
        loop: runs layers over the calibration text, and counts them.
        hidden: the measured hidden states at every depth.
        rows: the first sequences of the calibration text, on which everything but the original's hidden states is
            measured; see `look_at`.
        measures: the measures of each current layer on them.
        may_become: whether the model may consist of some layers of the original.
        criterion: compare candidates by their loss, or by their divergence (KL) from the original's next-token
            distribution.
    """

    def __init__(
        self,
        resident: LoadedModel,
        corpus: Corpus,
        ops: Sequence[Op],
        *,
        fitted: Fitted | None = None,
        batch_tokens: int | None = None,
        memory_budget: MemoryBudget | None = None,
        after_final_norm: bool = False,
    ) -> None:
        """Run nothing yet; see `measure`.

        Args:
            fitted: tensors that replace layers' own, by layer.
            batch_tokens: tokens of a forward pass (default: by device).
            memory_budget: of hidden states, before they spill to disk.
            after_final_norm: take the last layer's output after the final norm, as published.
        """
        super().__init__(resident, ops, fitted)
        self.after_final_norm = after_final_norm
        self.loop = Loop(
            resident, Batches(corpus, resident.device, batch_tokens=batch_tokens), memory_budget=memory_budget
        )
        self.hidden = self.loop.store()
        self.measures: list[LayerMeasure] = []
        self.rows = slice(0, len(corpus))
        self._losses_N = torch.zeros(min(len(corpus), _LOSS_SEQUENCES), dtype=torch.float64)
        real_NT = torch.ones_like(corpus.input_ids, dtype=torch.bool) if corpus.mask is None else corpus.mask
        self._counts_N = (real_NT[:, :-1] & real_NT[:, 1:]).sum(dim=1)
        self._measured: list[Layer] = []
        self._distances: dict[tuple[int, int, str], float] = {}
        self._kept: _Kept | None = None
        self._original: TeacherStates | None = None
        self.criterion: Criterion = "loss"
        self._likeliest: Likeliest | None = None
        self._held_original = False
        self.may_become = Possible(self.architecture)

    @property
    def corpus(self) -> Corpus:
        """The calibration text."""
        return self.loop.corpus

    @property
    def batches(self) -> Batches:
        """The calibration text, in batches that fit the device."""
        return self.loop.batches

    @property
    def layer_forwards(self) -> float:
        """Cost so far; a layer run on the whole calibration text once counts 1."""
        return self.loop.layer_forwards

    @property
    def losses_N(self) -> Tensor:
        """Summed next-token loss of each of the first sequences of `rows`, in nats: float64.

        For log and report only, so a part of the text is enough.
        """
        return self._losses_N[self.rows]

    @property
    def counts_N(self) -> Tensor:
        """Tokens predicted in each sequence of `rows`."""
        return self._counts_N[self.rows]

    @property
    def loss(self) -> float:
        """Mean next-token loss on the first sequences of `rows`, in nats."""
        losses_N = self.losses_N
        return float(losses_N.sum() / self.counts_N[: len(losses_N)].sum())

    def may_drop(self, start: int, count: int = 1) -> bool:
        """Whether the model may do without `count` layers from `start` on."""
        return self.may_become([op.sources[0].layer for op in (*self.ops[:start], *self.ops[start + count :])])

    def droppable(self, count: int = 1) -> list[int]:
        """Where `count` adjacent layers may be dropped."""
        return [start for start in range(self.depth - count + 1) if self.may_drop(start, count)]

    def look_at(self, tokens: int | None) -> None:
        """Measure on the first `tokens` of the calibration text, in whole sequences; None: on all.

        Call it before the first measurement, or after `rewind`.
        """
        number = len(self.corpus) if tokens is None else min(len(self.corpus), max(1, tokens // self.corpus.seq_len))
        self.rows = slice(0, number)
        if self.hidden.held is not None:
            self.hidden.only(number)

    @torch.inference_mode()
    def measure(self, start: int = 0, stop: int | None = None) -> None:
        """Run the layers from `start` on over the calibration text, and record measures, hidden states and loss.

        With `stop`, only run the layers before it, and do not measure the loss. The original's hidden states are
        recorded on the whole text, for healing.
        """
        whole, stop = stop is None, self.depth if stop is None else stop
        if not self.measures:
            start = 0
        elif self.after_final_norm:
            start = min(start, max(self.depth - 1, 0))  # a layer that has become the last one
        del self.measures[start:], self._measured[start:]
        self._distances = {key: value for key, value in self._distances.items() if key[0] + key[1] <= start}
        parts = [self.rows]
        if whole and self.hidden.held is None and is_whole(self._now(), self.architecture.n_layers):
            parts.append(slice(self.rows.stop, len(self.corpus)))
        length = parts[-1].stop / len(self.corpus)
        with current().task(f"measuring {self.depth} layers", (stop - start) * length + whole) as task:
            if start == 0:
                self.loop.embed(self.hidden, sequences=slice(0, parts[-1].stop))
            found = [LayerMeasure() for _ in range(start, stop)]

            def measure(number: int, passed: Passed) -> LayerMeasure | None:
                # The final norm is too small for several threads.
                normed = self.after_final_norm and start + number + 1 == self.depth
                wanted = passed.rows.start < self.rows.stop and not normed
                return self._measure_of(start + number, passed) if wanted else None

            def observe(number: int, passed: Passed) -> None:
                if passed.rows.start < self.rows.stop:
                    found[number].include(passed.measured or self._measure_of(start + number, passed))
                part = (passed.rows.stop - passed.rows.start) / len(self.corpus)
                task.note(f"layer {start + number + 1} of {self.depth}")
                task.advance(part)

            for number in self.loop.through(
                self.placed(start, stop),
                self.hidden,
                at=range(start, stop + 1),
                measure=measure,
                observe=observe,
                sequences=parts,
                name=lambda number: f"output of layer {start + number}",
            ):
                self.measures.append(found[number])
            if whole:
                task.note("loss")
                self.batches.each(self._lose, slice(0, len(self.losses_N)))
                task.advance()
        self._measured = self._now()[:stop]

    def refresh(self) -> None:
        """Measure from the first layer that changed since the last measurement; do nothing if none did.

        So several methods share one pass over the same whole model.
        """
        same = 0
        for (op, fitted), now, now_fitted in zip(self._measured, self.ops, self.fitted, strict=False):
            if op != now or fitted is not now_fitted:
                break
            same += 1
        if same == len(self._measured) == self.depth:
            return
        # The old last layer was measured after the final norm, and may not be the last any more.
        self.measure(max(same - 1, 0) if self.after_final_norm else same)

    def replace(self, start: int, count: int, op: Op | None, *, measure: bool = True) -> None:
        """Replace `count` layers by one or none, and re-run the layers after them."""
        self.exchange(start, count, [] if op is None else [op])
        if measure:
            self.measure(start)

    def losses_with(self, changes: Iterable[Change], *, sequences: slice | None = None) -> Iterator[Tensor]:
        """Summed loss of each sequence, for one change at a time: float64, `[N]` of the slice (default: `rows`).

        With the criterion `kl`, it is the divergence from the original's next-token distribution. The model itself does
        not change: layers from the change on run from the kept hidden states before it.
        """
        expected = self.expected().rows if self.criterion == "kl" else None
        return self.loop.losses(map(self.path, changes), sequences=sequences or self.rows, expected=expected)

    def race(
        self, changes: Sequence[Change], *, racing: bool, keep: int = 1, title: str
    ) -> tuple[int, dict[int, Tensor]]:
        """Race changes, by their index in the list: the best, and the summed losses of each."""

        def losses(places: Sequence[int], part: slice) -> Iterator[Tensor]:
            return self.losses_with([changes[place] for place in places], sequences=part)

        places = range(len(changes))
        return race(places, losses, self.counts_N, racing=racing, keep=keep, title=title)

    def path(self, change: Change) -> Path:
        """A path through the layers from a change on, and the hidden states before it."""
        new = [Placed(self.resident.module(op), op.sources[0].layer) for op in change.ops]
        rest = self.placed(change.start + change.count)
        return Path(layers=[*new, *rest], read=partial(self.hidden_at, change.start))

    def hidden_at(self, depth: int, rows: slice) -> Tensor:
        """The measured H^depth of some sequences."""
        return self.hidden.get(depth, rows.start, rows.stop, self.resident.device)

    @torch.inference_mode()
    def tokens_at(self, depth: int, keep_NT: Tensor) -> Tensor:
        """H^depth of the tokens where `keep_NT` is True: float32 `[K, D]`, on the CPU."""
        parts = (rows for rows, _, _ in self.batches.over(self.rows))
        residual = self.loop.stream.residual
        return torch.cat([residual(self.hidden_at(depth, rows)).cpu()[keep_NT[rows]].float() for rows in parts])

    @torch.inference_mode()
    def span_distance(self, start: int, count: int, tokens: Literal["all-tokens", "last-token"]) -> float:
        """SBI of the span of `count` layers from `start`: E[arccos(cos(H^start, H^{start+count}))] / pi."""
        key = (start, count, tokens)
        if key not in self._distances:
            total, number = 0.0, 0
            for rows, ids, mask in self.batches.over(self.rows):
                after = self._output(start + count, rows, ids, mask)
                keep = last_real(ids, mask) if tokens == "last-token" else mask
                found = angular_distance(cosines(self._output(start, rows, ids, mask), after, keep))
                total, number = total + float(found.sum()), number + found.numel()
            self._distances[key] = total / number
        return self._distances[key]

    @property
    def kept(self) -> bool:
        """Whether there is a kept state for `rewind`."""
        return self._kept is not None

    def keep(self) -> None:
        """Keep the current layers and measurements, to which `rewind` returns.

        So several methods that change the model share one pass over the whole one.
        """
        self._hold()
        self._kept = _Kept(
            layers=list(self._measured),
            measures=list(self.measures),
            losses_N=self._losses_N.clone(),
            distances=dict(self._distances),
        )

    def rewind(self) -> None:
        """Return to the state at `keep`, without running anything."""
        assert self._kept is not None, "nothing was kept"
        self.hidden.restore()
        self.measures, self._measured = list(self._kept.measures), list(self._kept.layers)
        self._losses_N, self._distances = self._kept.losses_N.clone(), dict(self._kept.distances)
        self.become([op for op, _ in self._kept.layers])
        for index, (_, fitted) in enumerate(self._kept.layers):
            self.fit(index, fitted)

    def original(self) -> TeacherStates:
        """The original's hidden states at every depth, kept from now on.

        If the whole model was kept or measured last, its hidden states are reused; else this costs a layer-forward for
        each layer.
        """
        if self._original is None:
            if self._is_original() and self.hidden.held is None:
                self._hold()
            known = self.hidden.held if self._held_original else None
            self._original = TeacherStates(self.loop, known=known, keep=True)
            self._original.learn(range(self.architecture.n_layers + 1))
        return self._original

    def expected(self) -> Likeliest:
        """The original's likeliest next tokens on `rows`."""
        if self._likeliest is None or len(self._likeliest.log_p) < self.rows.stop:
            end = Path(layers=[], read=partial(self.original().at, self.architecture.n_layers))
            self._likeliest = self.loop.likeliest(end, sequences=self.rows)
        return self._likeliest

    def close(self) -> None:
        """Free all hidden states, including the original's."""
        if self._original is not None:
            self._original.close()
        self.hidden.close()

    def _measure_of(self, index: int, passed: Passed) -> LayerMeasure:
        """The measures of a layer on one batch."""
        found, mask, normed = LayerMeasure(), passed.mask, self.loop.stream.residual(passed.after)
        if self.after_final_norm and index + 1 == self.depth:
            normed = self.loop.stream.final_norm(passed.after, passed.ids, mask)
        found.add_stream(self.loop.stream.residual(passed.before), normed.to(passed.before.device), mask)
        for part, x in passed.inputs.items():
            found.channels[part].add(x, None if mask is None else mask.to(x.device))
        return found

    def _lose(self, rows: slice, ids: Tensor, mask: Tensor | None) -> None:
        """Measure the loss of some sequences, from the hidden states after the last layer."""
        h_BTD = self.hidden_at(self.depth, rows)
        self._losses_N[rows], _ = self.loop.stream.losses(h_BTD, ids, mask)

    def _output(self, depth: int, rows: slice, ids: Tensor, mask: Tensor | None) -> Tensor:
        """H^depth of some sequences; after the last layer with the final norm, if `after_final_norm` is set."""
        h_BTD = self.hidden_at(depth, rows)
        if self.after_final_norm and depth == self.depth:
            return self.loop.stream.final_norm(h_BTD, ids, mask)
        return self.loop.stream.residual(h_BTD)

    def _hold(self) -> None:
        """Keep the current hidden states; later ones are stored beside them."""
        self.hidden.hold()
        self.hidden.only(self.rows.stop)
        self._held_original = self._is_original()

    def _now(self) -> list[Layer]:
        """The current layers, measured or not."""
        return list(zip(self.ops, self.fitted, strict=True))

    def _is_original(self) -> bool:
        """Whether the last measured model is the original."""
        return is_whole(self._measured, self.architecture.n_layers)
