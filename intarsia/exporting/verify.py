"""What every runtime may expect of a model folder, checked on its files and by loading and running it.

A folder that keeps this contract is a stock checkpoint: a class that transformers has, a config that agrees with
itself and with the weights, and files that are whole. `verify_tokenizer` compares with the model it was made from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from intarsia.checkpoint.files import INDEX_FILE, SINGLE_FILE, read_all_headers, read_config
from intarsia.checkpoint.hashing import SUMS_FILE, differing, read_sums
from intarsia.checkpoint.multimodal import NESTED, is_wrapped, unwrap
from intarsia.checkpoint.reader import Checkpoint, architecture_of
from intarsia.checkpoint.tensor_file import TensorHeader, read_headers
from intarsia.checkpoint.writer import CODE, stock_classes
from intarsia.errors import Problem, UserError
from intarsia.inspection.structure import quiet
from intarsia.progress import Progress

Outcome = Literal["ok", "failed", "skipped"]
_MOST_NAMED = 5
_BUILD_AGAIN = "Build the folder again."
_TEXT = "A model that was made shallower should still say what it said before, word by word"
_NEW_TOKENS = 12
UNTIED = (
    "The config ties the head to the embedding, and the files hold another one.",
    "Set tie_word_embeddings to false: runtimes differ in which of the two they use.",
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of a model folder, and what came of it."""

    check: str
    outcome: Outcome
    # or why nothing was looked at
    found: str
    # only after a failure
    remedy: str | None = None


class Skipped(Exception):
    """Raised inside a check that has nothing to look at; its text says why."""


def checked(name: str, look: Callable[[], str]) -> Check:
    """What `look` finds; the problems of a `UserError` that it raises are the failure."""
    try:
        return Check(check=name, outcome="ok", found=look())
    except Skipped as reason:
        return Check(check=name, outcome="skipped", found=str(reason))
    except UserError as error:
        named = [problem.message.removesuffix(".") for problem in error.problems]
        more = len(named) - _MOST_NAMED
        text = "; ".join([*named[:_MOST_NAMED], *([f"and {more} more"] if more > 0 else [])])
        return Check(check=name, outcome="failed", found=text, remedy=error.problems[0].hint)


def fail_if(problems: Sequence[Problem]) -> None:
    """Fail the current check, if there are problems.

    Raises:
        UserError: there are.
    """
    if problems:
        raise UserError(problems)


def architecture(folder: Path) -> str:
    """The model's class is one of transformers' own, and the folder brings no code."""
    import transformers

    config = read_config(folder)
    where = str(folder / "config.json")
    problems = []
    for file in sorted(folder.glob("*.json")):
        named = json.loads(file.read_text(encoding="utf-8")) if file.name != INDEX_FILE else {}
        for holder in (named, named.get(NESTED)) if isinstance(named, dict) else ():
            if isinstance(holder, Mapping) and holder.get(CODE):
                found = f"{CODE}: {holder[CODE]}"
                problems.append(_problem(str(file), "no code of the model's own", found, f"Remove {CODE}."))
    code = sorted(file.name for file in folder.glob("*.py"))
    if code:
        problems.append(_problem(str(folder), "no code", ", ".join(code), "Remove these files."))
    classes = config.get("architectures")
    stock = stock_classes(config)
    if not isinstance(classes, list) or len(classes) != 1 or not hasattr(transformers, str(classes[0])):
        problems.append(
            _problem(f"{where}: architectures", "one class of transformers", json.dumps(classes), f"Set it to {stock}.")
        )
    elif classes[0] not in stock:
        kind = config.get("model_type")
        problems.append(
            _problem(f"{where}: architectures", f"{stock}, as model_type is {kind}", classes[0], "Correct the config.")
        )
    fail_if(problems)
    assert isinstance(classes, list)
    return str(classes[0])


def config_agrees(folder: Path) -> str:
    """The config is one of a known decoder, has every layer's entries, and transformers reads the same out of it."""
    from transformers import AutoConfig

    config = read_config(folder)
    if is_wrapped(config):
        config = unwrap(config, read_all_headers(folder), where=str(folder))[0]
    architecture = architecture_of(config, where=str(folder / "config.json"))
    try:
        read: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception as error:  # what comes out of a config that a class refuses differs from class to class
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError([_problem(str(folder / "config.json"), "a config that transformers reads", found)]) from error
    lists = {name: len(value) for name, value in (("layer_types", getattr(read, "layer_types", None)),) if value}
    depths = {"num_hidden_layers": read.num_hidden_layers, **lists}
    fail_if(
        [
            _problem(f"{folder / 'config.json'}: {name}", f"{architecture.n_layers}, as in the file", str(depth))
            for name, depth in depths.items()
            if depth != architecture.n_layers
        ]
    )
    per_layer = [name for name in architecture.per_layer if name in config]
    return f"{architecture.n_layers} layers" + (f"; {', '.join(per_layer)} with an entry for each" if per_layer else "")


def index_right(folder: Path, max_shard_bytes: int) -> str:
    """Every tensor is in the file that the index names, every file is named, and none is larger than asked for."""
    headers = read_all_headers(folder)
    if (folder / SINGLE_FILE).exists():
        stray = [folder / INDEX_FILE] if (folder / INDEX_FILE).exists() else []
        files = {folder / SINGLE_FILE}
        beside = sorted(set(folder.glob("*.safetensors")) - files)
        fail_if([_stray(file, f"no other weights beside {SINGLE_FILE}") for file in [*stray, *beside]])
    else:
        files = {header.file for header in headers.values()}
        fail_if([*_index_problems(folder, headers, files)])
    large = []
    for file in sorted(files):
        size = file.stat().st_size
        alone = sum(header.file == file for header in headers.values()) == 1
        if size > max_shard_bytes + _header_bytes(file) and not alone:
            large.append(
                _problem(str(file), f"at most {max_shard_bytes:,} bytes", f"{size:,}", "Use --max-shard-size.")
            )
    fail_if(large)
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
    """The embedding and most matrices have the config's dtype, in which transformers loads all of them."""
    config = read_config(checkpoint.folder)
    holders = [config, config[NESTED]] if is_wrapped(config) else [config]
    names = {each.get("dtype") or each.get("torch_dtype") for each in holders} - {None}
    if not names:
        raise Skipped("the config names no dtype")
    embedding = checkpoint.headers[f"{checkpoint.architecture.family.embedding_module}.weight"]
    matrices = [each for each in checkpoint.headers.values() if len(each.shape) > 1 and each.dtype.is_floating_point]
    wanted = str(embedding.dtype).removeprefix("torch.")
    others = [header for header in matrices if header.dtype != embedding.dtype]
    fail_if(
        [
            _problem(f"{checkpoint.folder / 'config.json'}: dtype", f"{wanted}, as the embedding has", str(name))
            for name in sorted(map(str, names))
            if name.removeprefix("torch.") != wanted
        ]
    )
    if 2 * len(others) > len(matrices):
        found = f"{str(others[0].dtype).removeprefix('torch.')} for {len(others)} of {len(matrices)} matrices"
        raise UserError([_problem(str(checkpoint.folder), f"{wanted}, as the config says", found)])
    return wanted + (f", and {len(others)} matrices of another one" if others else "")


def sums_right(folder: Path, *, built_here: bool, progress: Progress) -> str:
    """Every listed file is there and has its hash."""
    sums = read_sums(folder)
    if sums is None:
        if not built_here:
            raise Skipped(f"no {SUMS_FILE}, as the folder was not built by intarsia")
        raise UserError([_problem(str(folder), f"a {SUMS_FILE}", "none")])
    total = sum((folder / name).stat().st_size for name in sums if (folder / name).is_file())
    with progress.task(f"checking {SUMS_FILE}", total) as task:
        fail_if(differing(folder, sums, task.advance))
    return f"{len(sums)} files"


def _problem(where: str, expected: str, found: str, remedy: str = _BUILD_AGAIN) -> Problem:
    return Problem(where=where, expected=expected, found=found, remedy=remedy)


def _stray(file: Path, expected: str) -> Problem:
    return _problem(str(file.parent), expected, file.name, "Remove the file: runtimes that load every one take it in.")


def loads(folder: Path) -> tuple[str, Any]:
    """What the auto class says while it loads the folder, and the model.

    Raises:
        UserError: it does not load, or tensors are missing, too many or of another shape.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText if is_wrapped(read_config(folder)) else AutoModelForCausalLM
    try:
        with quiet():
            model, info = auto.from_pretrained(
                folder, dtype="auto", trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # loading fails in many ways, and each of them is the folder's failure
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError([_problem(str(folder), f"a folder that {auto.__name__} loads", found)]) from error
    problems = []
    for key, what in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "unexpected"),
        ("mismatched_keys", "other shape"),
    ):
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get(key) or ())
        depth = model.config.get_text_config().num_hidden_layers
        names = [name for name in names if not _beyond(name, depth)]
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(
                _problem(str(folder), "just the tensors of the model", f"{what}: {', '.join(names[:5])}{more}")
            )
    if problems:
        raise UserError(problems)
    return f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')}", model.eval()


def _beyond(name: str, depth: int) -> bool:
    """Whether a tensor is one of the layers after the last, which predict further tokens; transformers loads them
    apart."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) >= depth


@torch.no_grad()
def generates(folder: Path, model: Any) -> str:
    """Greedy tokens with the cache are those without; in float32, where no rounding decides.

    Raises:
        UserError: they differ, or a logit is not finite.
    """
    from transformers import GenerationConfig

    model = model.float()
    prompt = _prompt(folder, model.config.get_text_config().vocab_size)
    logits = model(input_ids=prompt).logits
    if not bool(torch.isfinite(logits).all()):
        raise UserError([_problem(str(folder), "finite logits", "NaN or infinity")])
    written = []
    for cache in (True, False):
        settings = GenerationConfig(
            max_new_tokens=_NEW_TOKENS, do_sample=False, use_cache=cache, eos_token_id=None, pad_token_id=0
        )
        found = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        written.append(found[0, prompt.shape[1] :].tolist())
    if written[0] != written[1]:
        raise UserError(
            [_problem(str(folder), f"the tokens written without a cache, {written[1]}", f"{written[0]} with one")]
        )
    return f"{len(written[0])} tokens, with and without a cache"


def _prompt(folder: Path, vocabulary: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    try:
        ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(_TEXT)["input_ids"][:32]
    except Exception:  # whether the tokenizer loads is a check of its own
        ids = []
    ids = [index for index in ids if index < vocabulary]
    return torch.tensor([ids or [index % vocabulary for index in range(3, 19)]])
