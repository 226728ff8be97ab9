"""A model known by its config file alone: nothing else is read or downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intarsia.architecture.detect import detect
from intarsia.architecture.spec import Architecture
from intarsia.checkpoint.adapter import is_adapter, read_adapter_config
from intarsia.checkpoint.files import read_config
from intarsia.checkpoint.multimodal import text_config
from intarsia.checkpoint.resolve import DEMO, not_downloaded, resolve
from intarsia.errors import UserError
from intarsia.progress import Progress
from intarsia.tailoring.kinship import Member


def read_config_only(
    model: str, revision: str | None, base: Member | None, progress: Progress, *, configs: Path | None = None
) -> tuple[Mapping[str, Any], Architecture]:
    """The config of a model and the architecture that it promises; an adapter has those of `base`.

    Args:
        configs: a folder with the config file of a hub id in `ORGANISATION/NAME/config.json`, which is then not asked
            of the hub.

    Raises:
        UserError: there is no such config, or it is of no known family.
    """
    folder = Path(os.path.expanduser(model))
    if model == DEMO or folder.is_dir():
        folder = resolve(model, revision=revision, progress=progress)
        if is_adapter(folder) and base is not None:
            read_adapter_config(folder)
            return base.config, base.architecture
        config = text_config(read_config(folder), where=str(folder))
        return config, detect(config, where=str(folder / "config.json"))
    if configs is not None and (configs / model / "config.json").is_file():
        folder = configs / model
        config = text_config(read_config(folder), where=str(folder))
        return config, detect(config, where=str(folder / "config.json"))
    config = _download(model, revision)
    return config, detect(config, where=f"config.json of {model}")


def _download(model: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        found = json.loads(Path(hf_hub_download(model, "config.json", revision=revision)).read_text(encoding="utf-8"))
    except Exception as error:
        # Which errors come out of a failed download differs between versions of the hub's client.
        raise not_downloaded(model, revision, error) from error
    if not isinstance(found, dict):
        raise UserError.of(
            where=f"config.json of {model}",
            expected="a JSON object",
            found=type(found).__name__,
            remedy="Check the name.",
        )
    return found
