"""Where calibration and evaluation text comes from."""

from __future__ import annotations

from collections.abc import Iterator

from intarsia.calibration.readers import READERS
from intarsia.calibration.source_spec import parse, source_error


def documents(spec: str, *, limit_bytes: int | None = None, seed: int | None = None) -> Iterator[str]:
    """The documents of a source, in its order; those without any text are left out.

    Args:
        spec: see `intarsia.calibration.source_spec`.
        limit_bytes: about how much is read of a source that is larger; None reads everything.
        seed: where there is a limit, sample across the source instead of reading its head. A hub data set is then
            read in an order shuffled by shards and through a buffer.

    Raises:
        UserError: whatever is wrong with the source, when it is reached.
    """
    source = parse(spec)
    found = False
    for text in READERS[source.kind](source, limit_bytes, seed):
        if text.strip():
            found = True
            yield text
    if not found:
        raise source_error(spec, "text", "none (empty, or nothing but white space)", "Pass a source that holds text.")
