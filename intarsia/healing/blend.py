"""Healing of blends of several models: the teacher is the same blend with no layer removed.

Healed toward one of its members, a blend would lose what it has from the others. So the same blend with all of its
layers (`reference_layers` of `intarsia.recipe.algebra`) is written into the run folder and takes the base's place:
unpruned layers become plain selections from it, and the stages work as with one model. The tensors they fit then belong
to the recipe over the members.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from intarsia import progress
from intarsia.building.materialize import materialize
from intarsia.checkpoint.hashing import scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.disk import require_room
from intarsia.recipe import schema
from intarsia.recipe.algebra import reference_layers
from intarsia.recipe.recipe import LayerRef, Op, Recipe, Select, Variant, derive_spans

BLEND = "the same blend with no layer removed"
"""The name of this teacher in log and report."""
_NAME = "uncut"


def blend_of(recipe: Recipe) -> Recipe:
    """The recipe with no layer removed."""
    layers = reference_layers(recipe)
    return replace(recipe, layers=layers, spans=derive_spans(layers, recipe.depth), fitted={}, provenance={})


def blend_sha256(recipe: Recipe, members: Mapping[str, str]) -> str:
    """The blend's identity, known before it is built; `members` are the weight hashes of all variants."""
    plain = replace(recipe, variants=tuple(Variant(name=v.name, model=v.name) for v in recipe.variants))
    facts = [schema.content_hash(blend_of(plain)), sorted(members.items())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def over_its_blend(
    recipe: Recipe, variants: Mapping[str, Checkpoint], run: Path
) -> tuple[Recipe, dict[str, Checkpoint]]:
    """The same model as a recipe over its blend, and all checkpoints of that.

    Args:
        variants: the opened members.
        run: a run folder with this recipe and these members; the blend is written to `uncut/` there, unless an
            earlier call did so.

    Raises:
        UserError: it cannot be written.
    """
    folder, layers = run / _NAME, reference_layers(recipe)
    if not folder.exists():
        require_room(run, variants[recipe.base].nbytes, f"the teacher, {BLEND}", option="--run")
        progress.current().say(f"made of several models; the teacher is {BLEND}")
        materialize(blend_of(recipe), variants, folder)
    blend = Checkpoint.open(folder, model=str(folder))
    name = _NAME
    while name in variants:
        name += "_"

    def over(op: Op) -> Op:
        at = op.sources[0].layer
        return Select(source=LayerRef(variant=name, layer=at)) if op == layers[at] else op

    made = replace(
        recipe,
        variants=(Variant(name=name, model=str(folder), sha256=scan(blend)), *recipe.variants),
        base=name,
        layers=tuple(over(op) for op in recipe.layers),
    )
    return made, {name: blend, **variants}


def forget(run: Path) -> None:
    """Delete the blend once it is no longer needed. A kill leaves an incomplete one, which does not count."""
    folder, leaving = run / _NAME, run / f".{_NAME}"
    if folder.exists():
        shutil.rmtree(leaving, ignore_errors=True)
        os.replace(folder, leaving)
    shutil.rmtree(leaving, ignore_errors=True)
