"""What several stages begin with: a checked model, its tokenizer, a device, a dtype."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer

from intarsia.building.loaded_model import default_device
from intarsia.checkpoint.reader import Checkpoint
from intarsia.data.corpus import limited
from intarsia.errors import UserError

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The model's own tokenizer.

    Raises:
        UserError: the folder has none that transformers can read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
        return limited(tokenizer, checkpoint.architecture.vocabulary)
    except Exception as error:
        raise UserError.of(
            where=str(checkpoint.folder),
            expected="a tokenizer that transformers can read (tokenizer.json and tokenizer_config.json)",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy="Put the tokenizer's files beside the weights; one that needs code of its own is not run.",
        ) from error


def check_seq_len(checkpoint: Checkpoint, seq_len: int) -> None:
    """Refuse sequences that the model has no positions for.

    Raises:
        UserError: they are longer than the config says.
    """
    most = checkpoint.architecture.config.get("max_position_embeddings")
    if isinstance(most, int) and seq_len > most:
        raise UserError.of(
            where="--seq-len",
            expected=f"at most {most} (max_position_embeddings of the model)",
            found=str(seq_len),
            remedy="Use shorter sequences.",
        )


def device_of(name: str | None) -> torch.device:
    """The device of that name, or the best there is.

    Raises:
        UserError: there is no such device.
    """
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError.of(
            where="--device",
            expected="a device that torch can use here, such as cpu or cuda:0",
            found=repr(name),
            remedy=str(error).splitlines()[0],
        ) from error
    return device


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of that name; None for the checkpoint's own.

    Raises:
        UserError: not one of bfloat16, float16, float32.
    """
    if name is None:
        return None
    if name not in _DTYPES:
        raise UserError.of(
            where="--dtype", expected=f"one of {', '.join(_DTYPES)}", found=repr(name), remedy="Choose one of them."
        )
    return _DTYPES[name]
