"""From a model's name to its folder: `demo`, a local folder, a GGUF file, or a hub id.

See `intarsia.model_name` for the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from intarsia.checkpoint.gguf_source import demo_folder, gguf_folder, only_gguf
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.writer import TEMPLATES
from intarsia.errors import UserError
from intarsia.inspection.own_code import trusts
from intarsia.model_name import DEMO, GGUF, check_model, hub_gguf, local_path, plain_name
from intarsia.options import ModelRef
from intarsia.progress import current
from intarsia.recipe.recipe import Recipe

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
# Sub-folders and `consolidated` files repeat the weights in other formats.
_UNWANTED = ["*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx"]
_OTHER_WAYS = "Use a local model folder or `demo`"
_GGUF_ONLY = "--gguf-file NAME, or OWNER/NAME/FILE.gguf, names a GGUF file of a hub model."


def resolve(model: str, *, revision: str | None = None) -> Path:
    """The folder of a model; hub models are downloaded unless the hub's cache has them.

    A local folder takes precedence over a hub id of the same name; for a local folder `demo` write `./demo`. A GGUF
    file is converted to a folder the first time.

    Raises:
        UserError: there is no such folder, file or hub model, the hub cannot be reached, or a GGUF file cannot be read.
    """
    name = plain_name(model)
    path = local_path(name)
    here = name == DEMO or (path is not None and (path.is_dir() or path.suffix == GGUF))
    if here and revision is not None:
        raise UserError(f"--revision is given, but the model {name!r} is not on the hub.", "Leave it out.")
    if name == DEMO:
        return demo_folder()
    if here and path is not None:
        file = only_gguf(path) if path.is_dir() else path
        return path if file is None else gguf_folder(file)
    check_model(model)
    on_hub = hub_gguf(name)
    if on_hub is not None:
        from huggingface_hub import hf_hub_download

        repository, wanted = on_hub
        fetched = _fetched(lambda: hf_hub_download(repository, wanted, revision=revision), repository, revision)
        return gguf_folder(fetched)
    return _download(name, revision)


def open_checkpoint(model: ModelRef | str) -> Checkpoint:
    """Open a model for reading, by its name.

    Raises:
        UserError: it cannot be found, or is not a usable checkpoint.
    """
    ref = ModelRef.of(model)
    name = plain_name(ref.model)
    dequantize = ref.dequantize or name != ref.model
    if ref.gguf_file is not None:
        name = f"{name.rstrip('/')}/{ref.gguf_file}"
    folder = resolve(name, revision=ref.revision)
    return Checkpoint.open(folder, model=name, revision=ref.revision, dequantize=dequantize)


def inputs_of(
    *,
    models: Iterable[ModelRef | str | Path] = (),
    recipe: Recipe | None = None,
    texts: Iterable[str] = (),
    files: Iterable[str | Path] = (),
) -> list[Path]:
    """The local files and folders that a verb reads, and never writes to.

    Args:
        models: models, variants, adapters.
        recipe: its variants are models.
        texts: in the form of `--calibration` and `--eval-text`: FILE, NAME=FILE, FILE#0:0.9.
        files: anything else, such as run folders, recipes and family files.
    """
    named = [model.model if isinstance(model, ModelRef) else str(model) for model in models]
    named += [] if recipe is None else [variant.model for variant in recipe.variants]
    found = [path for path in map(local_path, named) if path is not None]
    for text in texts:  # names may contain `=` or `#`, so take every reading that is a file
        names = {text, text.partition("=")[2], text.rpartition("#")[0], text.partition("=")[2].rpartition("#")[0]}
        found += [Path(name) for name in sorted(names) if name and Path(name).exists()]
    return [*found, *map(Path, files)]


def _download(model: str, revision: str | None) -> Path:
    # Imported here because it takes longer than all work on a local folder.
    from huggingface_hub import snapshot_download

    def fetch() -> str:
        # It shows its own bars on a terminal.
        snapshot_download(model, revision=revision, allow_patterns=[f"{TEMPLATES}/*.jinja"])
        wanted = [*_WANTED, *(["*.py"] if trusts() else [])]
        return snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED)

    folder = _fetched(fetch, model, revision)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"The hub model {model} has no weights in safetensors files.",
            f"{_GGUF_ONLY} If a model has only pickled weights and you trust them, load it with transformers, save "
            "it to a local folder with save_pretrained(), and use that folder.",
        )
    return folder


def _fetched(fetch: Callable[[], str], model: str, revision: str | None) -> Path:
    current().say(f"Looking up {model} on the HuggingFace hub")
    try:
        return Path(fetch())
    except Exception as error:
        # The errors of a failed download differ between versions of the hub's client and of its HTTP library.
        # None of them is a defect of this package.
        raise not_downloaded(model, revision, error) from error


def not_downloaded(model: str, revision: str | None, error: Exception) -> UserError:
    """The error of a failed download, with alternatives."""
    from huggingface_hub import errors

    where = f"hub model {model}" + (f" at {revision}" if revision else "") + " (there is no local folder of this name)"
    fetch = f"or download it where there is a network: hf download {model} --local-dir FOLDER"
    if isinstance(error, errors.GatedRepoError):
        found, remedy = "it is gated", "Ask for access on its hub page, and run `hf auth login`."
    elif isinstance(error, errors.RepositoryNotFoundError):
        found = "it is not on the hub, or private"
        remedy = f"Check the spelling (for a private model run `hf auth login`). {_OTHER_WAYS}."
    elif isinstance(error, errors.RevisionNotFoundError):
        found, remedy = "it has no such revision", "Look up the branches and tags on the model's hub page."
    elif isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        found, remedy = "it has no file of that name", f"Look up its files on the hub page. {_GGUF_ONLY}"
    elif isinstance(error, errors.HFValidationError):
        found, remedy = "it is not a hub id", f"A hub id looks like `owner/name`. {_OTHER_WAYS}."
    elif isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        found = "the hub cannot be reached (or HF_HUB_OFFLINE is set), and the model is not in the hub's cache"
        remedy = f"{_OTHER_WAYS}, {fetch}."
    else:
        found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        remedy = f"Try again. {_OTHER_WAYS}, {fetch}."
    return UserError(f"The {where} cannot be downloaded: {found}.", remedy)
