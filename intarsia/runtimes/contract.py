"""What every runtime may expect of a model folder, checked on its files.

A folder that keeps this contract is a stock checkpoint: a class that transformers has, a config that agrees with
itself and with the weights, and files that are whole. `contract_run` checks what takes loading the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from intarsia.anatomy.detect import detect
from intarsia.checkpoint.files import INDEX_FILE, SINGLE_FILE, read_all_headers, read_config
from intarsia.checkpoint.header import TensorHeader, read_headers
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.sums import SUMS_FILE, differing, read_sums
from intarsia.checkpoint.wrapper import is_wrapped, unwrap
from intarsia.errors import Problem, UserError
from intarsia.progress import Progress
from intarsia.runtimes.checks import Skipped, refuse

_ANEW = "Build the folder again."
_MOST_NAMED = 5


def architecture(folder: Path) -> str:
    """The model's class is one of transformers' own, and the folder brings no code."""
    import transformers

    config = read_config(folder)
    where = str(folder / "config.json")
    problems = []
    for holder, key in ((config, "auto_map"), (config.get("text_config") or {}, "auto_map")):
        if isinstance(holder, Mapping) and holder.get(key):
            problems.append(_problem(where, "no code of the model's own", f"{key}: {holder[key]}", "Remove auto_map."))
    code = sorted(file.name for file in folder.glob("*.py"))
    if code:
        problems.append(_problem(str(folder), "no code", ", ".join(code), "Remove these files."))
    classes = config.get("architectures")
    stock = _stock_classes(config)
    if not isinstance(classes, list) or len(classes) != 1 or not hasattr(transformers, str(classes[0])):
        problems.append(
            _problem(f"{where}: architectures", "one class of transformers", json.dumps(classes), f"Set it to {stock}.")
        )
    elif classes[0] not in stock:
        kind = config.get("model_type")
        problems.append(
            _problem(f"{where}: architectures", f"{stock}, as model_type is {kind}", classes[0], "Mend the config.")
        )
    refuse(problems)
    assert isinstance(classes, list)
    return str(classes[0])


def _stock_classes(config: Mapping[str, Any]) -> list[str]:
    """The names of the classes that the auto classes would choose."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return []
    own = CONFIG_MAPPING[str(kind)]
    table: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if is_wrapped(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    return [table[own].__name__] if own in table else []


def config_agrees(folder: Path) -> str:
    """The config is one of a known family, has every layer's entries, and transformers reads the same out of it."""
    from transformers import AutoConfig

    config = read_config(folder)
    if is_wrapped(config):
        config = unwrap(config, read_all_headers(folder), where=str(folder))[0]
    anatomy = detect(config, where=str(folder / "config.json"))
    try:
        read: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception as error:  # what comes out of a config that a class refuses differs from class to class
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError([_problem(str(folder / "config.json"), "a config that transformers reads", found)]) from error
    lists = {name: len(value) for name, value in (("layer_types", getattr(read, "layer_types", None)),) if value}
    depths = {"num_hidden_layers": read.num_hidden_layers, **lists}
    refuse(
        [
            _problem(f"{folder / 'config.json'}: {name}", f"{anatomy.n_layers}, as in the file", str(depth))
            for name, depth in depths.items()
            if depth != anatomy.n_layers
        ]
    )
    per_layer = [name for name in anatomy.per_layer if name in config]
    return f"{anatomy.n_layers} layers" + (f"; {', '.join(per_layer)} with an entry for each" if per_layer else "")


def index_right(folder: Path, max_shard_bytes: int) -> str:
    """Every tensor is in the file that the index names, every file is named, and none is larger than asked for."""
    headers = read_all_headers(folder)
    if (folder / SINGLE_FILE).exists():
        stray = [folder / INDEX_FILE] if (folder / INDEX_FILE).exists() else []
        files = {folder / SINGLE_FILE}
        beside = sorted(set(folder.glob("*.safetensors")) - files)
        refuse([_stray(file, f"no other weights beside {SINGLE_FILE}") for file in [*stray, *beside]])
    else:
        files = {header.file for header in headers.values()}
        refuse([*_index_problems(folder, headers, files)])
    large = []
    for file in sorted(files):
        size = file.stat().st_size
        alone = sum(header.file == file for header in headers.values()) == 1
        if size > max_shard_bytes + _header_bytes(file) and not alone:
            large.append(
                _problem(str(file), f"at most {max_shard_bytes:,} bytes", f"{size:,}", "Use --max-shard-size.")
            )
    refuse(large)
    return f"{len(headers)} tensors in {len(files)} file{'s' if len(files) > 1 else ''}"


def _index_problems(folder: Path, headers: Mapping[str, TensorHeader], files: set[Path]) -> list[Problem]:
    problems = [
        _stray(file, f"only files that {INDEX_FILE} names")
        for file in sorted(set(folder.glob("*.safetensors")) - files)
    ]
    for file in sorted(files):
        found = [header.name for header in read_headers(file)]
        extra = [name for name in found if name not in headers or headers[name].file != file]
        if extra:
            problems.append(_problem(str(file), "only tensors that the index names", ", ".join(extra[:_MOST_NAMED])))
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(header.nbytes for header in headers.values())
    if stated != total:
        problems.append(_problem(f"{folder / INDEX_FILE}: total_size", f"{total:,}", str(stated)))
    return problems


def _header_bytes(file: Path) -> int:
    """The shard size counts weights; a file has its header besides."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def dtype_kept(checkpoint: Checkpoint) -> str:
    """Matrices have the config's dtype; vectors (norms, biases) may be wider."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if not isinstance(named, str):
        raise Skipped("the config names no dtype")
    wanted = getattr(torch, named.removeprefix("torch."), None)
    others = [
        header
        for header in checkpoint.headers.values()
        if len(header.shape) > 1 and header.dtype.is_floating_point and header.dtype != wanted
    ]
    refuse(
        [
            _problem(f"{header.file}: {header.name}", named, str(header.dtype).removeprefix("torch."))
            for header in others[:_MOST_NAMED]
        ]
    )
    return named


def sums_right(folder: Path, *, built_here: bool, progress: Progress) -> str:
    """Every listed file is there and has its hash."""
    sums = read_sums(folder)
    if sums is None:
        if not built_here:
            raise Skipped(f"no {SUMS_FILE}, as the folder was not built by intarsia")
        raise UserError([_problem(str(folder), f"a {SUMS_FILE}", "none")])
    total = sum((folder / name).stat().st_size for name in sums if (folder / name).is_file())
    with progress.task(f"checking {SUMS_FILE}", total) as task:
        refuse(differing(folder, sums, task.advance))
    return f"{len(sums)} files"


def _problem(where: str, expected: str, found: str, remedy: str = _ANEW) -> Problem:
    return Problem(where=where, expected=expected, found=found, remedy=remedy)


def _stray(file: Path, expected: str) -> Problem:
    return _problem(str(file.parent), expected, file.name, "Remove the file: runtimes that load every one take it in.")
