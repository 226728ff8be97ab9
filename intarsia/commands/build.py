"""`intarsia build`: build a model folder from a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from intarsia.commands.push import push_later
from intarsia.errors import UserError
from intarsia.flags import Flag, Result
from intarsia.options import NewModel


@dataclass(frozen=True, kw_only=True)
class BuildResult(Result):
    """A built model."""

    out: Path
    layers: int
    parameters: int
    # of the weight files
    bytes: int
    recipe_sha256: str
    seconds: float
    peak_memory_bytes: int
    # the upload to the hub
    push: Mapping[str, Any] | None = None


def build(
    source: Annotated[
        Path, Flag(positional=True, metavar="RUN|RECIPE", help="A run folder of plan or tailor, or a recipe.")
    ],
    out: NewModel | str | Path,
    *,
    layers: Annotated[
        int | None, Flag(metavar="N", help="For a plan: the depth to build (default: the smallest).")
    ] = None,
    best: Annotated[str | None, Flag(metavar="NAME", help="For a search: the best trial in this objective.")] = None,
    knee: Annotated[bool, Flag(help="For a search: the knee of its Pareto front (the default).")] = False,
    trial: Annotated[int | None, Flag(metavar="N", help="For a search: the trial with this number.")] = None,
) -> BuildResult:
    """Build the model that a recipe describes: a recipe file, a depth of a plan, or a trial of a search.

    Building a recipe twice gives the same bytes.

    Raises:
        UserError: the recipe cannot be read or does not fit its models, a model has changed since the recipe was
            made, or the output cannot be written.
    """
    from intarsia.checkpoint.resolve import inputs_of
    from intarsia.commands.recipes import build_recipe, read_recipe
    from intarsia.disk import check_out
    from intarsia.tailoring.recipes import trial_recipe
    from intarsia.tailoring.run import TailorRun, is_tailor_run

    source, out = Path(source), NewModel.of(out)
    read = [source, source.with_suffix(".safetensors")]  # a recipe has a side file
    check_out(out.path, overwrite=out.overwrite, inputs=inputs_of(files=read))
    send_off = push_later(out.push_to, private=out.private)
    if is_tailor_run(source) and layers is None:
        search = TailorRun(source)
        recipe = trial_recipe(search, search.chosen(best=best, knee=knee, trial=trial))
    elif best is not None or knee or trial is not None:
        found = str(source) if layers is None else f"--layers {layers}"
        raise UserError(
            f"--best, --knee and --trial choose a trial of a search, which {found} is not.",
            "Name the run folder of `intarsia tailor`, and leave --layers out.",
        )
    else:
        recipe = read_recipe(source, layers)
    check_out(out.path, overwrite=out.overwrite, inputs=inputs_of(recipe=recipe, files=read))
    result = build_recipe(recipe, out.path, overwrite=out.overwrite, max_shard_bytes=out.shard_bytes)
    return send_off(result, out.path)
