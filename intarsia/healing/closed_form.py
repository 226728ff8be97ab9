"""Closed-form repair: least squares instead of training.

An output layer with span (a, b], fed by the repaired layers before it, should give the original's H^b. Its read-outs
(down_proj, o_proj) are fitted by ridge regression on their own inputs toward what is still missing of H^b, and shrink
towards the weights as they are: down_proj, then o_proj, then down_proj again behind the changed attention. Layers
behind the first cut that stand for themselves alone have down_proj fitted, and o_proj where that is asked for: they
make good what those before left. With a plain removal and down_proj alone this is the special case of arXiv 2505.02819
without its extra matrix.

The student begins where it differs from the teacher. Statistics are Gram matrices, accumulated in a stream: memory is
one layer's, whatever the number of tokens. The ridge strength is chosen on held-out sequences, and a fit that does not
lower the held-out error is not taken.

Massive activations: a few tokens (attention sinks) have norms a hundred times the others', and plain least squares
would serve them alone. A token counts with weight 1 / |H^b|^2, as it does to the norm before the next layer.

Fitting o_proj toward the span's summed attention outputs instead was measured and is worse than leaving it alone: what
the removed layers' attention read is not what this layer's MLP can use (dev/LOG.md, closed form).

A read-out with a norm behind it is fitted otherwise (`intarsia.healing.behind_norm`). The experts of a mixture are not
fitted; o_proj is, in their place.

Shape suffixes: `B` sequences of a batch, `T` tokens, `N` tokens, `C` features, `D` residual width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from intarsia.anatomy.spec import Anatomy
from intarsia.building.resident import Resident, twin
from intarsia.calibration.batches import Batches
from intarsia.calibration.corpus import Corpus
from intarsia.calibration.hidden import HiddenStore
from intarsia.calibration.room import Room
from intarsia.calibration.stream import LayerStream
from intarsia.healing.closed_form_settings import ClosedFormSettings
from intarsia.healing.fit_plan import fitted_parts
from intarsia.healing.layer_fit import LayerFit, fit_layer
from intarsia.healing.original import Original
from intarsia.healing.part_fit import FitBatch
from intarsia.healing.scratch import Scratch
from intarsia.progress import Progress, Silent
from intarsia.recipe.recipe import Recipe


def fit(
    recipe: Recipe,
    resident: Resident,
    corpus: Corpus,
    *,
    settings: ClosedFormSettings | None = None,
    teacher: Sequence[nn.Module] | None = None,
    original: Original | None = None,
    batch_tokens: int | None = None,
    room: Room | None = None,
    progress: Progress | None = None,
) -> tuple[Recipe, list[dict[str, Any]]]:
    """A recipe with fitted read-outs, and a report for every one of them.

    Args:
        recipe: any recipe over the resident model; what is fitted on it already is the starting point.
        resident: the original model, which is also the teacher unless `teacher` is given.
        corpus: calibration text.
        teacher: the layers of another one, as many as the original has, between its embedding and head.
        original: what the original makes of the text, shared with other fits; left as it is, but for what is added.
        room: what hidden states may take in memory.

    Raises:
        UserError: activations are not finite.
    """
    settings, room, progress = settings or ClosedFormSettings(), room or Room(), progress or Silent()
    if original is None:
        batches = Batches(corpus, resident.device, batch_tokens=batch_tokens, progress=progress)
        its = Original(resident, batches, layers=teacher, room=room, progress=progress)
    else:
        its = original
        assert teacher is None and its.batches.corpus is corpus, "another teacher or text"
    work = _Work(recipe, resident, its, settings, room, progress)
    try:
        with torch.inference_mode():
            fitted, fits = work.run()
    finally:
        work.close()
        if original is None:
            its.close()
    merged = {index: {**recipe.fitted.get(index, {}), **tensors} for index, tensors in fitted.items()}
    return replace(recipe, fitted={**recipe.fitted, **merged}), [asdict(entry) for entry in fits]


class _Work:
    """One fit under way: the original's hidden states, and the student's stream."""

    def __init__(
        self,
        recipe: Recipe,
        resident: Resident,
        original: Original,
        settings: ClosedFormSettings,
        room: Room,
        progress: Progress,
    ) -> None:
        self.recipe, self.resident, self.original, self.settings = recipe, resident, original, settings
        self.batches = original.batches
        self.anatomy: Anatomy = resident.anatomy
        self.progress = progress
        self.stream = LayerStream(resident.model, resident.anatomy)
        self.parts = fitted_parts(recipe, settings, self.anatomy)
        self.indices = list(self.parts)
        n, t = self.batches.corpus.input_ids.shape
        self.student = HiddenStore((n, t, self.anatomy.width), resident.model.dtype, room=room)

    def close(self) -> None:
        self.student.close()

    def run(self) -> tuple[dict[int, dict[str, npt.NDArray[np.float32]]], list[LayerFit]]:
        fitted: dict[int, dict[str, npt.NDArray[np.float32]]] = {}
        fits: list[LayerFit] = []
        if not self.indices:
            return fitted, fits
        last = self.indices[-1]
        layers = self.recipe.layers[: last + 1]
        modules = [self.resident.module(op, self.recipe.fitted.get(index)) for index, op in enumerate(layers)]
        first = self._first(modules)
        # The spans of layers with a target do not overlap, so each ends where no other does.
        ends = {index: self.recipe.spans[index][1] for index in self.indices}
        self.original.learn({first, *ends.values()})
        with self.progress.task("closed form", last + 1 - first) as task:
            for rows, _, _ in self.batches.over():
                self.student.put(0, rows.start, self.original.at(first, rows))
            if first not in ends.values():
                self.original.forget(first)
            for index, module in enumerate(self.resident.walk(modules[first:], ahead=False), first):
                task.note(f"layer {index + 1} of {len(self.recipe.layers)}")
                if index in ends:
                    module, tensors, reports = self.batches.whole(partial(self._fit, index, module))
                    fits += reports
                    if tensors:
                        fitted[index] = tensors
                self._through(index, module)
                if index in ends:
                    self.original.forget(ends[index])
                task.advance()
        return fitted, fits

    def _fit(
        self, index: int, unfitted: nn.Module
    ) -> tuple[nn.Module, dict[str, npt.NDArray[np.float32]], list[LayerFit]]:
        module = twin(unfitted)  # fitting must leave the original model alone
        tensors, reports = fit_layer(
            module,
            self.parts[index],
            partial(self._feed, index),
            index=index,
            stream=self.stream,
            anatomy=self.anatomy,
            rule=self.settings.rule,
            # What is fitted on all layers takes more than one layer does: of a streamed model it goes into files.
            scratch=Scratch(in_files=self.resident.streams, folder=self.student.room.folder),
        )
        return module, tensors, reports

    def _first(self, modules: Sequence[nn.Module]) -> int:
        """The first layer that is not the teacher's own, or is fitted: the student's hidden states before are his."""
        start, layers = self.indices[0], self.original.layers
        own = zip(modules[:start], layers, strict=False)  # of a stack, there are more of ours
        differs = (index for index, (ours, theirs) in enumerate(own) if ours is not theirs)
        return next(differs, min(start, len(layers)))

    def _through(self, index: int, module: nn.Module) -> None:
        """The student's hidden states go through an output layer."""

        def work(rows: slice, ids: Tensor, mask: Tensor | None) -> None:
            call = self.stream.calls(ids, mask)[self.recipe.layers[index].sources[0].layer]
            h_BTD = self.student.get(0, rows.start, rows.stop, self.resident.device)
            self.student.put(0, rows.start, self.stream.run(module, h_BTD, call))

        self.batches.each(work)

    def _feed(self, index: int) -> Iterator[FitBatch]:
        """What output layer `index` is fed, and what it should give."""
        for rows, ids, mask in self.batches.over():
            yield FitBatch(
                rows=rows,
                h_BTD=self.student.get(0, rows.start, rows.stop, self.resident.device),
                wanted_BTD=self.original.at(self.recipe.spans[index][1], rows),
                call=self.stream.calls(ids, mask)[self.recipe.layers[index].sources[0].layer],
                mask=mask,
            )
