"""Settings of the two kinds of training, checked when they are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from intarsia.errors import Problem, UserError
from intarsia.healing.layer_map import Layers
from intarsia.healing.losses import Weighting

Check = tuple[str, str, object, bool]
"""A setting's name, what is expected, what was found, and whether it is right."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What both kinds of training share.

    Attributes:
        epochs: how often every training sequence is seen.
        batch_tokens: tokens of an optimiser step.
        lr: the learning rate's peak; it warms up linearly and then falls along a cosine to `least_lr` of it.
        warmup: share of all steps.
        clip: the gradient's norm is cut to this.
        evaluations: how often the held-out loss is measured, and state saved, on the way.
        patience: stop after so many measurements without a new best.
    """

    epochs: int = 1
    batch_tokens: int = 2048
    lr: float = 3e-4
    least_lr: float = 0.05
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluations: int = 10
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            Problem(
                where=name,
                expected=expected,
                found=repr(found),
                remedy="Give such a value, or leave the setting out.",
            )
            for name, expected, found, right in self.checks()
            if not right
        ]
        if problems:
            raise UserError(problems)

    def checks(self) -> Iterable[Check]:
        """What must hold."""
        for name in ("epochs", "batch_tokens", "evaluations", "patience"):
            yield name, "a whole number, 1 or more", getattr(self, name), getattr(self, name) >= 1
        yield "lr", "a number above 0", self.lr, 0.0 < self.lr < float("inf")
        yield "clip", "a number above 0", self.clip, self.clip > 0.0
        yield "weight_decay", "a number, 0 or more", self.weight_decay, 0.0 <= self.weight_decay < float("inf")
        for name in ("least_lr", "warmup"):
            yield name, "a number from 0 to 1", getattr(self, name), 0.0 <= getattr(self, name) <= 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for the run folder."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class LayerwiseSettings(Pace):
    """How single layers are trained.

    Attributes:
        kl, mse, cosine: weights of the hidden-state losses (`intarsia.healing.losses`); KL alone is as published.
        weighting: what a token counts in the squared error.
        inputs: a layer is fed the `teacher`'s hidden states, as published, and is independent of the others; or those
            of the `student`: the layers before it, trained already, so that it learns to make good what they left.
        layers: which layers, see `layer_map.Layers`.
        only: names of tensors or modules inside a layer (`down_proj`, `mlp`, ...) that are trained; empty for all.
    """

    kl: float = 1.0
    mse: float = 1.0
    cosine: float = 0.0
    weighting: Weighting = "relative"
    inputs: Literal["teacher", "student"] = "teacher"
    layers: Layers = "spans"
    only: tuple[str, ...] = ()

    def checks(self) -> Iterable[Check]:
        """What must hold."""
        yield from Pace.checks(self)
        yield from _weights(self, ("kl", "mse", "cosine"))
        yield "weighting", f"one of {', '.join(get_args(Weighting))}", self.weighting, _is_weighting(self.weighting)
        yield "inputs", "teacher or student", self.inputs, self.inputs in ("teacher", "student")
        yield "layers", "spans or behind", self.layers, self.layers in get_args(Layers)


@dataclass(frozen=True, kw_only=True)
class EndToEndSettings(Pace):
    """How the whole model is trained.

    Attributes:
        logits, hidden, cross_entropy: weights of the losses: next-token distributions against the teacher's; hidden
            states behind the trainable layers against the teacher's at the ends of their spans (relative squared
            error); and the text itself.
        temperature: of the logits loss.
        top_k: learn from a cache of the teacher's so many likeliest tokens, written once and reused; None runs the
            teacher beside the student.
        lora: rank of low-rank changes to every linear layer (of a mixture, of its attention); None trains all
            parameters of the layers.
        micro_tokens: tokens of one forward and backward pass on one device; gradients are accumulated up to
            `batch_tokens`. None: as many as a step has, at most 2048 on CPU and 16384 elsewhere.
        checkpointing: recompute activations in the backward pass: slower, and much less memory.
        precision: `bf16` runs products in bfloat16 with parameters in float32; `no` runs all in float32; `auto` is
            bf16 for a model stored in 16 bits.
        log: a tracker that Accelerate knows, such as `tensorboard`.
    """

    lr: float = 1e-4
    batch_tokens: int = 8192
    logits: float = 1.0
    hidden: float = 0.0
    cross_entropy: float = 0.0
    temperature: float = 1.0
    top_k: int | None = None
    lora: int | None = None
    micro_tokens: int | None = None
    checkpointing: bool = False
    precision: Literal["auto", "bf16", "no"] = "auto"
    log: str | None = None

    def checks(self) -> Iterable[Check]:
        """What must hold."""
        yield from Pace.checks(self)
        yield from _weights(self, ("logits", "hidden", "cross_entropy"))
        yield "temperature", "a number above 0", self.temperature, 0.0 < self.temperature < float("inf")
        for name in ("top_k", "lora", "micro_tokens"):
            value = getattr(self, name)
            yield name, "a whole number, 1 or more", value, value is None or value >= 1
        yield "precision", "one of auto, bf16, no", self.precision, self.precision in ("auto", "bf16", "no")


def _is_weighting(name: str) -> bool:
    return name in get_args(Weighting)


def _weights(settings: object, names: tuple[str, ...]) -> Iterable[Check]:
    found = {name: getattr(settings, name) for name in names}
    right = all(0.0 <= weight < float("inf") for weight in found.values()) and any(found.values())
    yield " + ".join(names), "weights of 0 or more, at least one of them above 0", found, right
