"""What a verb reads. No verb writes to it, inside it or around it: `check_out(out, inputs=inputs_of(...))`.

    check_out(out.path, overwrite=out.overwrite, inputs=inputs_of(models=[model], texts=text.sources))

comes first in every verb that writes, before any work. Run folders and single files are checked alike, by
`check_no_input`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from intarsia.checkpoint.resolve import local_path
from intarsia.options import ModelRef
from intarsia.recipe.recipe import Recipe


def inputs_of(
    *,
    models: Iterable[ModelRef | str | Path] = (),
    recipe: Recipe | None = None,
    texts: Iterable[str] = (),
    files: Iterable[str | Path] = (),
) -> list[Path]:
    """The files and folders here that something is read from; what is on the hub is left out.

    Args:
        models: models, variants, adapters.
        recipe: its variants are models.
        texts: text as `--calibration` and `--eval-text` name it: FILE, NAME=FILE, FILE#0:0.9.
        files: anything else, such as run folders, recipes and family files.
    """
    named = [model.model if isinstance(model, ModelRef) else str(model) for model in models]
    named += [] if recipe is None else [variant.model for variant in recipe.variants]
    found = [path for path in map(local_path, named) if path is not None]
    found += [path for text in texts for path in _text_files(text)]
    return [*found, *map(Path, files)]


def _text_files(text: str) -> list[Path]:
    # A name may itself hold `=` or `#`, so every reading that is a file counts.
    names = {text, text.partition("=")[2], text.rpartition("#")[0], text.partition("=")[2].rpartition("#")[0]}
    return [Path(name) for name in sorted(names) if name and Path(name).exists()]
