"""What a verb returns: a dataclass whose `to_dict()` is what `--json` prints."""

from __future__ import annotations

from typing import Any

from intarsia.flags import plain


class Result:
    """Base of the result of a verb."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data; `push` only where something was sent."""
        found: dict[str, Any] = plain(self)
        return {key: value for key, value in found.items() if key != "push" or value is not None}
