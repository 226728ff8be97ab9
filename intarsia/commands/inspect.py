"""`intarsia inspect`: show a model, a recipe or a run folder, without loading weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from intarsia.errors import UserError
from intarsia.flags import Flag
from intarsia.model_name import check_model
from intarsia.pruning.ladder import Ladder
from intarsia.pruning.step import mlp_pieces, of_experts, step_words
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe, format_ranges
from intarsia.reporting.comparison import SETTINGS as COMPARISON
from intarsia.reporting.puzzle import made_of
from intarsia.tailoring.run import FACTS as SEARCH

if TYPE_CHECKING:
    from intarsia.checkpoint.reader import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The facts about a model, recipe or run folder."""

    source: str
    # `model`, `recipe` or `run`
    kind: str
    # plain data, in reading order
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "kind": self.kind, **self.facts}

    def summary(self) -> dict[str, Any]:
        """The facts on one screen: ten lines for a model."""
        return _in_short(self.facts) if self.kind == "model" else self.to_dict()


def inspect(
    source: Annotated[
        str,
        Flag(
            positional=True,
            metavar="SOURCE",
            help="A model (folder, hub id or `demo`), a recipe (.yaml), or the run folder of a plan.",
        ),
    ],
) -> Inspection:
    """Show facts about a model, a recipe or a run folder, without loading weights.

    Raises:
        UserError: it is none of these, or damaged.
    """
    path, source = Path(source), str(source)
    if path.suffix in (".yaml", ".yml"):
        return Inspection(source=source, kind="recipe", facts=_recipe_facts(schema.load(path)))
    for name, what in ((COMPARISON, "a comparison"), (SEARCH, "a search")):
        if (path / name).is_file():
            raise UserError(f"{source} is {what} (with {name}).", f"Use `intarsia report {source}`.")
    if (path / "settings.json").is_file():
        return Inspection(source=source, kind="run", facts=_run_facts(Ladder.existing(path)))
    check_model(source)
    from intarsia.building.materialize import RECIPE_FILE
    from intarsia.checkpoint.resolve import open_checkpoint

    checkpoint = open_checkpoint(source)
    removal = checkpoint.architecture.inspected is not None
    facts = _removal_facts(checkpoint) if removal else _model_facts(checkpoint)
    if checkpoint.wrapper is not None:
        rest = sum(header.numel for header in checkpoint.kept.values())
        facts["around_it"] = f"{checkpoint.wrapper.config['model_type']}: {rest:,} parameters stay byte for byte"
    carried = checkpoint.folder / RECIPE_FILE
    if carried.is_file():
        facts["recipe"] = _recipe_facts(schema.load(carried), mixture=checkpoint.architecture.is_mixture("mlp"))
    return Inspection(source=source, kind="model", facts=facts)


def _model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    architecture = checkpoint.architecture
    heads = f"{architecture.heads_per_group} query heads of {architecture.head_dim} each"
    channels, experts = architecture.n_channels, architecture.n_experts
    facts: dict[str, Any] = {
        "family": architecture.family.title,
        "tier": "known: its layers can be removed, merged and joined from pieces",
        "layers": architecture.n_layers,
        "width": architecture.width,
        "parameters": checkpoint.parameters,
        "layer_parameters": architecture.layer_parameters,
        "share_of_a_layer": f"{architecture.layer_parameters / checkpoint.parameters:.2%} of all parameters",
        "bytes": checkpoint.nbytes,
        "kv_groups": f"{architecture.n_kv_heads} a layer, {heads}",
        "mlp_channels": f"{experts} experts a layer, {channels} channels each; pieces are experts"
        if experts
        else f"{channels} a layer",
        **({"attention_and_mlp": "side by side, on one residual stream"} if architecture.parallel else {}),
        "vocabulary": architecture.vocabulary,
        "tied_embeddings": architecture.tied,
        "can_be_removed": "any layer",
    }
    if architecture.layer_types is not None:
        facts["layer_types"] = _counted(architecture.layer_types)
        facts["can_be_removed"] += "; layers of one kind can be merged and joined"
    if architecture.approximations:
        facts["not_exact_when_merged"] = list(architecture.approximations)
    return facts


def _in_short(facts: Mapping[str, Any]) -> dict[str, Any]:
    """A model's facts, several on a line."""
    recipe = facts.get("recipe")
    kinds = facts.get("layer_types") or facts.get("kinds")
    more = {key: facts[key] for key in ("around_it",) if key in facts}
    more |= {} if recipe is None else {"made_by": f"{recipe['method']}: {recipe['depth']}"}
    if "width" not in facts:  # a model whose layers can only be removed
        shown = {key: value for key, value in facts.items() if key not in ("kinds", "recipe")}
        return shown | {"layers": f"{facts['layers']} ({kinds})"} | more
    inexact = facts.get("not_exact_when_merged")
    tied = "tied" if facts["tied_embeddings"] else "not tied"
    return {
        "family": facts["family"],
        "tier": facts["tier"],
        "layers": f"{facts['layers']}, of width {facts['width']}" + (f" ({kinds})" if kinds else ""),
        "parameters": facts["parameters"],
        "bytes": facts["bytes"],
        "a_layer": f"{facts['share_of_a_layer']}; KV groups: {facts['kv_groups']}; MLP channels: "
        f"{facts['mlp_channels']}",
        "embedding": f"{facts['vocabulary']:,} tokens, {tied} to the head",
        "can_be_removed": facts["can_be_removed"],
        "exact": "removal" + (f"; not exact when merged: {'; '.join(inexact)}" if inexact else ", and joined pieces"),
        **more,
    }


def _removal_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    from intarsia.inspection.structure import Possible

    architecture, parameters = checkpoint.architecture, checkpoint.parameters
    assert architecture.inspected is not None
    kinds = architecture.layer_types or ("layer",) * architecture.n_layers
    whole, possible = range(architecture.n_layers), Possible(architecture)
    free = [layer for layer in whole if possible([other for other in whole if other != layer])]
    return {
        "family": architecture.family.title,
        "tier": "removal: its layers can be removed, and not joined",
        "why": architecture.inspected.reason,
        "layers": f"{architecture.n_layers}, of width {architecture.width}",
        "kinds": _counted(kinds),
        "parameters": parameters,
        "share_of_a_layer": f"{architecture.layer_parameters / parameters:.2%} of all parameters, on average",
        "follows_the_layers": ", ".join([*architecture.per_layer, *architecture.inspected.tables]) or "nothing else",
        "can_be_removed": f"{format_ranges(free)}; several, if every kind stays and the config can describe it"
        if free
        else "none",
        "exact": "removing layers equals skipping them; `intarsia anatomy check` verifies this on a small model",
    }


def _counted(kinds: Sequence[str]) -> str:
    return ", ".join(f"{kind}: {kinds.count(kind)}" for kind in dict.fromkeys(kinds))


def _recipe_facts(recipe: Recipe, *, mixture: bool = False) -> dict[str, Any]:
    mlp = mlp_pieces(mixture or of_experts(recipe.provenance))
    rows = [
        {
            "layer": index,
            "original": f"{first}" if stop - first == 1 else f"{first}-{stop - 1}",
            "op": type(op).__name__.lower(),
            "made_of": made_of(op, mlp, named=True),
            "fitted": ", ".join(recipe.fitted.get(index, ())) or None,
        }
        for index, (op, (first, stop)) in enumerate(zip(recipe.layers, recipe.spans, strict=True))
    ]
    return {
        "variants": [{"name": variant.name, "model": variant.model} for variant in recipe.variants],
        "depth": f"{len(recipe.layers)} of {recipe.depth} layers",
        "method": recipe.provenance.get("method"),
        "sha256": schema.content_hash(recipe),
        "output_layers": rows,
    }


def _run_facts(run: Ladder) -> dict[str, Any]:
    settings, depths = run.settings(), run.depths()
    mlp = mlp_pieces(bool(depths) and of_experts(run.recipe(depths[0]).provenance))
    steps = [
        {
            "layers": entry["layers"],
            "made_of": step_words(entry, mlp),
            "calibration_loss": entry["loss"],
            "layer_forwards": round(entry["layer_forwards"], 2),
            "seconds": round(entry["seconds"], 1),
        }
        for entry in run.log()
    ]
    keys = ("model", "method", "calibration", "tokens", "seq_len")
    wanted, unfinished = run.wanted(), run.unfinished()
    return {
        **{key: settings.get(key) for key in keys},
        "target": None if wanted is None else wanted.layers,
        **({} if unfinished is None else {"not_finished": unfinished}),
        "steps": steps,
    }
