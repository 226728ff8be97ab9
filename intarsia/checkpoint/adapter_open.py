"""A member of a family opened for reading: a whole checkpoint, or an adapter on the family's base."""

from __future__ import annotations

from dataclasses import replace

from intarsia.checkpoint.adapter import is_adapter, open_adapter
from intarsia.checkpoint.adapter_config import CONFIG_FILE, read_adapter_config
from intarsia.checkpoint.model_name import wants_dequantizing
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint, resolve
from intarsia.errors import UserError
from intarsia.progress import Progress


def open_variant(
    model: str, *, revision: str | None = None, base: Checkpoint | None = None, progress: Progress | None = None
) -> Checkpoint:
    """A variant, wherever it is: a folder, a hub id, `demo`, or the folder or hub id of a PEFT adapter.

    Args:
        base: what an adapter is laid over; by default the base that its config names. Where the base is an adapter
            itself, the new one is laid over that one's base.

    Raises:
        UserError: it cannot be found, is no checkpoint that can be used, or is an adapter for another base.
    """
    folder = resolve(model, revision=revision, progress=progress)
    if not is_adapter(folder):
        return Checkpoint.open(folder, model=model, revision=revision, dequantize=wants_dequantizing(model))
    if base is None:
        named = read_adapter_config(folder).base_model
        if named is None:
            raise UserError.of(
                where=f"{folder / CONFIG_FILE}: base_model_name_or_path",
                expected="the model that the adapter is for",
                found="none",
                remedy="Name its base beside it, as the base of the recipe or family.",
            )
        try:
            base = open_checkpoint(named, progress=progress)
        except UserError as error:
            raise UserError.of(
                where=f"adapter {model}",
                expected=f"its base {named!r}, which it names",
                found=error.problems[0].found,
                remedy="Name a base that is there, as the base of the recipe or family.",
            ) from error
    base = replace(base, adapter=None)
    adapter = open_adapter(folder, base.headers, base_name=base.model)
    return replace(base, model=model, revision=revision, adapter=adapter)
