"""What decides a plan, and the recipe that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from intarsia.checkpoint.hashing import acting_config
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.resolve import lasting
from intarsia.planning.run_folder import RunFolder
from intarsia.planning.settings import layers_at_once
from intarsia.planning.told import mlp_pieces
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
    begun = RunFolder(run).begun_with()
    return {
        "model": _model_of(RunFolder(run), source),
        "revision": source.revision,
        "sha256": source.sha256,
        "config": config_as_begun(source.checkpoint.config, begun),
        "method": wanted.method,
        **working_settings(source, calibration_of(run, source), wanted.batch_tokens),
        "planner": None if wanted.settings is None else wanted.settings.to_dict(),
        "heal_in_loop": None if wanted.in_loop is None else asdict(wanted.in_loop),
        # Where more than two layers are merged at once the last step merges fewer, so the ladder depends on its end.
        "target": wanted.target if layers_at_once(wanted.settings) > 2 else None,
    }


def model_as_begun(source: Source, begun_with: str | None, sha256: str | None, *, place: str | None = None) -> str:
    """How settings name the model: as when the work was begun, where it is the same folder, spelled otherwise.

    A folder elsewhere is another model even if it has the same weights: recipes name the one that they were made from.

    Args:
        begun_with, sha256: what is recorded of the model, if anything is.
        place: what a recipe that was made from it calls it, which says more: a relative path is so from somewhere.
    """
    if begun_with is None or begun_with == source.model or source.sha256 != sha256:
        return source.model
    return begun_with if lasting(source.model) == (place or lasting(begun_with)) else source.model


def _model_of(run: RunFolder, source: Source) -> str:
    if not run.is_one():
        return source.model
    begun = run.settings()
    depths = run.depths()
    ladder = None if not depths or begun.get("model") == source.model else run.recipe(depths[-1])
    place = None if ladder is None else ladder.variants[0].model
    return model_as_begun(source, begun.get("model"), begun.get("sha256"), place=place)


def config_as_begun(config: Mapping[str, Any], begun: Mapping[str, Any], name: str = "config") -> dict[str, Any] | None:
    """What of a config changes the numbers; None where the work was begun before that was recorded.

    Args:
        begun: the settings that it was begun with; nothing, where it was not.
        name: of the config among them.
    """
    return None if begun and begun.get(name) is None else acting_config(config)


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
    whole = identity(variant, checkpoint.anatomy.n_layers)
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
    if checkpoint.anatomy.is_mixture("mlp"):
        provenance["mlp_pieces"] = mlp_pieces(True)  # the recipe itself tells their numbers alone
    return whole.with_layers(whole.layers, provenance=provenance)


def _decided_by(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The planner's settings, and how it repaired on the way."""
    planner: dict[str, Any] | None = settings["planner"]
    in_loop = settings["heal_in_loop"]
    return planner if in_loop is None else {**(planner or {}), "heal_in_loop": in_loop}


def _dtype_of(checkpoint: Checkpoint) -> Any:
    """The dtype of the embedding, which stands for the model's."""
    return checkpoint.headers[f"{checkpoint.anatomy.family.embedding_module}.weight"].dtype
