"""Check an architecture against the tensors that a checkpoint really has.

Called with names and shapes from the file headers, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping

from intarsia.architecture.spec import Architecture
from intarsia.data_file import refusal
from intarsia.errors import Problem


def verify(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Check every layer tensor and the embedding for presence and shape.

    Raises:
        UserError: with every missing tensor, wrong shape and unexpected layer tensor (at most twenty are listed).
    """
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
            where=f"{where}: {name}",
            expected=f"shape {list(shape)} by the config",
            found=f"shape {list(shapes[name])}" if name in shapes else "no such tensor",
            remedy="The config and the weights do not belong together; get the checkpoint again.",
        )
        for name, shape in expected.items()
        if tuple(shapes.get(name, ())) != tuple(shape)
    ]
    known = set(architecture.layer_shapes())
    prefix = f"{architecture.family.layers_module}."
    problems += [
        Problem(
            where=f"{where}: {name}",
            expected=f"only tensors that the family file of {architecture.family.title} covers",
            found=f"shape {list(shapes[name])}",
            remedy="The model has something in its layers that would be lost; it cannot be cut safely.",
        )
        for name in sorted(shapes)
        if name.startswith(prefix) and not _covered(name.removeprefix(prefix), known, architecture)
    ]
    if problems:
        raise refusal(problems, where=where, most=20)


def _covered(rest: str, known: set[str], architecture: Architecture) -> bool:
    index, _, local = rest.partition(".")
    # Old Llama checkpoints carry a buffer of rotary frequencies, which is recomputed from the config.
    computed = local.endswith("rotary_emb.inv_freq") or local in architecture.family.buffers
    return index.isdigit() and int(index) < architecture.n_layers and (local in known or computed)
