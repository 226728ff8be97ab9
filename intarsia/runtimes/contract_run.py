"""What every runtime may expect of a model folder, checked by loading and running it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from intarsia.checkpoint.files import read_config
from intarsia.checkpoint.wrapper import is_wrapped
from intarsia.errors import Problem, UserError

_TEXT = "A model that was made shallower should still say what it said before, word by word"
_NEW_TOKENS = 12


def loads(folder: Path) -> tuple[str, Any]:
    """What the auto class says while it loads the folder, and the model.

    Raises:
        UserError: it does not load, or tensors are missing, too many or of another shape.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText if is_wrapped(read_config(folder)) else AutoModelForCausalLM
    try:
        with _quiet():
            model, told = auto.from_pretrained(
                folder, dtype="auto", trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # loading fails in many ways, and each of them is the folder's failure
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError([_problem(folder, f"a folder that {auto.__name__} loads", found)]) from error
    problems = []
    for key, what in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "unexpected"),
        ("mismatched_keys", "other shape"),
    ):
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in told.get(key) or ())
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(_problem(folder, "just the tensors of the model", f"{what}: {', '.join(names[:5])}{more}"))
    if problems:
        raise UserError(problems)
    return f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')}", model.eval()


@torch.no_grad()
def generates(folder: Path, model: Any) -> str:
    """Greedy tokens with the cache are those without; in float32, where no rounding decides.

    Raises:
        UserError: they differ, or a logit is not finite.
    """
    from transformers import GenerationConfig

    model = model.float()
    prompt = _prompt(folder, model.config.get_text_config().vocab_size)
    logits = model(input_ids=prompt).logits
    if not bool(torch.isfinite(logits).all()):
        raise UserError([_problem(folder, "finite logits", "NaN or infinity")])
    written = []
    for cache in (True, False):
        settings = GenerationConfig(
            max_new_tokens=_NEW_TOKENS, do_sample=False, use_cache=cache, eos_token_id=None, pad_token_id=0
        )
        found = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        written.append(found[0, prompt.shape[1] :].tolist())
    if written[0] != written[1]:
        raise UserError(
            [_problem(folder, f"the tokens written without a cache, {written[1]}", f"{written[0]} with one")]
        )
    return f"{len(written[0])} tokens, with and without a cache"


def _prompt(folder: Path, vocabulary: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    try:
        ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(_TEXT)["input_ids"][:32]
    except Exception:  # whether the tokenizer loads is a check of its own
        ids = []
    ids = [index for index in ids if index < vocabulary]
    return torch.tensor([ids or [index % vocabulary for index in range(3, 19)]])


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers says about keys is in the check's own words."""
    from transformers.utils import logging as module

    logging: Any = module  # it has no annotations
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _problem(folder: Path, expected: str, found: str) -> Problem:
    return Problem(where=str(folder), expected=expected, found=found, remedy="Build the folder again.")
