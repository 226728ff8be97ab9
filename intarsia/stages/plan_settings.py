"""What decides a plan, and the recipe that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from intarsia.checkpoint.hashing import acting_config
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import lasting
from intarsia.pruning.run_folder import RunFolder
from intarsia.pruning.settings import layers_at_once
from intarsia.pruning.step import mlp_pieces
from intarsia.recipe.recipe import Recipe, Variant, identity
from intarsia.stages.calibration_text import calibration_of
from intarsia.stages.plan_input import Asked
from intarsia.stages.source import Source
from intarsia.stages.versions import versions

BASE = "base"


def identifying_settings(source: Source, run: Path, wanted: Asked) -> dict[str, Any]:
    """What must be the same where a run goes on.

    Raises:
        UserError: the model or the calibration text cannot be used, or the run folder is damaged.
    """
    return {
        # Absolute: however the folder is spelled, and wherever the command runs, it is the same model.
        "model": lasting(source.model),
        "revision": source.revision,
        "sha256": source.sha256,
        "config": acting_config(source.checkpoint.config),
        "method": wanted.method,
        **working_settings(source, calibration_of(run, source), wanted.batch_tokens),
        "planner": None if wanted.settings is None else asdict(wanted.settings),
        "heal_in_loop": None if wanted.in_loop is None else asdict(wanted.in_loop),
        # Where more than two layers are merged at once the last step merges fewer, so the ladder depends on its end.
        "target": wanted.target if layers_at_once(wanted.settings) > 2 else None,
    }


def working_settings(source: Source, calibration: str, batch_tokens: int | None) -> dict[str, Any]:
    """On what text and how a model is worked on, whatever is done to it; `calibration` is how the text is named."""
    return {
        "calibration": calibration,
        "tokens": source.tokens,
        "seq_len": source.seq_len,
        "seed": source.seed,
        "dtype": source.dtype_name,
        "device": source.device.type,
        "batch_tokens": batch_tokens,
    }


def first_recipe(folder: RunFolder, source: Source, settings: dict[str, Any]) -> Recipe:
    """The recipe to go on from: the last one of the ladder, or the whole model."""
    if folder.depths():
        return folder.recipe(folder.depths()[-1])
    checkpoint, corpus = source.checkpoint, source.corpus
    variant = Variant(name=BASE, model=lasting(source.model), revision=source.revision, sha256=source.sha256)
    whole = identity(variant, checkpoint.architecture.n_layers)
    provenance = {
        "method": settings["method"],
        "settings": _decided_by(settings),
        "calibration": {
            "text": corpus.description,
            "tokens": corpus.tokens,
            "seq_len": corpus.seq_len,
            "seed": settings["seed"],
            "sha256": corpus.sha256,
        },
        "dtype": settings["dtype"] or str(_dtype_of(checkpoint)).removeprefix("torch."),
        "device": settings["device"],
        "versions": versions(),
    }
    if checkpoint.architecture.is_mixture("mlp"):
        provenance["mlp_pieces"] = mlp_pieces(True)  # the recipe itself tells their numbers alone
    return whole.with_layers(whole.layers, provenance=provenance)


def _decided_by(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The planner's settings, and how it repaired on the way."""
    planner: dict[str, Any] | None = settings["planner"]
    in_loop = settings["heal_in_loop"]
    return planner if in_loop is None else {**(planner or {}), "heal_in_loop": in_loop}


def _dtype_of(checkpoint: Checkpoint) -> Any:
    """The dtype of the embedding, which stands for the model's."""
    return checkpoint.headers[f"{checkpoint.architecture.family.embedding_module}.weight"].dtype
