"""`intarsia push`: upload a model folder or an exported file to the HuggingFace hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from intarsia.errors import UserError
from intarsia.flags import Flag, Result
from intarsia.progress import current

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class PushResult(Result):
    """What was uploaded, or would be."""

    source: Path
    repository: str
    private: bool
    account: str
    # Files to upload, with `file` and `bytes`.
    files: tuple[dict[str, Any], ...]
    # Paths of this machine in the recipe, which becomes readable for everyone; None if there are none.
    mentions: tuple[str, ...] | None
    # Total size of the files.
    bytes: int
    # False for a dry run.
    sent: bool
    address: str | None


def push(
    source: Annotated[Path, Flag(positional=True, metavar="FOLDER|FILE", help="A built model, or an exported file.")],
    repository: Annotated[str, Flag(positional=True, metavar="NAME", help="`name` or `owner/name`.")],
    *,
    private: Annotated[bool, Flag(help="Make a new hub repository private.")] = False,
    dry_run: Annotated[bool, Flag(help="Print what would be uploaded; upload nothing.")] = False,
) -> PushResult:
    """Upload a model folder with its card, or a GGUF file, to the HuggingFace hub.

    A missing repository is created.

    Raises:
        UserError: there is nothing to upload, no login, or no connection to the hub.
    """
    from intarsia.building.materialize import RECIPE_FILE
    from intarsia.model_name import local_path
    from intarsia.recipe import schema

    source = Path(source)
    if not source.is_file() and not (source / "config.json").is_file():
        found = "a folder without a config.json" if source.is_dir() else "no file or folder"
        raise UserError(f"{source} is {found}.", "Give an output of `build`, `compress`, `heal` or `export`.")
    account = _account(repository)
    repository = repository if "/" in repository else f"{account}/{repository}"
    files = {source.name: source}
    if source.is_dir():
        every = {file.relative_to(source).as_posix(): file for file in sorted(source.rglob("*")) if file.is_file()}
        files = {name: file for name, file in every.items() if not any(p.startswith(".") for p in Path(name).parts)}
    mentions: tuple[str, ...] = ()
    if (source / RECIPE_FILE).is_file():
        variants = schema.load(source / RECIPE_FILE).variants
        mentions = tuple(variant.model for variant in variants if local_path(variant.model) is not None)
    for place in mentions:
        current().say(f"the uploaded recipe contains a path of this machine: {place}")
    sizes = {name: file.stat().st_size for name, file in files.items()}
    address = None if dry_run else _send(source, repository, list(files), private=private)
    return PushResult(
        source=source,
        repository=repository,
        private=private,
        account=account,
        files=tuple({"file": name, "bytes": size} for name, size in sizes.items()),
        mentions=mentions or None,
        bytes=sum(sizes.values()),
        sent=address is not None,
        address=address,
    )


def push_later(repository: str | None, *, private: bool, dry_run: bool = False) -> Callable[[R, Path], R]:
    """A function that uploads the output of a verb, and returns its result with `push` set.

    Check now, before the work, that the upload is possible. Without a repository nothing is uploaded.

    Args:
        dry_run: upload nothing, only report the target.

    Raises:
        UserError: see `push`; the returned function raises it too.
    """
    if repository is None:
        return lambda result, out: result
    account = _account(repository)

    def send_off(result: R, out: Path) -> R:
        facts: dict[str, Any] = {"repository": repository, "private": private, "account": account, "sent": False}
        if not dry_run:
            facts = push(out, repository, private=private).to_dict()
            facts["files"] = len(facts["files"])
        return dataclasses.replace(result, push=facts)  # type: ignore[type-var]

    return send_off


def _account(repository: str) -> str:
    """The logged-in account, checked before the work."""
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        return str(huggingface_hub.HfApi().whoami()["name"])
    except Exception as error:
        # The errors of a failed call differ between versions of the hub's client and of its HTTP library. None of them
        # is a defect of this package.
        raise _not_reached(repository, error, "Nothing was uploaded.") from error


def _send(what: Path, repository: str, names: list[str], *, private: bool) -> str:
    """Create the repository if it is missing, upload everything in one commit, and return its address."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    again = f"{what} is complete; try again with `intarsia push {what} {repository}`."
    commit: dict[str, Any] = {"repo_id": repository, "commit_message": f"Upload {what.name} with intarsia"}
    with current().task(f"uploading to {repository}", 1) as task:
        try:
            address = str(api.create_repo(repository, private=private, exist_ok=True))
            if what.is_file():
                api.upload_file(path_or_fileobj=what, path_in_repo=what.name, **commit)
            else:
                api.upload_folder(folder_path=what, allow_patterns=names, **commit)
        except Exception as error:  # see `_account`
            raise _not_reached(repository, error, again) from error
        task.advance()
    return address


def _not_reached(repository: str, error: Exception, then: str) -> UserError:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        found, remedy = "it is not a repository name", "Write `name` or `owner/name`."
    elif isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        found, remedy = "you are not logged in", "Run `hf auth login` with a token that may write."
    elif status == 403:
        found = "this account may not write there"
        remedy = "Use a token with write access, and a repository of yours or of an organisation you belong to."
    elif isinstance(error, errors.OfflineModeIsEnabled):
        found, remedy = "HF_HUB_OFFLINE is set", "Unset it."
    else:
        text = str(error).splitlines()[0] if str(error) else "no message"
        found, remedy = f"{type(error).__name__}: {text}", "Check the network, and try again."
    return UserError(f"Cannot upload to {repository}: {found}.", f"{remedy} {then}")
