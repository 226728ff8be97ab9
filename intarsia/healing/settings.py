"""Settings of every heal stage; those of trainings are checked when they are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from intarsia.architecture.spec import Part
from intarsia.errors import Problem, UserError
from intarsia.flags import flag, token_count

Layers: TypeAlias = Literal["spans", "behind"]
"""Which output layers a stage changes. `spans`: those that stand for more than one original layer, or were merged;
`behind`: these, and every layer after the first of them, which can correct what those before left."""

Weighting: TypeAlias = Literal["relative", "clip", "uniform"]
"""What a token counts in a squared error, see `intarsia.healing.losses`."""

Check: TypeAlias = tuple[str, str, object, bool]
"""A setting's name, what is expected, what was found, and whether it is right."""

RIDGES = tuple(10.0**exponent for exponent in (-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))


@dataclass(frozen=True, kw_only=True)
class ClosedFormSettings:
    """How the closed form fits."""

    layers: Layers = "behind"
    # Output projections to fit on layers that stand for more than themselves, in this order.
    changed: tuple[Part, ...] = ("mlp", "attention", "mlp")
    # Output projections to fit on the layers after them, in this order. All but the first only on as many layers, from
    # the front, as keep the cost of the fit within `closed_form.MOST_PASSES` of the model.
    unchanged: tuple[Part, ...] = ("mlp",)
    # `relative`: a token counts with 1 / |H^b|^2; `uniform`: all the same.
    weighting: Literal["relative", "uniform"] = "relative"
    # Every n-th sequence is held out, to choose the ridge strength by.
    held_out: int = 8
    # Strengths to choose from, relative to the feature scale, ascending.
    ridges: tuple[float, ...] = RIDGES


LAST = ClosedFormSettings(unchanged=("mlp", "attention"), held_out=32)
"""How the final model is fitted, where other text judges it: held-out sequences only choose the strength then, and few
are enough."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What both kinds of training share."""

    # How often every training sequence is seen.
    epochs: int = 1
    # Tokens of an optimiser step.
    batch_tokens: int = 2048
    # Peak of the learning rate; it warms up linearly and then falls along a cosine.
    lr: float = 3e-4
    # The last learning rate, as a share of the peak.
    least_lr: float = 0.05
    # Share of all steps in which the learning rate rises.
    warmup: float = 0.05
    # AdamW's decay of weights.
    weight_decay: float = 0.0
    # The gradient's norm is clipped to this.
    clip: float = 1.0
    # How often the held-out loss is measured, and state saved, on the way.
    evaluations: int = 10
    # Stop after this many measurements without a new best.
    patience: int = 3
    # Seed of everything random.
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
    """How single layers are trained."""

    # Peak of the learning rate.
    lr: float = flag(3e-4, "--layer-lr")
    # Tokens of an optimiser step.
    batch_tokens: int = flag(2048, "--layer-batch-tokens", metavar="N", parse=token_count)
    # Weight of the KL between softmaxed hidden states; alone it is as published.
    kl: float = flag(1.0, "--layer-kl")
    # Weight of the squared error of hidden states.
    mse: float = flag(1.0, "--layer-mse")
    # Weight of 1 - cosine of hidden states.
    cosine: float = flag(0.0, "--layer-cosine")
    # What a token counts in the squared error.
    weighting: Weighting = "relative"
    # A layer is fed the `teacher`'s hidden states, as published, and is independent of the others; or those of the
    # `student`: of the layers before it, trained already, so that it learns to correct what they left.
    inputs: Literal["teacher", "student"] = flag("teacher", "--layer-inputs")
    # Layers that are trained: those that were changed, or also every layer after the first of them.
    layers: Layers = flag("spans", "--train-layers")
    # Names of tensors or modules inside a layer (`down_proj`, `mlp`, ...) that are trained; empty for all.
    only: tuple[str, ...] = ()

    def checks(self) -> Iterable[Check]:
        """What must hold."""
        yield from Pace.checks(self)
        yield from _weights(self, ("kl", "mse", "cosine"))
        known = get_args(Weighting)
        yield "weighting", f"one of {', '.join(known)}", self.weighting, self.weighting in known
        yield "inputs", "teacher or student", self.inputs, self.inputs in ("teacher", "student")
        yield "layers", "spans or behind", self.layers, self.layers in get_args(Layers)


@dataclass(frozen=True, kw_only=True)
class EndToEndSettings(Pace):
    """How the whole model is trained."""

    # May differ when a training is resumed: what is pinned decides the result.
    not_pinned: ClassVar = ("log", "micro_tokens", "checkpointing")

    # Peak of the learning rate.
    lr: float = 1e-4
    # Tokens of an optimiser step.
    batch_tokens: int = flag(8192, "--step-tokens", metavar="N", parse=token_count)
    # Weight of the KL of next tokens, against the teacher's.
    logits: float = 1.0
    # Weight of the relative squared error of hidden states at the ends of the changed layers' spans.
    hidden: float = 0.0
    # Weight of the text itself.
    cross_entropy: float = 0.0
    # Temperature of the KL of next tokens.
    temperature: float = 1.0
    # Learn from a cache of the teacher's K likeliest tokens, written once and reused; None runs the teacher beside the
    # student.
    top_k: int | None = None
    # Rank of low-rank changes to every linear layer (of a mixture, of its attention); None trains all parameters of the
    # layers.
    lora: int | None = None
    # Tokens of one forward and backward pass on one device; gradients are accumulated up to `batch_tokens`. None: as
    # many as a step has, at most 2048 on CPU and 16384 elsewhere.
    micro_tokens: int | None = None
    # Recompute activations in the backward pass: slower, and much less memory.
    checkpointing: bool = False
    # `bf16` runs products in bfloat16 with parameters in float32; `no` runs all in float32; `auto` is bf16 for a model
    # stored in 16 bits.
    precision: Literal["auto", "bf16", "no"] = "auto"
    # A tracker that Accelerate knows, such as `tensorboard`.
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


def _weights(settings: object, names: tuple[str, ...]) -> Iterable[Check]:
    found = {name: getattr(settings, name) for name in names}
    right = all(0.0 <= weight < float("inf") for weight in found.values()) and any(found.values())
    yield " + ".join(names), "weights of 0 or more, at least one of them above 0", found, right
