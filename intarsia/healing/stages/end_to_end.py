"""The stage `end-to-end`: the whole model is trained toward the original, in every launched process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from intarsia.errors import UserError
from intarsia.flags import flag, token_count
from intarsia.healing.settings import Check, Pace
from intarsia.registry import heal_stage

if TYPE_CHECKING:
    from intarsia.architecture.spec import Architecture
    from intarsia.healing.pipeline import HealContext
    from intarsia.recipe.recipe import Recipe

TEACHER_PASSES = 1.0


@dataclass(frozen=True, kw_only=True)
class EndToEndSettings(Pace):
    """How the whole model is trained. The defaults are the best measured (dev/LOG.md)."""

    # These may differ when a training is resumed.
    not_pinned: ClassVar = ("log", "micro_tokens", "checkpointing")

    # Peak of the learning rate (default: 1e-3 of low-rank changes, 1e-4 of all parameters).
    lr: float | None = None
    # Tokens of an optimiser step.
    batch_tokens: int = flag(2048, "--step-tokens", metavar="N", parse=token_count)
    # Weight of the KL of next tokens, against the teacher's.
    logits: float = 1.0
    # Weight of the relative squared error of hidden states after the last layer of each changed layer's span.
    hidden: float = 0.0
    # Weight of the text itself.
    cross_entropy: float = 0.0
    # Temperature of the KL of next tokens.
    temperature: float = 1.0
    # Learn from the teacher's K likeliest tokens, written before the training; `none` learns from all tokens, with the
    # teacher beside the student.
    top_k: int | None = 64
    # Rank of low-rank changes to every linear layer (of a mixture, of its attention); `none` trains all parameters of
    # the layers.
    lora: int | None = 64
    # Tokens of one forward and backward pass on one device; gradients are accumulated up to --step-tokens (default: a
    # whole step, at most 2048 on CPU and 16384 elsewhere).
    micro_tokens: int | None = None
    # Recompute activations in the backward pass: slower, and much less memory.
    checkpointing: bool = False
    # `bf16` runs products in bfloat16 with parameters in float32; `no` runs all in float32; `auto` is bf16 for a model
    # stored in 16 bits, where such products are fast.
    precision: Literal["auto", "bf16", "no"] = "auto"
    # A tracker that Accelerate knows, such as `tensorboard`.
    log: str | None = None

    def passes_at_most(self, architecture: Architecture, *, starts: int, tokens: int) -> float:
        """Passes of the whole model over a text that a training takes."""
        return TEACHER_PASSES + self.student_passes

    @property
    def student_passes(self) -> float:
        """Passes that the student takes, forward and back."""
        return 4.0 * self.epochs

    @property
    def peak(self) -> float:
        """Peak of the learning rate."""
        usual = 1e-4 if self.lora is None else 1e-3
        return usual if self.lr is None else self.lr

    def checks(self) -> Iterator[Check]:
        """Conditions on the values."""
        yield from super().checks()
        yield self.weights("logits", "hidden", "cross_entropy")
        yield 0.0 < self.temperature < float("inf"), ("temperature",), "a number above 0"
        yield from self.at_least(1, "top_k", "lora", "micro_tokens")


def check(settings: EndToEndSettings) -> None:
    """Check that Accelerate knows the tracker.

    Raises:
        UserError: it does not.
    """
    from accelerate.tracking import get_available_trackers

    known = [str(tracker) for tracker in get_available_trackers()]
    if settings.log is not None and settings.log not in known:
        raise UserError(
            f"--log {settings.log} is no tracker whose package is installed.",
            f"Installed are: {', '.join(known) or 'none'}.",
        )


def memory(settings: EndToEndSettings, parameters: int, teacher_bytes: int) -> int:
    """Bytes that training takes at least: the teacher's weights, and the student's with their gradients and two moments
    in float32; of low-rank changes the student's weights alone."""
    return teacher_bytes + (16 if settings.lora is None else 2) * parameters


@heal_stage("end-to-end", settings=EndToEndSettings, whole_model=True, check=check, memory=memory, paper="2510.15304")
def end_to_end(context: HealContext, recipe: Recipe, settings: EndToEndSettings) -> Recipe:
    """Train the whole model toward the original: next tokens, and hidden states where that is asked for."""
    from intarsia.healing.end_to_end import lesson_depths, train
    from intarsia.healing.teacher import Teacher
    from intarsia.healing.training import Text

    checkpoint = context.teacher or context.variants[recipe.base]
    found, reports = train(
        recipe,
        context.variants,
        Text.of(context.calibration, context.held_out, turns=context.turns(settings.loss_on)),
        lambda: Teacher(context.teaching.model, checkpoint.architecture, lesson_depths(recipe, settings)),
        settings=settings,
        folder=context.folder,
        device=context.device,
    )
    context.details += reports
    return found
