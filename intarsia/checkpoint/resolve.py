"""From what a user calls a model to a folder: `demo`, a local folder, or a hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from intarsia.checkpoint.demo import demo_folder
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from intarsia.progress import Progress, Silent

DEMO = "demo"
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "tokenizer*",
    "vocab*",
    "merges*",
    "LICENSE*",
    "NOTICE*",
]
# Sub-folders and `consolidated` files hold the same weights once more, in other formats.
_UNWANTED = ["*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_OTHER_WAYS = "Pass a local model folder or `demo`"


def resolve(model: str, *, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The folder of a model; a hub model is downloaded when it is not in the hub's cache yet.

    A local folder counts before a hub id of the same name; a local folder called `demo` is `./demo`.

    Raises:
        UserError: there is no such folder or hub model, or the hub cannot be reached.
    """
    if model == DEMO:
        _refuse_revision(model, revision)
        return demo_folder(progress or Silent())
    folder = Path(os.path.expanduser(model))
    if model and folder.is_dir():
        _refuse_revision(model, revision)
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(model) or model.endswith((".safetensors", ".gguf", ".json")):
        raise UserError.of(
            where=f"model {model!r}",
            expected="a model folder, a hub id or `demo`",
            found="a file" if model and folder.exists() else "no such folder",
            remedy="Check the path; a model is the folder that holds config.json and the .safetensors files.",
        )
    return _download(model, revision, progress or Silent())


def open_checkpoint(model: str, *, revision: str | None = None, progress: Progress | None = None) -> Checkpoint:
    """A model opened for reading, wherever it is.

    Raises:
        UserError: it cannot be found, or is no checkpoint that can be used.
    """
    folder = resolve(model, revision=revision, progress=progress)
    return Checkpoint.open(folder, model=model, revision=revision)


def _refuse_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise UserError.of(
            where=f"revision {revision!r}",
            expected="a revision only with a hub id",
            found=f"{model!r}, which is not looked up on the hub",
            remedy="Leave the revision out.",
        )


def _download(model: str, revision: str | None, progress: Progress) -> Path:
    # Imported here because it takes longer than everything that a local folder needs.
    from huggingface_hub import snapshot_download

    progress.say(f"Looking up {model} on the HuggingFace hub")
    try:
        # Shows bars of its own on a terminal.
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:
        # Which errors come out of a failed download differs between versions of the hub's client and of the HTTP
        # library below it. None of them is a defect of this package.
        raise not_downloaded(model, revision, error) from error
    if not any(folder.glob("*.safetensors")):
        raise UserError.of(
            where=f"hub model {model}",
            expected="weights in safetensors files",
            found="none",
            remedy=(
                "Where a model has only pickled weights and you trust them, load it with transformers and save it "
                "to a local folder with save_pretrained(), then pass that folder."
            ),
        )
    return folder


def not_downloaded(model: str, revision: str | None, error: Exception) -> UserError:
    """Why the hub did not give a model, and what to pass instead."""
    from huggingface_hub import errors

    where = f"hub model {model}" + (f" at {revision}" if revision else "") + " (no local folder is called so)"
    fetch = f"or fetch it where there is a network: hf download {model} --local-dir FOLDER"
    expected = "a model that can be downloaded"
    if isinstance(error, errors.GatedRepoError):
        found, remedy = "a gated model", "Ask for access on its hub page and run `hf auth login`."
    elif isinstance(error, errors.RepositoryNotFoundError):
        found = "no such model on the hub, or a private one"
        remedy = f"Check the spelling (for a private model run `hf auth login`). {_OTHER_WAYS}."
    elif isinstance(error, errors.RevisionNotFoundError):
        found, remedy = "no such revision", "Look up the branches and tags on the model's hub page."
    elif isinstance(error, errors.HFValidationError):
        found, remedy = "not a hub id", f"A hub id looks like `owner/name`. {_OTHER_WAYS}."
    elif isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        found = "the hub cannot be reached (or HF_HUB_OFFLINE is set), and the model is not in the hub's cache"
        remedy = f"{_OTHER_WAYS}, {fetch}."
    else:
        found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        remedy = f"Try again. {_OTHER_WAYS}, {fetch}."
    return UserError.of(where=where, expected=expected, found=found, remedy=remedy)
