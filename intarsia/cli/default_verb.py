"""A group of verbs, one of which may be left out: `eval MODEL --tasks ...` is `eval tasks MODEL --tasks ...`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

_DEFAULT = "tasks"
_HELP = ("--help", "-h")


class DefaultVerb(TyperGroup):
    """Takes words that begin with no verb of the group for arguments of its default verb."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the group does, with the verb put in where it is missing."""
        if args and args[0] not in self.commands and args[0] not in _HELP:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)
