"""`intarsia report`: one page about one or several runs, on request with the models' answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from intarsia.errors import UserError, at_least, check
from intarsia.flags import Flag, Result
from intarsia.options import Runtime
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.blocks import Written

if TYPE_CHECKING:
    from intarsia.commands.job import Placement

REPORT = "report.html"
PROMPTS = (
    "Why is the sky blue?",
    "Write a short story about a carpenter who finds an old box.",
    "List three things to check before buying a used bicycle.",
)


@dataclass(frozen=True, kw_only=True)
class ReportResult(Result):
    """A written report."""

    out: Path
    runs: tuple[str, ...]
    bytes: int
    # prompts that the models answered
    written: int
    seconds: float


def report(
    *runs: Annotated[
        Path,
        Flag(
            metavar="RUN",
            commas=False,
            help="Run folders, comparisons, models that intarsia built, files of `bench --json`.",
        ),
    ],
    out: Annotated[Path, Flag(names=("--out", "-o"), metavar="FILE", help="The HTML file.")] = Path("report.html"),
    generate: Annotated[bool, Flag(help="Show answers of each model and its original to some prompts.")] = False,
    prompt: Annotated[
        tuple[str, ...],
        Flag(metavar="TEXT", commas=False, help="A prompt to answer; repeatable (default: three prompts)."),
    ] = (),
    new_tokens: Annotated[int, Flag(metavar="N", help="Most tokens of an answer.")] = 96,
    device: Annotated[str | None, Flag(help="Device: cpu, cuda, cuda:1 ... (default: the best available).")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        Flag(help="Data type of the models (default: the checkpoint's)."),
    ] = None,
    overwrite: Annotated[bool, Flag(help="Replace the file if it exists.")] = False,
) -> ReportResult:
    """Write one self-contained HTML file about runs and models.

    Raises:
        UserError: a run or the file cannot be used; nothing was written.
    """
    from intarsia.building.materialize import RECIPE_FILE
    from intarsia.checkpoint.resolve import inputs_of
    from intarsia.commands.job import Placement
    from intarsia.disk import check_file, check_no_input
    from intarsia.reporting.model_report import is_model_folder
    from intarsia.reporting.page import report_html, write_report

    started, prompt = time.perf_counter(), prompt or PROMPTS
    out, paths = Path(out), [Path(run) for run in runs]
    if not paths:
        raise UserError("There is no run to report on.", "Name a run folder, or a model that intarsia built.")
    check_no_input(out, inputs_of(files=paths))
    check((out.parent.is_dir(), f"There is no folder {out.parent}.", "Name a file in a folder that exists."))
    check_file(out, overwrite=overwrite)
    report_html(paths)  # find every problem of the runs before loading a model
    found: dict[Path, list[Written]] = {}
    if generate:
        place = Placement.of(Runtime(device=device, dtype=dtype))
        folders = [path for path in paths if is_model_folder(path)]
        none = "--generate is given, and none of the runs is a model that intarsia built."
        check(
            (bool(folders), none, "Name the output folder of `compress`, `build` or `heal` too."),
            *at_least(1, new_tokens=new_tokens),
            (all(text.strip() for text in prompt), "A prompt is empty.", "Give it some text."),
        )
        recipes = {folder: schema.load(folder / RECIPE_FILE) for folder in folders}
        for recipe in recipes.values():
            check_no_input(out, inputs_of(recipe=recipe))
        for folder, recipe in recipes.items():
            found[folder] = _side_by_side(folder, recipe, prompt, new_tokens, place)
    write_report(paths, out, generations=found)
    return ReportResult(
        out=out,
        runs=tuple(map(str, paths)),
        bytes=out.stat().st_size,
        written=sum(map(len, found.values())),
        seconds=time.perf_counter() - started,
    )


def _side_by_side(
    folder: Path,
    recipe: Recipe,
    prompts: Sequence[str],
    new_tokens: int,
    place: Placement,
) -> list[Written]:
    """The original's answers and the model's, one model in memory at a time."""
    from intarsia.building.loaded_model import load_model
    from intarsia.checkpoint.resolve import open_checkpoint
    from intarsia.commands.build import open_variants
    from intarsia.commands.job import load_tokenizer
    from intarsia.evaluation.answers import Prompts, greedy_answers, side_by_side
    from intarsia.reporting.model_report import parted

    dense, small = open_variants(recipe)[recipe.base], open_checkpoint(str(folder))
    tokenizer = load_tokenizer(dense)
    asked = Prompts.of(prompts, tokenizer, source="the report's")
    columns = []
    for checkpoint in (dense, small):
        model = load_model(checkpoint, device=place.device, dtype=place.dtype)
        columns.append(greedy_answers(model, tokenizer, asked, new_tokens))
        del model
    return [
        parted({"prompt": prompt, **side_by_side(tokenizer, *answers)}, new=f"{len(recipe.layers)} layers")
        for prompt, *answers in zip(prompts, *columns, strict=True)
    ]
