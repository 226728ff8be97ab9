"""A built model's vocabulary and special tokens are those of the model that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from intarsia.building.materialize import RECIPE_FILE
from intarsia.checkpoint.gguf_source import kept_folder
from intarsia.checkpoint.hashing import cache_folder
from intarsia.checkpoint.writer import TOKENIZER_FILES, side_files, without_code
from intarsia.errors import Problem, Problems, UserError
from intarsia.exporting.verify import Skipped, Subject
from intarsia.inspection.own_code import trusts
from intarsia.model_name import DEMO, GGUF, hub_id, local_path
from intarsia.recipe import schema

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_AGAIN = "Copy the tokenizer's files from the model that this one was made from, or build it again."


def tokenizer_kept(subject: Subject) -> str:
    """The tokenizer loads, fits the embedding, and is the source's where that can be read."""
    folder, vocabulary = subject.folder, subject.checkpoint.architecture.vocabulary
    source = source_folder(folder)
    theirs = set() if source is None else _names(source)
    ours = _names(folder)
    if not ours and not theirs:
        raise Skipped("there is no tokenizer" + ("" if source is None else ", nor has the model that it was made from"))
    Problems(
        _problem(str(folder / name), "the file of the source", "no such file" if name not in ours else "another one")
        for name in sorted(theirs)
        if source is not None and (name not in ours or (folder / name).read_bytes() != without_code(source / name))
    ).raise_any()
    tokenizer = _loaded(folder)
    highest = max(tokenizer.get_vocab().values(), default=0)
    if source is not None:
        _compare_ids(folder, source)
        return f"{highest + 1:,} tokens, the same as those of {source.name}"
    # A source may have more tokens than rows (some classes add one that was never trained); its cut model has them too.
    if highest >= vocabulary:
        raise UserError([_problem(str(folder), f"ids below {vocabulary:,}, the embedding's rows", f"{highest:,}")])
    return f"{highest + 1:,} tokens; the model that it was made from cannot be read"


def generation_config_valid(subject: Subject) -> str:
    """The generation config can be used, and its tokens exist."""
    from transformers import GenerationConfig

    folder, vocabulary = subject.folder, subject.checkpoint.architecture.vocabulary
    file = folder / "generation_config.json"
    if not file.is_file():
        raise Skipped("there is none: transformers takes its defaults")
    try:
        config: Any = GenerationConfig.from_pretrained(folder)
        config.validate()
    except (ValueError, OSError, TypeError) as error:
        found = " ".join(str(error).split())[:300]
        raise UserError(
            [_problem(str(file), "values that transformers accepts", found, "Correct the file.")]
        ) from error
    beyond = []
    for name in _IDS:
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) else [value]
        exists = [index is None or (isinstance(index, int) and 0 <= index < vocabulary) for index in ids]
        beyond += [f"{name} {index}" for index, there in zip(ids, exists, strict=True) if not there]
    source = source_folder(folder)
    if beyond and source is not None and _json(source / file.name) == _json(file):
        return f"as in the source, which has {', '.join(beyond)}"
    expected = f"tokens below {vocabulary:,}"
    Problems(_problem(str(file), expected, found, "Correct the file.") for found in beyond).raise_any()
    return "valid"


def source_folder(folder: Path) -> Path | None:
    """The folder of the base that a built model's recipe names, if it can be had without a network."""
    if not (folder / RECIPE_FILE).is_file():
        return None
    recipe = schema.load(folder / RECIPE_FILE)
    variant = recipe.variant(recipe.base)
    if variant.model == DEMO:
        found = cache_folder() / "demo"
        return found if found.is_dir() else None
    path = local_path(variant.model)
    if path is not None and path.suffix == GGUF:
        return kept_folder(path)
    if path is not None:
        return path if path.is_dir() and (path / "config.json").is_file() else None
    name = hub_id(variant.model)
    if name is None:
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=variant.revision, local_files_only=True))
    except Exception:  # not in the cache, in whichever words this version of the client has for it
        return None


def _names(folder: Path) -> set[str]:
    return {
        name for name in side_files(folder, TOKENIZER_FILES) if name.endswith((".json", ".txt", ".model", ".jinja"))
    }


def _loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts())
    except Exception as error:  # tokenizers fail in many ways on files that are damaged
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError([_problem(str(folder), "a tokenizer that transformers reads", found)]) from error


def _compare_ids(folder: Path, source: Path) -> None:
    files = ["config.json", "generation_config.json"]
    pairs = [(name, _json(folder / name), _json(source / name)) for name in files if (source / name).is_file()]
    Problems(
        _problem(f"{folder / name}: {key}", f"{there.get(key)!r}, as in the source", repr(here.get(key)))
        for name, here, there in pairs
        for key in (*_IDS, "vocab_size")
        if here.get(key) != there.get(key)
    ).raise_any()


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _problem(where: str, expected: str, found: str, remedy: str = _AGAIN) -> Problem:
    return Problem(f"{where}: expected {expected}; found {found}.", remedy)
