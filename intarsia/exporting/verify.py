"""Checks of what every runtime expects of a model folder, on its files and by loading and running it.

A folder that passes is a stock checkpoint: a class of transformers, a config that agrees with itself and the weights,
complete files, and the tokenizer of the source model. A check is a function of a `Subject`: it returns its finding, or
raises `UserError` for a failure, or `Skipped`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from intarsia.building.materialize import RECIPE_FILE
from intarsia.checkpoint.files import INDEX_FILE, SINGLE_FILE, TensorHeader, read_all_headers, read_headers
from intarsia.checkpoint.gguf_source import kept_folder
from intarsia.checkpoint.hashing import SUMS_FILE, cache_folder, differing, read_sums, scan
from intarsia.checkpoint.reader import Checkpoint, architecture_of, read_config
from intarsia.checkpoint.stored_forms import NESTED, is_wrapped, unwrap
from intarsia.checkpoint.writer import TOKENIZER_FILES, side_files, stock_classes, used_code, uses_code, without_code
from intarsia.errors import Problem, Problems, UserError, few, in_words, mismatch
from intarsia.inspection.own_code import CODE, HINT, code_files, is_known, is_own, trusts
from intarsia.model_name import DEMO, GGUF, hub_id, local_path
from intarsia.progress import current, quiet_transformers
from intarsia.recipe import schema

Outcome = Literal["ok", "failed", "skipped"]
_MOST_NAMED = 5
_BUILD_AGAIN = "Build the folder again."
_AGAIN = "Copy the tokenizer's files from the source model, or build the folder again."
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TEXT = "A model that was made shallower should still say what it said before, word by word"
_NEW_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check of a model folder."""

    check: str
    outcome: Outcome
    # the finding, or why the check was skipped
    found: str
    # only after a failure
    remedy: str | None = None


class Skipped(Exception):
    """Raised by a check that does not apply, with the reason."""


class Subject:
    """The folder to check, with the objects that earlier checks opened."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self.opened: Checkpoint | None = None
        self.model: Any = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The folder as a checkpoint.

        Raises:
            Skipped: the check `tensors` failed.
        """
        if self.opened is None:
            raise Skipped("the tensors do not match the config")
        return self.opened


def checked(name: str, look: Callable[[Subject], str], subject: Subject) -> Check:
    """The outcome of one check."""
    try:
        return Check(check=name, outcome="ok", found=look(subject))
    except Skipped as reason:
        return Check(check=name, outcome="skipped", found=str(reason))
    except UserError as error:
        named = [problem.message.removesuffix(".") for problem in error.problems]
        more = [f"and {len(named) - _MOST_NAMED} more"] if len(named) > _MOST_NAMED else []
        found = "; ".join([*named[:_MOST_NAMED], *more])
        return Check(check=name, outcome="failed", found=found, remedy=error.problems[0].hint)


def architecture(subject: Subject) -> str:
    """The model's class is in transformers, and the folder has no code; or the folder's code is trusted."""
    import transformers

    folder = subject.folder
    config, where, problems = read_config(folder), str(folder / "config.json"), Problems()
    remedy = "Remove {}." if is_known(config.get("model_type")) else HINT
    for file in sorted(folder.glob("*.json")):
        named = json.loads(file.read_text(encoding="utf-8")) if file.name != INDEX_FILE else {}
        for holder in (named, named.get(NESTED)) if isinstance(named, dict) else ():
            if isinstance(holder, Mapping) and holder.get(CODE) and not uses_code(file):
                found = f"{CODE}: {holder[CODE]}"
                problems.append(_problem(file, "no code of the model's own", found, remedy.format(CODE)))
    code = [name for name in code_files(folder) if name not in used_code(folder)]
    if code:
        problems.append(_problem(folder, "no code", ", ".join(code), remedy.format("these files")))
    classes, own = config.get("architectures"), is_own(config.get("model_type"))
    stock = stock_classes(config)
    if not isinstance(classes, list) or len(classes) != 1 or not (own or hasattr(transformers, str(classes[0]))):
        problems.append(
            _problem(f"{where}: architectures", "one class of transformers", json.dumps(classes), f"Set it to {stock}.")
        )
    elif classes[0] not in stock:
        kind = config.get("model_type")
        problems.append(
            _problem(f"{where}: architectures", f"{stock}, for model_type {kind}", classes[0], "Correct the config.")
        )
    problems.raise_any()
    assert isinstance(classes, list)
    return f"{classes[0]}, from the model's own code" if own else str(classes[0])


def config_agrees(subject: Subject) -> str:
    """The config is a known decoder's, has entries for every layer, and transformers reads the same values."""
    from transformers import AutoConfig

    folder = subject.folder
    config = read_config(folder)
    if is_wrapped(config):
        config = unwrap(config, read_all_headers(folder), where=str(folder))[0]
    architecture = architecture_of(config, where=str(folder / "config.json"))
    try:
        read: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception as error:  # config classes fail in different ways
        raise UserError(
            _problem(folder / "config.json", "a config that transformers accepts", in_words(error))
        ) from error
    lists = {name: len(value) for name, value in (("layer_types", getattr(read, "layer_types", None)),) if value}
    depths = {"num_hidden_layers": read.num_hidden_layers, **lists}
    Problems(
        _problem(f"{folder / 'config.json'}: {name}", f"{architecture.n_layers}, as in the file", str(depth))
        for name, depth in depths.items()
        if depth != architecture.n_layers
    ).raise_any()
    per_layer = [name for name in architecture.per_layer if name in config]
    return f"{architecture.n_layers} layers" + (f"; {', '.join(per_layer)} with an entry for each" if per_layer else "")


def index_right(subject: Subject) -> str:
    """Every tensor is in the file that the index names, every file is in the index, and none is too large."""
    folder, problems = subject.folder, Problems()
    shards: dict[Path, list[TensorHeader]] = {}
    for header in read_all_headers(folder).values():
        shards.setdefault(header.file, []).append(header)
    single, index = (folder / SINGLE_FILE).exists(), folder / INDEX_FILE
    strays = [index] if single and index.exists() else []
    strays += sorted(set(folder.glob("*.safetensors")) - shards.keys())
    expected = f"no other weights beside {SINGLE_FILE}" if single else f"only files in {INDEX_FILE}"
    remedy = "Remove the file, because some runtimes load every file."
    problems += [_problem(folder, expected, file.name, remedy) for file in strays]
    if not single:
        for file, held in shards.items():
            extra = {header.name for header in read_headers(file)} - {header.name for header in held}
            if extra:
                problems.append(_problem(file, "only tensors in the index", few(sorted(extra))))
        metadata, total = _json(index).get("metadata"), sum(each.nbytes for held in shards.values() for each in held)
        stated = metadata.get("total_size") if isinstance(metadata, dict) else None
        if stated != total:
            problems.append(_problem(f"{index}: total_size", f"{total:,}", str(stated)))
    problems.raise_any()
    for file, held in shards.items():
        most, size = subject.max_shard_bytes, sum(header.nbytes for header in held)
        if size > most and len(held) > 1:
            problems.append(_problem(file, f"at most {most:,} bytes", f"{size:,}", "Use --max-shard-size."))
    problems.raise_any()
    count = sum(map(len, shards.values()))
    return f"{count} tensors in {len(shards)} file{'s' if len(shards) > 1 else ''}"


def tensors(subject: Subject) -> str:
    """All tensors of the config exist in the right shapes, and no others."""
    checkpoint = subject.opened = Checkpoint.open(subject.folder, model=str(subject.folder))
    if checkpoint.untied:
        raise UserError(
            "The config ties the head to the embedding, but the files hold a different head.",
            "Set tie_word_embeddings to false, because runtimes differ in which of the two they use.",
        )
    return f"{len(checkpoint.headers) + len(checkpoint.kept)} tensors, {checkpoint.parameters:,} parameters"


def finite(subject: Subject) -> str:
    """No weight is NaN or infinite."""
    scan(subject.checkpoint)
    return "no NaN, no infinity"


def dtype_kept(subject: Subject) -> str:
    """The embedding and most matrices have the config's dtype, in which transformers loads everything."""
    checkpoint = subject.checkpoint
    config = read_config(checkpoint.folder)
    holders = [config, config[NESTED]] if is_wrapped(config) else [config]
    names = {each.get("dtype") or each.get("torch_dtype") for each in holders} - {None}
    if not names:
        raise Skipped("the config has no dtype")
    matrices = [each for each in checkpoint.headers.values() if len(each.shape) > 1 and each.dtype.is_floating_point]
    wanted = str(checkpoint.dtype).removeprefix("torch.")
    others = [header for header in matrices if header.dtype != checkpoint.dtype]
    Problems(
        _problem(f"{checkpoint.folder / 'config.json'}: dtype", f"{wanted}, the embedding's", str(name))
        for name in sorted(map(str, names))
        if name.removeprefix("torch.") != wanted
    ).raise_any()
    if 2 * len(others) > len(matrices):
        found = f"{str(others[0].dtype).removeprefix('torch.')} for {len(others)} of {len(matrices)} matrices"
        raise UserError(_problem(checkpoint.folder, f"{wanted}, the config's", found))
    return wanted + (f", and {len(others)} matrices of another one" if others else "")


def sums_right(subject: Subject) -> str:
    """Every listed file exists and has its hash."""
    folder = subject.folder
    sums = read_sums(folder)
    if sums is None:
        if not (folder / RECIPE_FILE).is_file():
            raise Skipped(f"no {SUMS_FILE}, because intarsia did not build the folder")
        raise UserError(_problem(folder, f"a {SUMS_FILE}", "none"))
    total = sum((folder / name).stat().st_size for name in sums if (folder / name).is_file())
    with current().task(f"checking {SUMS_FILE}", total) as task:
        Problems(differing(folder, sums, task.advance)).raise_any()
    return f"{len(sums)} files"


def _problem(where: str | Path, expected: str, found: str, remedy: str = _BUILD_AGAIN) -> Problem:
    return mismatch(where, expected, found, remedy)


def loads(subject: Subject) -> str:
    """The auto class loads the folder without missing, additional or misshapen tensors."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    folder, problems = subject.folder, Problems()
    auto: Any = AutoModelForImageTextToText if is_wrapped(read_config(folder)) else AutoModelForCausalLM
    try:
        with quiet_transformers():
            model, info = auto.from_pretrained(
                folder, dtype="auto", trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # any error of loading is a failure of the folder
        raise UserError(_problem(folder, f"a folder that {auto.__name__} loads", in_words(error))) from error
    faults = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "other shape"}
    for key, what in faults.items():
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get(key) or ())
        # transformers does not load layers after the last one, which predict further tokens.
        depth = model.config.get_text_config().num_hidden_layers
        inside = [name for name in names if not (at := re.search(r"\.layers\.(\d+)\.", name)) or int(at[1]) < depth]
        if inside:
            problems.append(_problem(folder, "exactly the tensors of the model", f"{what}: {few(inside)}"))
    problems.raise_any()
    subject.model = model.eval()
    return f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')}"


@torch.no_grad()
def generates(subject: Subject) -> str:
    """Greedy tokens are equal with and without the cache; in float32, so that rounding does not matter."""
    from transformers import GenerationConfig

    if subject.model is None:
        raise Skipped("the model cannot be loaded")
    folder, model = subject.folder, subject.model.float()
    prompt = _prompt(folder, model.config.get_text_config().vocab_size)
    logits = model(input_ids=prompt).logits
    if not bool(torch.isfinite(logits).all()):
        raise UserError(_problem(folder, "finite logits", "NaN or infinity"))
    written = []
    for cache in (True, False):
        settings = GenerationConfig(
            max_new_tokens=_NEW_TOKENS, do_sample=False, use_cache=cache, eos_token_id=None, pad_token_id=0
        )
        found = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
        written.append(found[0, prompt.shape[1] :].tolist())
    if written[0] != written[1]:
        raise UserError(
            _problem(folder, f"the tokens generated without a cache, {written[1]}", f"{written[0]} with one")
        )
    return f"{len(written[0])} tokens, with and without a cache"


def _prompt(folder: Path, vocabulary: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    try:
        ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts())(_TEXT)["input_ids"][:32]
    except Exception:  # another check covers the tokenizer
        ids = []
    ids = [index for index in ids if index < vocabulary]
    return torch.tensor([ids or [index % vocabulary for index in range(3, 19)]])


def tokenizer_kept(subject: Subject) -> str:
    """The tokenizer loads, fits the embedding, and equals the source's, if that can be read."""
    from transformers import AutoTokenizer

    folder, vocabulary = subject.folder, subject.checkpoint.architecture.vocabulary
    source = source_folder(folder)
    ours, theirs = _tokenizer_files(folder), set() if source is None else _tokenizer_files(source)
    if not ours and not theirs:
        raise Skipped("there is no tokenizer" + ("" if source is None else ", as in the source model"))
    Problems(
        _problem(folder / name, "the file of the source", "another one" if name in ours else "no such file", _AGAIN)
        for name in sorted(theirs)
        if source is not None and (name not in ours or (folder / name).read_bytes() != without_code(source / name))
    ).raise_any()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts())
    except Exception as error:  # damaged files fail in many ways
        raise UserError(_problem(folder, "a tokenizer that transformers can read", in_words(error), _AGAIN)) from error
    highest = max(tokenizer.get_vocab().values(), default=0)
    if source is not None:
        names = [name for name in ("config.json", "generation_config.json") if (source / name).is_file()]
        pairs = [(name, _json(folder / name), _json(source / name)) for name in names]
        Problems(
            _problem(f"{folder / name}: {key}", f"{there.get(key)!r}, as in the source", repr(here.get(key)), _AGAIN)
            for name, here, there in pairs
            for key in (*_IDS, "vocab_size")
            if here.get(key) != there.get(key)
        ).raise_any()
        return f"{highest + 1:,} tokens, the same as those of {source.name}"
    # A source may have more tokens than rows (some classes add an untrained one); so does its pruned model.
    if highest >= vocabulary:
        expected = f"ids below {vocabulary:,}, the embedding's rows"
        raise UserError(_problem(folder, expected, f"{highest:,}", _AGAIN))
    return f"{highest + 1:,} tokens; the source model cannot be read"


def generation_config_valid(subject: Subject) -> str:
    """The generation config is valid, and its tokens exist."""
    from transformers import GenerationConfig

    folder, vocabulary = subject.folder, subject.checkpoint.architecture.vocabulary
    file = folder / "generation_config.json"
    if not file.is_file():
        raise Skipped("there is none, so transformers uses its defaults")
    try:
        config: Any = GenerationConfig.from_pretrained(folder)
        config.validate()
    except (ValueError, OSError, TypeError) as error:
        found = " ".join(str(error).split())[:300]
        raise UserError(_problem(file, "values that transformers accepts", found, "Correct the file.")) from error
    beyond = []
    for name in _IDS:
        value = getattr(config, name, None)
        ids = [index for index in (value if isinstance(value, list) else [value]) if index is not None]
        beyond += [f"{name} {index}" for index in ids if not (isinstance(index, int) and 0 <= index < vocabulary)]
    source = source_folder(folder)
    if beyond and source is not None and _json(source / file.name) == _json(file):
        return f"as in the source, which has {', '.join(beyond)}"
    expected = f"tokens below {vocabulary:,}"
    Problems(_problem(file, expected, found, "Correct the file.") for found in beyond).raise_any()
    return "valid"


def source_folder(folder: Path) -> Path | None:
    """The folder of the base in a built model's recipe, if it is available offline."""
    if not (folder / RECIPE_FILE).is_file():
        return None
    recipe = schema.load(folder / RECIPE_FILE)
    variant = recipe.variant(recipe.base)
    path = cache_folder() / "demo" if variant.model == DEMO else local_path(variant.model)
    if path is not None and path.suffix == GGUF:
        return kept_folder(path)
    if path is not None:
        return path if (path / "config.json").is_file() else None
    if (name := hub_id(variant.model)) is None:
        return None
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=variant.revision, local_files_only=True))
    except Exception:  # not in the cache; the error depends on the client's version
        return None


def _tokenizer_files(folder: Path) -> set[str]:
    suffixes = (".json", ".txt", ".model", ".jinja")
    return {name for name in side_files(folder, TOKENIZER_FILES) if name.endswith(suffixes)}


def _json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found
