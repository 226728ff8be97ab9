"""A model folder, or an exported file, sent to the HuggingFace hub."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intarsia.building.materialize import RECIPE_FILE
from intarsia.checkpoint.resolve import local_path
from intarsia.errors import UserError
from intarsia.progress import current
from intarsia.recipe import schema

_OWNER = "A repository is called `name`, or `owner/name`."


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What is, or would be, sent. `mentions`: places on this machine that the recipe names, which everyone can read."""

    repository: str
    private: bool
    account: str
    files: tuple[dict[str, Any], ...]
    mentions: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file["bytes"] for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "files": list(self.files), "bytes": self.nbytes}


def account_for(repository: str) -> str:
    """The account that is logged in, checked before the work.

    Raises:
        UserError: nobody is, the hub cannot be reached, or the name is none that it takes.
    """
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        return str(huggingface_hub.HfApi().whoami()["name"])
    except Exception as error:
        # Which errors come out of a failed call differs between versions of the hub's client and of the HTTP library
        # below it. None of them is a defect of this package.
        raise _not_reached(repository, error, "Nothing was sent.") from error


def parcel(what: Path, repository: str, *, private: bool, account: str) -> Parcel:
    """What sending a folder or a file means."""
    files = [what] if what.is_file() else sorted(file for file in what.rglob("*") if file.is_file())
    shown = [(file.name if what.is_file() else file.relative_to(what).as_posix(), file) for file in files]
    mentions: tuple[str, ...] = ()
    if (what / RECIPE_FILE).is_file():
        variants = schema.load(what / RECIPE_FILE).variants
        mentions = tuple(variant.model for variant in variants if local_path(variant.model) is not None)
    return Parcel(
        repository=repository if "/" in repository else f"{account}/{repository}",
        private=private,
        account=account,
        files=tuple(
            {"file": name, "bytes": file.stat().st_size}
            for name, file in shown
            if not any(part.startswith(".") for part in Path(name).parts)
        ),
        mentions=mentions,
    )


def send(what: Path, wanted: Parcel) -> str:
    """Make the repository where it does not exist, and send everything in one commit; its address.

    Raises:
        UserError: the hub did not take it. The folder stays as it is.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    again = f"{what} is complete; try again with `intarsia push {what} {wanted.repository}`."
    message = f"Upload {what.name} with intarsia"
    with current().task(f"sending to {wanted.repository}", 1) as task:
        try:
            address = str(api.create_repo(wanted.repository, private=wanted.private, exist_ok=True))
            if what.is_file():
                api.upload_file(
                    path_or_fileobj=what, path_in_repo=what.name, repo_id=wanted.repository, commit_message=message
                )
            else:
                api.upload_folder(
                    folder_path=what,
                    repo_id=wanted.repository,
                    commit_message=message,
                    allow_patterns=[file["file"] for file in wanted.files],
                )
        except Exception as error:  # see `account_for`
            raise _not_reached(wanted.repository, error, again) from error
        task.advance()
    return address


def _not_reached(repository: str, error: Exception, then: str) -> UserError:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        found, remedy = "it is no name of a repository", _OWNER
    elif isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        found, remedy = "nobody is logged in", "Run `hf auth login` with a token that may write."
    elif status == 403:
        found = "this account may not write there"
        remedy = "Use a token that may write, and a repository of your own or of an organisation you belong to."
    elif isinstance(error, errors.OfflineModeIsEnabled):
        found, remedy = "HF_HUB_OFFLINE is set", "Unset it."
    else:
        text = str(error).splitlines()[0] if str(error) else "no message"
        found, remedy = f"{type(error).__name__}: {text}", "Look at the network, and try again."
    return UserError(f"The hub does not take {repository}: {found}.", f"{remedy} {then}")
