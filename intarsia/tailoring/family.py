"""Whether a model is of the same family as the base: differences that are errors, and those that are only noted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.activations.architecture_checks import verified
from intarsia.architecture.spec import Architecture
from intarsia.checkpoint.adapter import is_adapter, open_variant, read_adapter_config
from intarsia.checkpoint.hashing import scan
from intarsia.checkpoint.reader import Checkpoint, architecture_of, read_config
from intarsia.checkpoint.resolve import not_downloaded, resolve
from intarsia.checkpoint.stored_forms import text_config
from intarsia.errors import Problem, Problems, few
from intarsia.inspection.own_code import trusts
from intarsia.model_name import DEMO, lasting
from intarsia.recipe.recipe import Variant
from intarsia.tailoring.family_file import MemberSpec

_MOST_NAMED = 3


@dataclass(frozen=True, eq=False)
class Member:
    """A model of a family. `checkpoint` is None if only its config was read."""

    name: str
    model: str
    revision: str | None
    config: Mapping[str, Any]
    architecture: Architecture
    checkpoint: Checkpoint | None = None


def compare(base: Member, other: Member) -> tuple[list[Problem], list[str]]:
    """The problems of `other` as a fine-tune of the base, and remarks."""
    differs = f"Variant {other.name} ({other.model}) differs from the base {base.model} in"
    problems = [
        Problem(f"{differs} {what}: {theirs}{'' if ours is None else f', not {ours}'}.", hint)
        for what, ours, theirs, hint in _differences(base, other)
    ]
    notes = list(_remarks(base, other))
    if base.checkpoint is not None and other.checkpoint is not None:
        wrong, said = _compare_tokens(base.checkpoint, other.checkpoint)
        hint = "A variant must read text as the base does; leave this one out."
        problems += [Problem(f"{differs} its tokenizer: {found}.", hint) for found in wrong]
        notes += said
    return problems, [f"{other.name}: {note}" for note in notes]


def _differences(base: Member, other: Member) -> Iterator[tuple[str, object, object, str]]:
    """Each difference: what, the base's value, the variant's value, and a hint."""
    a, b = base.architecture, other.architecture
    leave = "Variants must be fine-tunes of one base; leave this one out."
    if a.family.name != b.family.name:
        yield "architecture", a.family.title, b.family.title, leave
        return
    for what in ("n_layers", "width", "n_query_heads", "n_kv_heads", "head_dim", "n_channels", "n_experts"):
        if getattr(a, what) != getattr(b, what):
            yield what, getattr(a, what), getattr(b, what), leave
    ours, theirs = ({name for layer in range(a.n_layers) for name in each.layer_shapes(layer)} for each in (a, b))
    if ours != theirs:
        lacks, more = ", ".join(sorted(ours - theirs)), ", ".join(sorted(theirs - ours))
        found = "; ".join(text for text in (lacks and f"without {lacks}", more and f"with {more}") if text)
        yield "the tensors of a layer", None, found, leave
    if a.layer_types != b.layer_types:
        yield "layer_types", None, "other attention types", leave
    for what, value in (("rotary embedding", _rotary), ("activation", _activation)):
        if value(base.config) != value(other.config):
            yield what, value(base.config), value(other.config), leave
    if b.vocabulary < a.vocabulary:
        yield "vocabulary", f"{a.vocabulary} or more", f"{b.vocabulary} rows", leave
    if a.tied != b.tied:
        words = {True: "an embedding that is also the head", False: "a head of its own"}
        yield "tied embeddings", words[a.tied], words[b.tied], leave
    if base.checkpoint is not None and other.checkpoint is not None:
        ours_dtype, theirs_dtype = _dtype(base.checkpoint), _dtype(other.checkpoint)
        if ours_dtype != theirs_dtype:
            convert = f"Convert it once: from_pretrained(..., dtype={ours_dtype!r}), then save_pretrained()."
            yield "dtype", ours_dtype, theirs_dtype, convert


def _rotary(config: Mapping[str, Any]) -> str:
    """Base frequency and scaling of the rotary embedding, from older and newer configs."""
    found = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    found |= config.get("rope_parameters") or {}
    kind = found.pop("rope_type", found.pop("type", None)) or "default"
    theta = found.pop("rope_theta", None) or 10000.0
    found.pop("type", None)
    rest = {key: value for key, value in sorted(found.items()) if value is not None}
    return f"{kind} with base {float(theta):g}" + (f" and {json.dumps(rest)}" if rest else "")


def _activation(config: Mapping[str, Any]) -> str:
    return str(config.get("hidden_act") or config.get("activation_function") or "the family's own")


def _dtype(checkpoint: Checkpoint) -> str:
    """The dtypes of the layers' weights."""
    architecture = checkpoint.architecture
    names = [
        architecture.tensor_name(layer, local)
        for layer in range(architecture.n_layers)
        for local in architecture.layer_shapes(layer)
    ]
    return " and ".join(sorted({str(checkpoint.headers[name].dtype).removeprefix("torch.") for name in names}))


def _remarks(base: Member, other: Member) -> Iterator[str]:
    more = other.architecture.vocabulary - base.architecture.vocabulary
    if more > 0:
        yield f"the last {more:,} rows of its vocabulary are not used, because the base lacks them"
    for key in ("rms_norm_eps", "max_position_embeddings"):
        ours, theirs = base.config.get(key), other.config.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            yield f"{key} is {theirs}; the base's {ours} is used"
    adapter = None if other.checkpoint is None else other.checkpoint.adapter
    named = None if adapter is None else adapter.base_model
    known = "smollm2-135m-instruct" if base.model == DEMO else Path(base.model).name.lower()
    if named is not None and Path(named).name.lower() != known:
        yield f"the adapter names {named} as its base, and is applied to {base.model}"


def _compare_tokens(base: Checkpoint, other: Checkpoint) -> tuple[list[str], list[str]]:
    """Differences of two tokenizers in the base's vocabulary, and remarks."""
    folder = other.folder if other.adapter is None else other.adapter.folder
    ours, theirs = _tokens(base.folder), _tokens(folder)
    if ours is None or theirs is None:
        # Most adapters have no tokenizer; they were trained with the base's.
        alone = other.adapter is not None and theirs is None and ours is not None
        return [], [] if alone else ["no tokenizer to compare with the base's"]
    rows = base.architecture.vocabulary
    moved = [repr(token) for token, row in ours.items() if row < rows and theirs.get(token) != row]
    taken = [repr(token) for token, row in theirs.items() if row < rows and token not in ours]
    wrong = [f"other rows for {few(moved, _MOST_NAMED)}"] if moved else []
    spare = f"its tokens {few(taken, _MOST_NAMED)} have no text in the base's tokenizer"
    return wrong, [spare] if taken and not moved else []


def _tokens(folder: Path) -> dict[str, int] | None:
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts())
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError):
        return None
    found: dict[str, int] = tokenizer.get_vocab()
    return found


def read_config_only(
    model: str, revision: str | None, base: Member | None = None, *, configs: Path | None = None
) -> tuple[Mapping[str, Any], Architecture]:
    """The config of a model and the architecture by this config; an adapter has those of `base`.

    Args:
        configs: a folder with config files of hub ids as `ORGANISATION/NAME/config.json`, which are then not
            downloaded.
    """
    folder = Path(os.path.expanduser(model))
    if model == DEMO or folder.is_dir():
        folder = resolve(model, revision=revision)
        if is_adapter(folder) and base is not None:
            read_adapter_config(folder)
            return base.config, base.architecture
    elif configs is not None and (configs / model / "config.json").is_file():
        folder = configs / model
    else:
        folder = _downloaded(model, revision)
    config = text_config(read_config(folder), where=str(folder))
    return config, architecture_of(config, where=str(folder / "config.json"))


def _downloaded(model: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if trusts():
            snapshot_download(model, revision=revision, allow_patterns=["*.py"])
        return Path(hf_hub_download(model, "config.json", revision=revision)).parent
    except Exception as error:
        # The errors of a failed download differ between versions of the hub's client.
        raise not_downloaded(model, revision, error) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A checked family. `members[0]` is the base; `notes` are remarks for the user."""

    members: tuple[Member, ...]
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The members' names, the base's first."""
        return tuple(member.name for member in self.members)

    @property
    def architecture(self) -> Architecture:
        """The base's architecture, which all members share."""
        return self.members[0].architecture

    @property
    def parameters(self) -> int | None:
        """The base's parameters; None if only its config was read."""
        checkpoint = self.members[0].checkpoint
        return None if checkpoint is None else checkpoint.parameters

    def checkpoints(self) -> dict[str, Checkpoint]:
        """The checkpoints by name; none if only configs were read."""
        return {member.name: member.checkpoint for member in self.members if member.checkpoint is not None}

    def folders(self) -> list[Path]:
        """The folders that the members are read from."""
        checkpoints = self.checkpoints().values()
        return [found.folder for found in checkpoints] + [each.adapter.folder for each in checkpoints if each.adapter]

    def variants(self) -> tuple[Variant, ...]:
        """The members as variants of recipes, with the hashes of their weights, which are checked to be finite."""
        return tuple(
            Variant(
                name=member.name,
                model=lasting(member.model),
                revision=member.revision,
                sha256=None if member.checkpoint is None else scan(member.checkpoint),
            )
            for member in self.members
        )


def open_family(specs: Mapping[str, MemberSpec], *, weights: bool = True, configs: Path | None = None) -> Family:
    """Open the members of a family, the base first, and check that they belong together.

    Args:
        weights: False reads config files alone, before any download; shapes then follow from the configs.
        configs: local config files of hub models (see `read_config_only`).

    Raises:
        UserError: with every member that cannot be read, and every difference from the base.
    """
    notes: list[str] = [] if weights else ["Only config files were read: weights and tokenizers are not checked."]
    (name, spec), *variants = specs.items()
    base = _member(name, spec, None, weights, configs)
    members, problems = [base], Problems()
    for name, spec in variants:
        with problems:
            members.append(_member(name, spec, base, weights, configs))
            wrong, said = compare(base, members[-1])
            problems += wrong
            notes += said
    problems.raise_any()
    return Family(members=tuple(members), notes=tuple(notes))


def _member(name: str, spec: MemberSpec, base: Member | None, weights: bool, configs: Path | None) -> Member:
    checkpoint: Checkpoint | None = None
    config: Mapping[str, Any]
    if weights:
        over = None if base is None else base.checkpoint
        checkpoint = open_variant(spec.model, revision=spec.revision, base=over)
        if base is None:
            checkpoint = verified(checkpoint)
        config, architecture = checkpoint.config, checkpoint.architecture
    else:
        config, architecture = read_config_only(spec.model, spec.revision, base, configs=configs)
    return Member(name, spec.model, spec.revision, config, architecture, checkpoint)
