"""Which files a model folder consists of: the config, and the safetensors files with or without an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intarsia.checkpoint.tensor_file import TensorHeader, read_headers
from intarsia.disk import read_json
from intarsia.errors import Problem, Problems, UserError, few
from intarsia.progress import current

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_NAMED = 5
_OBJECT = "a file with one JSON object"


def read_all_headers(folder: Path) -> dict[str, TensorHeader]:
    """Every tensor of the folder: files in name order, tensors in the order of their bytes.

    Raises:
        UserError: there are no safetensors weights, or a file is missing, damaged or not what the index says.
    """
    if (folder / SINGLE_FILE).exists():
        headers = {header.name: header for header in read_headers(folder / SINGLE_FILE)}
        if (folder / INDEX_FILE).exists():
            current().say(f"{folder} has {SINGLE_FILE} and {INDEX_FILE}: the single file counts, as in transformers")
    elif (folder / INDEX_FILE).exists():
        index = _read_index(folder / INDEX_FILE)
        headers = _read_shards(folder, index["weight_map"])
        metadata, nbytes = index.get("metadata"), sum(header.nbytes for header in headers.values())
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        if stated not in (None, nbytes):
            current().say(
                f"{folder / INDEX_FILE}: total_size is {stated}, and the files hold {nbytes}: the files count"
            )
    else:
        raise _no_weights(folder)
    read = {header.file.name for header in headers.values()}
    others = sorted(
        file.name
        for file in folder.glob("*.safetensors")
        if file.name not in read and not file.name.startswith("adapter_")
    )
    if others:
        current().say(f"{few(others)} in {folder} is not read: {few(sorted(read))} counts")
    return headers


def _read_index(file: Path) -> dict[str, Any]:
    remedy = "Get the index again, or save the model anew with save_pretrained()."
    index = read_json(file, expected=_OBJECT, remedy=remedy)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: weight_map names no tensors.", remedy)
    Problems(
        Problem(f"{file}: {name} is in {shard!r}, which is no name of a shard in this folder.", remedy)
        for name, shard in weight_map.items()
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors")
    ).raise_any(most=_MOST_NAMED)
    return index


def _read_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, TensorHeader]:
    headers: dict[str, TensorHeader] = {}
    problems = Problems()
    for shard in sorted(set(weight_map.values())):
        file = folder / shard
        if not file.exists():
            problems.add(f"{file}: the index names this shard, and it is not there.", "Get this file again.")
            continue
        with problems:
            found = read_headers(file)
            headers |= {header.name: header for header in found if weight_map.get(header.name) == shard}
            strays = sorted({header.name for header in found} - headers.keys())
            if strays:
                current().say(f"{file} also holds {few(strays)}, which {INDEX_FILE} has elsewhere: the index counts")
            absent = sorted({name for name, home in weight_map.items() if home == shard} - headers.keys())
            if absent:
                problems.add(
                    f"{file} lacks {few(absent)}, which the index has there.",
                    "Index and shards do not belong together; get the checkpoint again.",
                )
    problems.raise_any()
    return headers


def _no_weights(folder: Path) -> UserError:
    names = sorted(entry.name for entry in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    others = [name for name in names if name.endswith(".safetensors")]
    load = "transformers.AutoModelForCausalLM.from_pretrained"
    if others:
        found, remedy = ", ".join(others[:_MOST_NAMED]), "Save the model with save_pretrained() of transformers."
    elif pickles:
        found = f"pickled weights only ({', '.join(pickles[:_MOST_NAMED])}), which can run code when they are loaded"
        remedy = (
            f"If you trust them, convert them once: {load}({str(folder)!r}, dtype='auto').save_pretrained(NEW), "
            "and copy the tokenizer files to NEW."
        )
    elif ggufs:
        found = f"GGUF ({', '.join(ggufs[:_MOST_NAMED])})"
        remedy = f"Name the file itself: {folder / ggufs[0]}."
    else:
        found, remedy = "no weights", "Get the .safetensors files of the model."
    return UserError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}, but {found}.", remedy)
