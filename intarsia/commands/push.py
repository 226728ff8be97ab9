"""`intarsia push`: a model folder or an exported file goes to the HuggingFace hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from intarsia import progress
from intarsia.errors import UserError
from intarsia.flags import Flag

if TYPE_CHECKING:
    from intarsia.exporting.hub import Parcel

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """What was sent."""

    source: Path
    parcel: Parcel
    # None for a dry run, which sends nothing
    address: str | None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        mentions = list(self.parcel.mentions) or None
        return {
            "source": str(self.source),
            **self.parcel.to_dict(),
            "mentions": mentions,
            "sent": self.address is not None,
            "address": self.address,
        }


def push(
    source: Annotated[Path, Flag(positional=True, metavar="FOLDER|FILE", help="A built model, or an exported file.")],
    repository: Annotated[str, Flag(positional=True, metavar="NAME", help="`name` or `owner/name`.")],
    *,
    private: Annotated[bool, Flag(help="Make a new hub repository private.")] = False,
    dry_run: Annotated[bool, Flag(help="Print what would be sent; send nothing.")] = False,
) -> PushResult:
    """Send a model folder with its card, or a GGUF file, to the HuggingFace hub.

    A repository that does not exist is made.

    Raises:
        UserError: there is nothing to send, nobody is logged in, or the hub cannot be reached.
    """
    from intarsia.exporting.hub import account_for, parcel, send

    source = Path(source)
    if not source.is_file() and not (source / "config.json").is_file():
        found = "a folder without a config.json" if source.is_dir() else "no file or folder"
        raise UserError(f"{source} is {found}.", "Pass what `build`, `compress`, `heal` or `export` has written.")
    wanted = parcel(source, repository, private=private, account=account_for(repository))
    for place in wanted.mentions:
        progress.current().say(f"the uploaded recipe names a place on this machine: {place}")
    return PushResult(source=source, parcel=wanted, address=None if dry_run else send(source, wanted))


def push_later(repository: str | None, *, private: bool, dry_run: bool = False) -> Callable[[R, Path], R]:
    """What a verb calls with its result and what it has written: sends that, and gives the result with `push` set.

    Whether it can be sent is asked now, before the work. Without a repository nothing is sent.

    Args:
        dry_run: nothing is written; the result only says where it would go.

    Raises:
        UserError: see `push`; so does what is returned.
    """
    if repository is None:
        return lambda result, out: result
    from intarsia.exporting.hub import account_for

    account = account_for(repository)

    def send_off(result: R, out: Path) -> R:
        wanted = {"repository": repository, "private": private, "account": account, "sent": False}
        sent: dict[str, Any] = wanted if dry_run else push(out, repository, private=private).to_dict()
        facts = sent if dry_run else {**sent, "files": len(sent["files"])}
        return dataclasses.replace(result, push=facts)  # type: ignore[type-var]

    return send_off
