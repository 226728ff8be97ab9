"""Push: a model folder or an exported file goes to the HuggingFace hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.errors import UserError
from intarsia.exporting.hub import Parcel, account_for, parcel, send
from intarsia.progress import Progress, Silent


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """What was sent; `address` is None for a dry run, which sends nothing."""

    source: Path
    parcel: Parcel
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
    source: Path,
    repository: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PushResult:
    """Send a model folder with its card, or a GGUF file.

    Args:
        repository: `name`, or `owner/name`; made where it does not exist.
        private: for a repository that is made.
        dry_run: say what would be sent, and send nothing.

    Raises:
        UserError: there is nothing to send, nobody is logged in, or the hub cannot be reached.
    """
    source, progress = Path(source), progress or Silent()
    if not source.is_file() and not (source / "config.json").is_file():
        raise UserError.of(
            where=str(source),
            expected="a model folder, or an exported file",
            found="a folder without a config.json" if source.is_dir() else "nothing",
            remedy="Pass what `intarsia build`, `compress`, `heal` or `export` has written.",
        )
    wanted = parcel(source, repository, private=private, account=account_for(repository))
    for place in wanted.mentions:
        progress.say(f"the recipe that goes along names a place on this machine: {place}")
    return PushResult(source=source, parcel=wanted, address=None if dry_run else send(source, wanted, progress))


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """A verb's result, and what was sent of it."""

    result: Any
    push: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain data: the result's own, and the push beside it."""
        return {**self.result.to_dict(), "push": dict(self.push)}


def push_later(
    repository: str | None,
    *,
    private: bool,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Callable[[Any, Path], Any]:
    """What a verb calls with its result and what it has written: sends that, and gives the result with what was sent.

    Whether it can be sent is asked now, before the work that comes first. Without a repository nothing is sent.

    Args:
        dry_run: nothing will have been written, so only where it would go is told.

    Raises:
        UserError: see `push`; so does what is returned.
    """
    if repository is None:
        return lambda result, out: result
    account = account_for(repository)

    def send_off(result: Any, out: Path) -> Pushed:
        if dry_run:
            wanted = {"repository": repository, "private": private, "account": account, "sent": False}
            return Pushed(result=result, push=wanted)
        sent = push(out, repository, private=private, progress=progress).to_dict()
        return Pushed(result=result, push={**sent, "files": len(sent["files"])})

    return send_off
