"""Whether a model is of the same family as the base: every difference that counts, and those that are only said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intarsia.architecture.spec import Architecture
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import DEMO
from intarsia.errors import Problem

_MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """A model of a family. Without `checkpoint` only its config is known."""

    name: str
    model: str
    revision: str | None
    config: Mapping[str, Any]
    architecture: Architecture
    checkpoint: Checkpoint | None = None


def compare(base: Member, other: Member) -> tuple[list[Problem], list[str]]:
    """What makes `other` no fine-tune of the base, and what is worth saying."""
    problems = [
        Problem(
            where=f"variant {other.name} ({other.model}): {what}",
            expected=f"{ours}, as in the base {base.model}",
            found=str(theirs),
            remedy=remedy,
        )
        for what, ours, theirs, remedy in _differences(base, other)
    ]
    notes = [f"{other.name}: {note}" for note in _remarks(base, other)]
    if base.checkpoint is not None and other.checkpoint is not None:
        wrong, said = _compare_tokens(base.checkpoint, other.checkpoint)
        problems += [
            Problem(
                where=f"variant {other.name} ({other.model}): tokenizer",
                expected="the base's tokens",
                found=found,
                remedy="A variant must read text as the base does; leave this one out.",
            )
            for found in wrong
        ]
        notes += [f"{other.name}: {note}" for note in said]
    return problems, notes


def _differences(base: Member, other: Member) -> Iterator[tuple[str, object, object, str]]:
    a, b = base.architecture, other.architecture
    leave = "Variants must be fine-tunes of one base; leave this one out."
    if a.family.name != b.family.name:
        yield "architecture", a.family.title, b.family.title, leave
        return
    for what in ("n_layers", "width", "n_query_heads", "n_kv_heads", "head_dim", "n_channels", "n_experts"):
        if getattr(a, what) != getattr(b, what):
            yield what, getattr(a, what), getattr(b, what), leave
    ours, theirs = set(a.layer_shapes()), set(b.layer_shapes())
    if ours != theirs:
        lacks, more = ", ".join(sorted(ours - theirs)), ", ".join(sorted(theirs - ours))
        found = "; ".join(text for text in (lacks and f"without {lacks}", more and f"with {more}") if text)
        yield "tensors of a layer", "the same", found, leave
    if a.layer_types != b.layer_types:
        yield "layer_types", "the same attention types", "others", leave
    for what, value in (("rotary embedding", _rotary), ("activation", _activation)):
        if value(base.config) != value(other.config):
            yield what, value(base.config), value(other.config), leave
    if b.vocabulary < a.vocabulary:
        yield "vocabulary", f"{a.vocabulary} rows or more", b.vocabulary, leave
    if a.tied != b.tied:
        words = {True: "an embedding that is also the head", False: "a head of its own"}
        yield "tied embeddings", words[a.tied], words[b.tied], leave
    if base.checkpoint is not None and other.checkpoint is not None:
        ours_dtype, theirs_dtype = _dtype(base.checkpoint), _dtype(other.checkpoint)
        if ours_dtype != theirs_dtype:
            convert = f"Convert it once: from_pretrained(..., dtype={ours_dtype!r}), then save_pretrained()."
            yield "dtype", ours_dtype, theirs_dtype, convert


def _rotary(config: Mapping[str, Any]) -> str:
    """Base frequency and scaling of the rotary embedding, as older and newer configs write it."""
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
    """The dtype of the layers' weights; several, where they differ."""
    architecture = checkpoint.architecture
    names = [
        architecture.tensor_name(layer, local)
        for layer in range(architecture.n_layers)
        for local in architecture.layer_shapes()
    ]
    return " and ".join(sorted({str(checkpoint.headers[name].dtype).removeprefix("torch.") for name in names}))


def _remarks(base: Member, other: Member) -> Iterator[str]:
    more = other.architecture.vocabulary - base.architecture.vocabulary
    if more > 0:
        yield f"the last {more:,} rows of its vocabulary are not used, for the base has none of them"
    for key in ("rms_norm_eps", "max_position_embeddings"):
        ours, theirs = base.config.get(key), other.config.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            yield f"{key} is {theirs}; the base's {ours} is used"
    adapter = None if other.checkpoint is None else other.checkpoint.adapter
    named = None if adapter is None else adapter.base_model
    known = "smollm2-135m-instruct" if base.model == DEMO else Path(base.model).name.lower()
    if named is not None and Path(named).name.lower() != known:
        yield f"the adapter names {named} as its base, and is laid over {base.model}"


def _compare_tokens(base: Checkpoint, other: Checkpoint) -> tuple[list[str], list[str]]:
    """Differences of two tokenizers in the base's rows, and remarks."""
    folder = other.folder if other.adapter is None else other.adapter.folder
    ours, theirs = _tokens(base.folder), _tokens(folder)
    if ours is None or theirs is None:
        # Adapters seldom bring one along; then they were trained with the base's.
        alone = other.adapter is not None and theirs is None and ours is not None
        return [], [] if alone else ["no tokenizer to compare with the base's"]
    rows = base.architecture.vocabulary
    moved = [token for token, row in ours.items() if row < rows and theirs.get(token) != row]
    taken = [token for token, row in theirs.items() if row < rows and token not in ours]
    wrong = [f"other rows for {_some(moved)}"] if moved else []
    spare = f"its tokens {_some(taken)} have no text in the base's tokenizer"
    return wrong, [spare] if taken and not moved else []


def _some(tokens: list[str]) -> str:
    rest = len(tokens) - _MOST_NAMED
    return ", ".join(repr(token) for token in tokens[:_MOST_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def _tokens(folder: Path) -> dict[str, int] | None:
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError):
        return None
    found: dict[str, int] = tokenizer.get_vocab()
    return found
