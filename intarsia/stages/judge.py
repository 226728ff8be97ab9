"""Judging what came out against what went in: speed, perplexity, and on what text."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from intarsia.building.loaded_model import Resident, load_model
from intarsia.building.offload import free_bytes
from intarsia.checkpoint.reader import Checkpoint
from intarsia.data.corpus import Corpus
from intarsia.evaluation.chain import Chain
from intarsia.evaluation.perplexity import Perplexity, Speed, perplexity
from intarsia.evaluation.speed import compare_speed
from intarsia.recipe.recipe import Recipe, Variant, identity
from intarsia.stages.source import Source

_SHARE_OF_FREE = 0.8


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is compared before and after. `bytes` are those of the weights; speeds are tokens a second, None where they
    are not measured.

    `perplexity_without_heal`: of the cut model as it was before it was healed.
    """

    layers: int
    parameters: int
    bytes: int
    perplexity: Perplexity | None
    perplexity_without_heal: Perplexity | None = None
    prefill_per_s: float | None
    decode_per_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data = asdict(self)
        for key in ("perplexity", "perplexity_without_heal"):
            found: Perplexity | None = getattr(self, key)
            if found is not None:
                known = found.windows > 1  # one window has no scatter
                data[key] = {"value": found.value, "stderr": found.stderr if known else None}
        return data


def measured(
    source: Source, small: Checkpoint, corpus: Corpus | None, *, unhealed: Recipe | None
) -> tuple[Measures, Measures]:
    """Speed and perplexity of the source and of what was built from it; the source's model is let go of.

    Speeds are measured in turns where memory holds both models, else one after the other.

    Args:
        unhealed: the recipe before it was healed, whose perplexity is told too; None where nothing was healed.
    """
    dense, progress = source.checkpoint, source.progress
    if source.placement.stream:
        return _streamed(source, small, corpus, unhealed)
    more = small.nbytes + (0 if source.in_memory else dense.nbytes)
    together = more < free_bytes(source.device) * _SHARE_OF_FREE
    if not together:
        progress.say("the models do not fit into memory together: their speeds are measured one after the other")

    def load_small() -> PreTrainedModel:
        return load_model(small, device=source.device, dtype=source.dtype)

    def judged(model: nn.Module) -> Perplexity | None:
        return None if corpus is None else perplexity(model, corpus, progress=progress)

    models = {"before": source.resident.model, **({"after": load_small()} if together else {})}
    speeds = compare_speed(models, progress=progress)
    before = judged(models.pop("before"))
    without = None if unhealed is None else judged(Chain(unhealed, source.resident))
    source.release()
    after = models.pop("after") if together else load_small()
    if not together:
        speeds |= compare_speed({"after": after}, progress=progress)
    return (
        _measures(dense, speeds["before"], before),
        replace(_measures(small, speeds["after"], judged(after)), perplexity_without_heal=without),
    )


def _streamed(
    source: Source, small: Checkpoint, corpus: Corpus | None, unhealed: Recipe | None
) -> tuple[Measures, Measures]:
    """Perplexity alone, layer by layer: how fast a streamed model is says nothing of how fast it is in memory."""
    source.progress.say("the models are streamed: their speeds are not measured")

    def judged(recipe: Recipe, resident: Resident) -> Perplexity | None:
        chain = Chain(recipe, resident, room=source.placement.room())
        return None if corpus is None else perplexity(chain, corpus, progress=source.progress)

    before = judged(_whole(source.checkpoint), source.resident)
    without = None if unhealed is None else judged(unhealed, source.resident)
    source.release()
    after = judged(_whole(small), source.placement.resident(small))
    return (
        _measures(source.checkpoint, None, before),
        replace(_measures(small, None, after), perplexity_without_heal=without),
    )


def _whole(checkpoint: Checkpoint) -> Recipe:
    return identity(Variant(name="base", model=checkpoint.model), checkpoint.architecture.n_layers)


def _measures(checkpoint: Checkpoint, speed: Speed | None, found: Perplexity | None) -> Measures:
    return Measures(
        layers=checkpoint.architecture.n_layers,
        parameters=checkpoint.parameters,
        bytes=checkpoint.nbytes,
        perplexity=found,
        prefill_per_s=None if speed is None else speed.prefill_tokens_per_s,
        decode_per_s=None if speed is None else speed.decode_tokens_per_s,
    )
