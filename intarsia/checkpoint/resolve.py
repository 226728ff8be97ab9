"""From what a user calls a model to a folder: `demo`, a local folder, a GGUF file, or a hub id.

A GGUF file on the hub is `OWNER/NAME/FILE.gguf`. Recipes and family files of the first version write `dequantize:` in
front of a folder or hub id whose weights of 8 bits are to be read as ordinary ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from intarsia.checkpoint.demo import demo_folder
from intarsia.checkpoint.gguf_source import gguf_folder, only_gguf
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.writer import TEMPLATES
from intarsia.errors import UserError
from intarsia.progress import Progress, current

DEMO = "demo"
GGUF = ".gguf"
_DEQUANTIZE = "dequantize:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_GGUF = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w.-]+\.gguf)")
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
_OTHER_WAYS = "Pass a local model folder or `demo`"
_GGUF_ONLY = "--gguf-file NAME, or OWNER/NAME/FILE.gguf, names a GGUF file of a hub model."


def resolve(model: str, *, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The folder of a model; a hub model is downloaded when it is not in the hub's cache yet.

    A local folder counts before a hub id of the same name; a local folder called `demo` is `./demo`. A GGUF file is
    converted to a folder when that was not done before.

    Raises:
        UserError: there is no such folder, file or hub model, the hub cannot be reached, or a GGUF file cannot be read.
    """
    progress, name = progress or current(), split_name(model)[0]
    if name == DEMO:
        _refuse_revision(model, revision)
        return demo_folder(progress)
    path = local_path(name)
    if path is not None and path.is_dir():
        _refuse_revision(model, revision)
        file = only_gguf(path)
        return path if file is None else gguf_folder(file, progress)
    if path is not None and path.suffix == GGUF:
        _refuse_revision(model, revision)
        return gguf_folder(path, progress)
    if path is not None or hub_id(name) is None:
        raise UserError(
            f"model {model!r}: expected a model folder, a GGUF file, a hub id or `demo`; "
            f"found {'no such file or folder' if path is None else 'a file'}.",
            "Check the path; a model is the folder that holds config.json and the .safetensors files.",
        )
    on_hub = hub_gguf(name)
    if on_hub is not None:
        return gguf_folder(_download_file(*on_hub, revision, progress), progress)
    return _download(name, revision, progress)


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dequantize: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """A model opened for reading, wherever it is.

    Args:
        gguf_file: the file of that name in a folder or hub model.
        dequantize: read weights of 8 bits as ordinary ones.

    Raises:
        UserError: it cannot be found, or is no checkpoint that can be used.
    """
    model = asked_for(model, dequantize=dequantize, gguf_file=gguf_file)
    folder = resolve(model, revision=revision, progress=progress)
    return Checkpoint.open(folder, model=model, revision=revision, dequantize=split_name(model)[1])


def split_name(model: str) -> tuple[str, bool]:
    """A model's name without `dequantize:`, and whether it had it."""
    return model.removeprefix(_DEQUANTIZE), model.startswith(_DEQUANTIZE)


def asked_for(model: str, *, dequantize: bool = False, gguf_file: str | None = None) -> str:
    """One name for a model and its options, as recipes keep it."""
    name, dequantized = split_name(model)
    if gguf_file is not None:
        name = f"{name.rstrip('/')}/{gguf_file}"
    return f"{_DEQUANTIZE}{name}" if dequantize or dequantized else name


def local_path(model: str) -> Path | None:
    """The file or folder of that name; None where there is none. `demo` is never one, but `./demo` is."""
    name, _ = split_name(model)
    path = Path(os.path.expanduser(name))
    return path if name and name != DEMO and path.exists() else None


def lasting(model: str) -> str:
    """The name as a recipe keeps it: a local path is made absolute."""
    path = local_path(model)
    return model if path is None else asked_for(str(path.resolve()), dequantize=split_name(model)[1])


def hub_id(model: str) -> str | None:
    """The model's id on the hub; None for a local one and for what is no such id."""
    name, _ = split_name(model)
    if name == DEMO or local_path(model) is not None:
        return None
    found = hub_gguf(name)
    if found is not None:
        return found[0]
    return name if _HUB_ID.fullmatch(name) and not name.endswith((".safetensors", GGUF, ".json")) else None


def hub_gguf(model: str) -> tuple[str, str] | None:
    """Hub id and file name of a GGUF file on the hub."""
    found = _HUB_GGUF.fullmatch(model)
    return None if found is None else (found[1], found[2])


def _refuse_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise UserError(
            f"revision {revision!r}: expected a revision only with a hub id; "
            f"found {model!r}, which is not looked up on the hub.",
            "Leave the revision out.",
        )


def _download(model: str, revision: str | None, progress: Progress) -> Path:
    # Imported here because it takes longer than everything that a local folder needs.
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        # Shows its own bars on a terminal.
        snapshot_download(model, revision=revision, allow_patterns=[f"{TEMPLATES}/*.jinja"])
        return snapshot_download(model, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)

    folder = _fetched(fetch, model, revision, progress)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"hub model {model}: expected weights in safetensors files; found none.",
            f"{_GGUF_ONLY} Where a model has only pickled weights and you trust them, load it with transformers "
            "and save it to a local folder with save_pretrained(), then pass that folder.",
        )
    return folder


def _download_file(model: str, file: str, revision: str | None, progress: Progress) -> Path:
    from huggingface_hub import hf_hub_download

    return _fetched(lambda: hf_hub_download(model, file, revision=revision), model, revision, progress)


def _fetched(fetch: Callable[[], str], model: str, revision: str | None, progress: Progress) -> Path:
    progress.say(f"Looking up {model} on the HuggingFace hub")
    try:
        return Path(fetch())
    except Exception as error:
        # Which errors come out of a failed download differs between versions of the hub's client and of the HTTP
        # library below it. None of them is a defect of this package.
        raise not_downloaded(model, revision, error) from error


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
    elif isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        found, remedy = "no file of that name in it", f"Look up its files on the hub page. {_GGUF_ONLY}"
    elif isinstance(error, errors.HFValidationError):
        found, remedy = "not a hub id", f"A hub id looks like `owner/name`. {_OTHER_WAYS}."
    elif isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        found = "the hub cannot be reached (or HF_HUB_OFFLINE is set), and the model is not in the hub's cache"
        remedy = f"{_OTHER_WAYS}, {fetch}."
    else:
        found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        remedy = f"Try again. {_OTHER_WAYS}, {fetch}."
    return UserError(f"{where}: expected {expected}; found {found}.", remedy)
