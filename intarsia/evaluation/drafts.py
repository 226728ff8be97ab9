"""A model as the draft of another: assisted generation of transformers beside plain generation.

A draft proposes tokens, and the model checks them in one pass; what it would have written itself is accepted. Passes
are counted where the modules are called, so that nothing depends on how transformers counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from intarsia.errors import UserError
from intarsia.evaluation.likelihood import evaluating
from intarsia.progress import current


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """Assisted generation against plain, over all prompts."""

    prompts: int
    # That the model wrote with the draft.
    tokens: int
    # Share of the draft's proposals that were accepted.
    acceptance: float
    # Tokens for each pass of the model; 1 without a draft.
    tokens_per_pass: float
    # Tokens a second, medians over prompts.
    plain_per_s: float
    assisted_per_s: float
    # How often assisted generation is as fast as plain.
    speedup: float
    # Share of prompts with exactly the same greedy tokens; rounding may tell two nearly equal tokens apart.
    same_output: float


def assisted(
    model: Any, draft: Any, prompts: Sequence[Sequence[int]], *, new_tokens: int, enders: Sequence[int]
) -> Drafting:
    """Answer every prompt with and without the draft, in turns, after one prompt that is not counted.

    Raises:
        UserError: transformers cannot generate with this draft.
    """
    plain_s, assisted_s, same, written, passes, proposed = [], [], 0, 0, 0, 0
    with evaluating(model), evaluating(draft), current().task("assisted generation", 1 + len(prompts)) as task:
        for number, prompt in enumerate([prompts[0], *prompts]):
            plain, seconds = _written(model, prompt, new_tokens, enders)
            with _calls(model) as ours, _calls(draft) as theirs:
                helped, helped_seconds = _written(model, prompt, new_tokens, enders, assistant_model=draft)
            task.advance()
            if number == 0 or not (plain and helped):  # the first one warms up
                continue
            plain_s.append(len(plain) / seconds)
            assisted_s.append(len(helped) / helped_seconds)
            same += plain == helped
            written += len(helped)
            passes += len(ours)
            proposed += len(theirs)
    if not written:
        raise UserError("The model answers none of the prompts.", "Give other --prompts.")
    speeds = statistics.median(plain_s), statistics.median(assisted_s)
    return Drafting(
        prompts=len(plain_s),
        tokens=written,
        acceptance=max(0, written - passes) / max(1, proposed),
        tokens_per_pass=written / passes,
        plain_per_s=speeds[0],
        assisted_per_s=speeds[1],
        speedup=speeds[1] / speeds[0],
        same_output=same / len(plain_s),
    )


def _written(
    model: Any, prompt: Sequence[int], new_tokens: int, enders: Sequence[int], **how: Any
) -> tuple[list[int], float]:
    """What a model writes after a prompt, greedily, and the seconds that it takes."""
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    settings: dict[str, Any] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "max_new_tokens": new_tokens,
    }
    settings |= {"eos_token_id": list(enders) or None, "pad_token_id": enders[0] if enders else 0}
    started = time.perf_counter()
    try:
        with torch.inference_mode():
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **how)
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
    except (ValueError, NotImplementedError, AttributeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"transformers cannot generate with this draft: {said}.", "Leave --draft out.") from error
    return found[0, ids.shape[1] :].tolist(), time.perf_counter() - started


@contextmanager
def _calls(model: Any) -> Iterator[list[None]]:
    """An entry for every forward pass of a model."""
    found: list[None] = []
    hook = model.register_forward_hook(lambda *_: found.append(None))
    try:
        yield found
    finally:
        hook.remove()
