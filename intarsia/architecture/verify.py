"""Check an architecture against the tensors that a checkpoint really has.

Called with names and shapes from the file headers, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping

from intarsia.architecture.spec import Architecture
from intarsia.data_file import refusal
from intarsia.errors import Problem, UserError


def verify(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Check every layer tensor and the embedding for presence and shape.

    Raises:
        UserError: with the one cause where all names or the depth are others, else with every missing tensor, wrong
            shape and unexpected layer tensor (at most twenty are listed).
    """
    _check_names(architecture, shapes, where)
    _check_depth(architecture, shapes, where)
    # Some OPT sizes embed at a width of their own and project to the model's.
    embedding_width = architecture.config.get(architecture.family.fields.get("embedding_width", ""), architecture.width)
    expected: dict[str, tuple[int, ...]] = {
        f"{architecture.family.embedding_module}.weight": (architecture.vocabulary, embedding_width)
    }
    for layer in range(architecture.n_layers):
        for local, shape in architecture.layer_shapes().items():
            expected[architecture.tensor_name(layer, local)] = shape
    problems = [
        Problem(
            f"{where}: {name}: expected shape {list(shape)} by the config; "
            f"found {f'shape {list(shapes[name])}' if name in shapes else 'no such tensor'}.",
            "The config and the weights do not belong together; get the checkpoint again.",
        )
        for name, shape in expected.items()
        if tuple(shapes.get(name, ())) != tuple(shape)
    ]
    known = set(architecture.layer_shapes())
    prefix = f"{architecture.family.layers_module}."
    problems += [
        Problem(
            f"{where}: {name}: "
            f"expected only tensors that the family file of {architecture.family.title} covers; "
            f"found shape {list(shapes[name])}.",
            "Its layers hold something that would be lost; it cannot be pruned.",
        )
        for name in sorted(shapes)
        if name.startswith(prefix) and not _covered(name.removeprefix(prefix), known, architecture)
    ]
    if problems:
        raise refusal(problems, where=where, most=20)


def _check_names(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse tensors that all have another prefix than the family's, or none."""
    embedding = f"{architecture.family.embedding_module}.weight"
    if embedding in shapes:
        return
    prefix, _, bare = embedding.partition(".")
    longer = next((name for name in shapes if name.endswith(f".{embedding}")), None)
    if bare in shapes:
        raise UserError(
            f"{where} holds the tensors of a base class, without the prefix `{prefix}.` and without a head.",
            "Save it from AutoModelForCausalLM: from_pretrained(FOLDER).save_pretrained(NEW).",
        )
    if longer is not None:
        extra = longer.removesuffix(embedding)
        raise UserError(
            f"The names of the tensors in {where} start with `{extra}`, which models of this kind do not have.",
            "Save the model itself with save_pretrained(), not what is around it.",
        )


def _check_depth(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a config with another number of layers than the files hold."""
    prefix = f"{architecture.family.layers_module}."
    local = architecture.layer_shapes()
    split = (name.removeprefix(prefix).partition(".") for name in shapes if name.startswith(prefix))
    found = {int(index) for index, _, name in split if index.isdigit() and name in local}
    # A layer of which some tensors are missing is another fault.
    whole = all(architecture.tensor_name(layer, name) in shapes for layer in found for name in local)
    if found and whole and len(found) != architecture.n_layers and found == set(range(len(found))):
        field = architecture.family.fields["layers"]
        raise UserError(
            f"{where}: {field} is {architecture.n_layers} in the config, and the files hold {len(found)} layers.",
            f"Get config and weights that belong together; if the weights are right, set {field} to {len(found)}.",
        )


def _covered(rest: str, known: set[str], architecture: Architecture) -> bool:
    index, _, local = rest.partition(".")
    # Old Llama checkpoints carry a buffer of rotary frequencies, which is recomputed from the config.
    computed = local.endswith("rotary_emb.inv_freq") or local in architecture.family.buffers
    return index.isdigit() and int(index) < architecture.n_layers and (local in known or computed)
