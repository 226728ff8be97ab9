"""PEFT adapters as variants: merged into their base by peft, one tensor at a time, and cached as checkpoint folders.

The cache key is made of the base's files (path, size, time of change) and the adapter's hash.

All kinds of LoRA that peft can merge are supported: rsLoRA, DoRA, patterns of ranks and scales, LoRA on the embedding
or head, trained tokens, and modules saved whole, such as an embedding with more rows. A weight is widened to float32,
merged, and rounded once to the dtype of the base.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intarsia.checkpoint.files import TensorPlan, read_headers
from intarsia.checkpoint.hashing import cache_folder, fingerprint, not_finite, not_finite_in, sha256_of
from intarsia.checkpoint.reader import Adapter, Checkpoint
from intarsia.checkpoint.resolve import open_checkpoint, resolve
from intarsia.checkpoint.writer import checkpoint_writer, copy_side_files
from intarsia.disk import read_json
from intarsia.errors import Problem, Problems, UserError, few, in_words
from intarsia.model_name import plain_name
from intarsia.progress import current

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_CHANGED_FILE = "adapter_changed.json"
_VERSION = 1  # of the merging; part of the cache key
_MOST_NAMED = 5
_MERGE = "Merge it with peft first: merge_and_unload(), then save_pretrained(), and use that folder."
# Keys of an adapter's config without effect on the weights.
_IDLE = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"}
# Unsupported keys: they change more than tensors of the base, depend on the input, or use other tensor names.
_REFUSED = ("layer_replication", "alora_invocation_tokens", "arrow_config", "target_parameters")
# Initialisations that change the base weights.
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_PREFIX = "base_model.model."
_OTHER_BASE = "Use an adapter that was trained on this base, or merge it with peft (merge_and_unload) first."


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds only a PEFT adapter."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").exists()


def open_variant(
    model: str,
    *,
    revision: str | None = None,
    base: Checkpoint | None = None,
) -> Checkpoint:
    """Open a variant: a folder, a hub id, `demo`, or the folder or hub id of a PEFT adapter.

    8-bit weights are read as ordinary ones, because the plan allowed that.

    Args:
        base: the model to merge an adapter into (default: the base in its config). If that is itself an adapter, its
            base is used.

    Raises:
        UserError: it cannot be found, is not a usable checkpoint, or is an adapter for another base.
    """
    model = plain_name(model)
    folder = resolve(model, revision=revision)
    if not is_adapter(folder):
        return Checkpoint.open(folder, model=model, revision=revision, dequantize=True)
    config = read_adapter_config(folder)
    base = base or _named_base(folder, model, config)
    base = base if base.adapter is None else base.adapter.base
    sha256 = _sha256(folder, config)
    merged = _merged_folder(folder, sha256, base)
    changed = read_json(merged / _CHANGED_FILE, expected="names of tensors", remedy=f"Remove {merged}.")["changed"]
    adapter = Adapter(
        folder=folder,
        base_model=config.get("base_model_name_or_path") or None,
        base=base,
        sha256=sha256,
        changed=frozenset(changed),
    )
    return replace(Checkpoint.open(merged, model=model, revision=revision), adapter=adapter)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of an adapter that can be merged.

    Raises:
        UserError: with every unsupported key.
    """
    file = folder / CONFIG_FILE
    config = read_json(file, expected="a JSON object", remedy="Download the adapter again.")
    faults = []
    if config.get("peft_type") != "LORA":
        faults.append(("peft_type", "LORA", config.get("peft_type")))
    faults += [(key, "unset: it cannot be merged here", config[key]) for key in _REFUSED if config.get(key)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        faults.append(("init_lora_weights", "one that does not change the base's weights", start))
    Problems(
        Problem(f"{file}: {key} is {repr(found)[:60]}; it must be {expected}.", _MERGE)
        for key, expected, found in faults
    ).raise_any()
    return config


def _named_base(folder: Path, model: str, config: Mapping[str, Any]) -> Checkpoint:
    named = config.get("base_model_name_or_path")
    if not named:
        raise UserError(
            f"{folder / CONFIG_FILE} has no base_model_name_or_path, the adapter's base.",
            "Give its base as the base of the recipe or family.",
        )
    try:
        return open_checkpoint(str(named))
    except UserError as error:
        raise UserError(
            f"The adapter {model} names {str(named)!r} as its base, which cannot be used: {error.problems[0].message}",
            "Give an existing base as the base of the recipe or family.",
        ) from error


def _sha256(folder: Path, config: Mapping[str, Any]) -> str:
    if not (folder / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{folder} has no {WEIGHTS_FILE}, "
            f"{'only pickled weights' if (folder / 'adapter_model.bin').exists() else 'and no other weights'}.",
            "If you trust the adapter, load it with peft and save it with save_pretrained().",
        )
    deciding = {key: value for key, value in sorted(config.items()) if key not in _IDLE and value is not None}
    return hashlib.sha256(json.dumps([deciding, sha256_of(folder / WEIGHTS_FILE)]).encode()).hexdigest()


def _merged_folder(folder: Path, sha256: str, base: Checkpoint) -> Path:
    """The folder of the merged model; built the first time."""
    files = {header.file for header in [*base.headers.values(), *base.kept.values()]} | {base.folder / "config.json"}
    key = hashlib.sha256(json.dumps([fingerprint(files, _VERSION), sha256]).encode()).hexdigest()
    merged = cache_folder() / "merged" / key
    if not (merged / _CHANGED_FILE).exists():
        checked = ((header, not_finite(header.tensor())) for header in read_headers(folder / WEIGHTS_FILE))
        Problems(not_finite_in(header, bad) for header, bad in checked if bad).raise_any(most=_MOST_NAMED)
        _write(Merged(folder / WEIGHTS_FILE, base), folder, merged)
    return merged


def _write(model: Merged, adapter: Path, out: Path) -> None:
    base, plans, changed = model.base, model.plan(), list[str]()
    stored = [replace(plan, name=base.stored_name(plan.name)) for plan in plans]
    with (
        checkpoint_writer(out, [*stored, *base.kept.values()], overwrite=True) as writer,
        current().task(f"Merging {adapter.name}", sum(plan.nbytes for plan in plans)) as task,
    ):
        for plan in plans:
            tensor = model.tensor(plan.name)
            if plan.name not in base.headers or not torch.equal(tensor, base.tensor(plan.name)):
                changed.append(plan.name)
            writer.write(base.stored_name(plan.name), tensor)
            task.advance(plan.nbytes)
        for name, header in base.kept.items():
            writer.write(name, header.tensor())
        config = model.config()
        if base.wrapper is not None:
            config = base.wrapper.wrapped(base.config, config)
        _write_json(writer.folder / "config.json", config)
        copy_side_files(base.folder, writer.folder)
        if model.resized:
            copy_side_files(adapter, writer.folder)
        _write_json(writer.folder / _CHANGED_FILE, {"changed": sorted(changed)})


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Merged:
    """The tensors of a base with an adapter, merged one at a time."""

    def __init__(self, file: Path, base: Checkpoint) -> None:
        self.base = base
        self._where = f"{file} on {base.model}"
        self._embedding = f"{base.architecture.family.modules.embedding}.weight"
        self._head = f"{base.architecture.family.modules.head}.weight"
        stored = {header.name: header.shape for header in read_headers(file)}
        self._rows = self._vocabulary(stored)
        self._model = self._with_adapter(file.parent)
        self._parameters = dict(self._model.named_parameters(remove_duplicate=False))
        self._places = dict(self._find_places())
        tied = {self._head} if base.architecture.tied else set()
        unknown = sorted(self._places.keys() - base.headers.keys() - tied)
        if unknown:
            raise self._unfit(f"it changes {few(unknown)}, which the base does not have")
        # If the adapter changes the embedding but not the head, or differently, they are no longer tied.
        changed = self.resized or bool(self._places.keys() & {self._embedding, self._head})
        self.untied = bool(tied) and changed  # so that each is handled separately
        self.untied = self.untied and not torch.equal(self.tensor(self._embedding), self.tensor(self._head))

    @property
    def resized(self) -> bool:
        """Whether the vocabulary has more rows than the base's."""
        return self._rows != self.base.architecture.vocabulary

    def plan(self) -> list[TensorPlan]:
        """The plan of all tensors, by the base's names."""
        found = {}
        for name, header in self.base.headers.items():
            shape = (self._rows, *header.shape[1:]) if name in (self._embedding, self._head) else header.shape
            found[name] = TensorPlan(name=name, dtype=header.dtype, shape=shape)
        if self.untied and self._head not in found:
            found[self._head] = replace(found[self._embedding], name=self._head)
        return list(found.values())

    def config(self) -> dict[str, Any]:
        """The config of the merged text model."""
        config = dict(self.base.config)
        if self.resized:
            config[self.base.architecture.family.fields["vocabulary"]] = self._rows
        if self.untied:
            config[self.base.architecture.family.fields["tied"]] = False
        return config

    @torch.no_grad()
    def tensor(self, name: str) -> Tensor:
        """A tensor of the merged model, in the dtype of the base's."""
        if name == self._head and self.base.architecture.tied and not self.untied:
            name = self._embedding
        header = self.base.headers.get(name) or self.base.headers[self._embedding]
        if name not in self._places:
            return self._parameters[name].detach().to(header.dtype)
        layer, inside = self._places[name]
        if hasattr(layer, "unload_and_optionally_merge_module"):
            # a module that is saved whole, or an embedding with trained rows
            unloaded = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            return unloaded.get_parameter(inside).detach().to(header.dtype)
        narrow = {parameter: parameter.data for parameter in layer.get_base_layer().parameters()}
        try:
            for parameter in narrow:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                parameter.data = parameter.data.to(wide, copy=True)
            layer.merge()
            return layer.get_base_layer().get_parameter(inside).detach().to(header.dtype)
        finally:
            # Restore the module, to free memory and because the next tensor may be in the same layer.
            for parameter, data in narrow.items():
                parameter.data = data
            layer.merged_adapters.clear()

    def _vocabulary(self, stored: Mapping[str, tuple[int, ...]]) -> int:
        """Rows of the embedding: the base's, or more if the adapter holds the whole embedding."""
        ours, whole, partial = self.base.architecture.vocabulary, {}, set()
        for name, shape in stored.items():
            module, _, kind = name.removeprefix(_PREFIX).rpartition(".")
            module = module.removesuffix(".default").removesuffix(".modules_to_save").removesuffix(".base_layer")
            if f"{module}.{kind}" in (self._embedding, self._head):
                whole[f"{module}.{kind}"] = shape[0]
            elif kind.startswith("lora_embedding_A") and f"{module}.weight" == self._embedding:
                partial.add(shape[-1])
            elif f"{module.removesuffix('.lora_B')}.weight" == self._head and module.endswith(".lora_B"):
                partial.add(shape[0])
        rows = {*whole.values(), *partial}
        if rows <= {ours}:
            return ours
        both = self._head in whole or self.base.architecture.tied
        if len(rows) > 1 or partial or self._embedding not in whole or not both or min(rows) < ours:
            raise UserError(
                f"{self._where}: the adapter's vocabulary has {' and '.join(f'{n:,}' for n in sorted(rows))} rows, the "
                f"base's {ours:,}; a larger one must be saved whole, embedding and head.",
                "Train it with modules_to_save for both, or merge it with peft (merge_and_unload) first.",
            )
        return rows.pop()

    def _with_adapter(self, folder: Path) -> nn.Module:
        """The base's modules with mapped weights and the adapter."""
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # problems are errors here
            try:
                settings = peft.PeftConfig.from_pretrained(str(folder))
                settings.inference_mode, settings.task_type = True, None
                adapted = peft.get_peft_model(_Modules(self.base, self._rows), settings)
                loaded = peft.set_peft_model_state_dict(adapted, peft.load_peft_weights(str(folder), device="cpu"))
            except Exception as error:  # peft's errors for a mismatched adapter differ between versions
                raise self._unfit(in_words(error)) from error
        lacking = [name for name in loaded.missing_keys if "lora_" in name or "modules_to_save" in name]
        if lacking:
            raise self._unfit(f"it lacks {few(lacking)}")
        # peft saves resized embeddings a second time, under this name.
        unexpected = [name for name in loaded.unexpected_keys if not name.endswith(".modules_to_save.weight")]
        if unexpected:
            raise self._unfit(f"the base has no module for {few(unexpected)}")
        inner: nn.Module = adapted.base_model.model
        return inner

    def _find_places(self) -> Iterator[tuple[str, tuple[Any, str]]]:
        """Parameters that the adapter may change: the module that peft puts on each, and the name inside."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        inside: tuple[str, ...] = ()
        for key, module in self._model.named_modules():
            if key.startswith(inside):
                continue
            if isinstance(module, AuxiliaryTrainingWrapper):
                plain: Any = getattr(module, "original_module", None) or module.token_adapter.get_base_layer()
            elif isinstance(module, BaseTunerLayer):
                plain = module.get_base_layer()
            else:
                continue
            inside += (f"{key}.",)
            for parameter, _ in plain.named_parameters():
                yield f"{key}.{parameter}", (module, parameter)

    def _unfit(self, found: str) -> UserError:
        return UserError(f"{self._where}: peft cannot apply the adapter to the base: {found}.", _OTHER_BASE)


class _Modules(nn.Module):
    """The base as bare modules with mapped weights and the names in files, as peft needs for merging."""

    def __init__(self, base: Checkpoint, rows: int) -> None:
        super().__init__()
        family, tied = base.architecture.family, base.architecture.tied
        self.config = {"model_type": base.config.get("model_type"), "tie_word_embeddings": tied}
        self._embedding, self._head = family.modules.embedding, family.modules.head
        # weights first, because they determine the kind of module
        for name in sorted(base.headers, key=lambda name: not name.endswith(".weight")):
            owner, _, leaf = name.rpartition(".")
            value = base.tensor(name)
            if owner in (self._embedding, self._head) and rows != base.architecture.vocabulary:
                value = value.new_zeros(rows, *value.shape[1:])
            setattr(self._module(owner, value.shape), leaf, nn.Parameter(value, requires_grad=False))
        if tied:
            self._tied_weights_keys = {f"{self._head}.weight": f"{self._embedding}.weight"}
            shared: Any = self.get_input_embeddings()
            setattr(self._module(self._head, shared.weight.shape), "weight", shared.weight)  # noqa: B010

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, for peft."""
        return self.get_submodule(self._embedding)

    def get_output_embeddings(self) -> nn.Module:
        """The head, for peft."""
        return self.get_submodule(self._head)

    def _module(self, path: str, shape: Sequence[int]) -> nn.Module:
        parent: nn.Module = self
        *above, last = path.split(".")
        for part in above:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if last not in parent._modules:
            module = nn.Module()
            if len(shape) == 2:
                with torch.device("meta"):
                    module = (
                        nn.Embedding(shape[0], shape[1])
                        if path == self._embedding
                        else nn.Linear(shape[1], shape[0], False)
                    )
            parent.add_module(last, module)
        return parent.get_submodule(last)
