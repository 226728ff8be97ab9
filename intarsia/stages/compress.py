"""Compress: the main job. Plan, heal, build, and judge what came out against what went in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from intarsia.building.materialize import RECIPE_FILE
from intarsia.checkpoint.resolve import open_checkpoint
from intarsia.checkpoint.staging import check_out
from intarsia.data.corpus import Corpus
from intarsia.disk import write_whole
from intarsia.errors import UserError
from intarsia.evaluation.perplexity import eval_corpus
from intarsia.evaluation.speed import peak_memory_bytes
from intarsia.healing.settings import LAST, ClosedFormSettings
from intarsia.progress import Progress, Silent
from intarsia.pruning.settings import Settings
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.reporting.card import model_card
from intarsia.stages.build import BuildResult, build_recipe, card_facts, read_recipe
from intarsia.stages.compress_result import CompressResult, bare, healed
from intarsia.stages.judge import Measures, measured
from intarsia.stages.plan import PlanResult, plan_source
from intarsia.stages.plan_input import check_method
from intarsia.stages.repair import HEALS, heal_passes_at_most, repaired
from intarsia.stages.report import REPORT, report_compression
from intarsia.stages.source import Source

_JUDGING = "judging"  # in the run folder from before the build until the result has been judged


def compress(
    model: str,
    out: Path,
    *,
    layers: int | None = None,
    sparsity: float | None = None,
    method: str = "come",
    calibration: str | Sequence[str] = "self",
    tokens: int = 65536,
    seq_len: int = 512,
    heal: str = "closed-form",
    closed_form: ClosedFormSettings | None = None,
    heal_in_loop: bool = False,
    eval_text: str | None = None,
    eval_windows: int = 64,
    run: Path | None = None,
    revision: str | None = None,
    settings: Settings | None = None,
    device: str | None = None,
    dtype: str | None = None,
    devices: Sequence[str] = (),
    stream: bool = False,
    memory_bytes: int | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CompressResult:
    """Make a model shallower and measure what that cost.

    Stopped at any point, the same call continues in the run folder.

    Args:
        model: a local folder, a hub id, or `demo`.
        out: the folder of the new model.
        layers, sparsity: the target, one of the two.
        heal: `closed-form` fits the layers that stand for removed ones to the original, on the calibration text;
            `none` leaves them as they were cut.
        closed_form: how it fits; by default as `heal` does (`LAST`).
        heal_in_loop: repair what each step changes the same way, before the next; for progressive methods.
        eval_text: what perplexity is measured on. Without one, text like the calibration's that was not part of it.
        run: the run folder; beside `out` by default.
        devices, stream, memory_bytes: as for `plan`. Of a streamed model speed is not measured.
        max_shard_bytes: how large a weight file may be.
        dry_run: estimate what it takes, and do nothing.

    Raises:
        UserError: something about the input cannot be used, or the method cannot reach the target.
    """
    begun = time.perf_counter()
    progress = progress or Silent()
    out = Path(out)
    run = out.with_name(f"{out.name}.run") if run is None else Path(run)
    check_method(method, heal_in_loop=heal_in_loop)
    if heal not in HEALS:
        raise UserError.of(
            where="--heal", expected=f"one of {', '.join(HEALS)}", found=repr(heal), remedy="Choose one of them."
        )
    in_loop = (closed_form or ClosedFormSettings()) if heal_in_loop else None
    closed_form = closed_form or LAST
    unjudged = _built_but_not_judged(run, out)
    check_out(out, overwrite=overwrite or unjudged is not None)
    source = Source(
        model,
        revision=revision,
        calibration=calibration,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        devices=devices,
        stream=stream,
        memory_bytes=memory_bytes,
        progress=progress,
    )
    corpus = None
    if eval_text is not None:  # read now: a text that cannot be used must not be found out after the work
        corpus = eval_corpus(eval_text, source.tokenizer, seq_len=seq_len, windows=eval_windows)
    planned = plan_source(
        source,
        run,
        layers=layers,
        sparsity=sparsity,
        method=method,
        settings=settings,
        in_loop=in_loop,
        batch_tokens=batch_tokens,
        dry_run=dry_run,
    )
    fits = 0
    if heal == "closed-form":
        fits = heal_passes_at_most(source.checkpoint.architecture, settings, in_loop=heal_in_loop)
    result = CompressResult(
        model=model,
        method=method,
        target=planned.target,
        estimate=replace(planned.estimate, heal_passes_at_most=float(fits)),
        seconds=time.perf_counter() - begun,
        peak_memory_bytes=peak_memory_bytes(),
        out=out,
        run=run,
    )
    if dry_run:
        return result
    if planned.target not in planned.depths:
        raise _no_way_down(planned, f"{method} on {model}", run)
    cut = recipe = read_recipe(run, planned.target)
    repair = None
    if heal == "closed-form":
        repair = repaired(run, cut, source, settings=closed_form, batch_tokens=batch_tokens)
        recipe = repair.recipe
    overwrite = overwrite or unjudged == schema.content_hash(recipe)
    check_out(out, overwrite=overwrite)  # what this run built for another depth is not replaced
    write_whole(run / _JUDGING, schema.content_hash(recipe))
    if stream:
        source.release()  # what is outside the layers would be mapped twice
    built = build_recipe(recipe, out, overwrite=overwrite, max_shard_bytes=max_shard_bytes, progress=progress)

    if eval_text is None:
        corpus = source.parts.test
        if corpus is None:
            progress.say("no perplexity: the calibration text has nothing left to judge by; pass --eval-text")
    before, after, evaluation = _judged(source, recipe, built, corpus)
    done = replace(
        result,
        before=before,
        after=after,
        healed=healed(repair, cut, before, after),
        evaluation=evaluation,
        layer_forwards=planned.layer_forwards,
        seconds=time.perf_counter() - begun,
        peak_memory_bytes=peak_memory_bytes(),
        recipe_sha256=built.recipe_sha256,
        report=out / REPORT,
    )
    report_compression(out, done.to_dict(), corpus)
    (run / _JUDGING).unlink(missing_ok=True)
    return done


def _no_way_down(planned: PlanResult, what: str, run: Path) -> UserError:
    reached = planned.depths[-1] if planned.depths else planned.layers
    return UserError.of(
        where=what,
        expected=f"a way down to {planned.target} layers",
        found=f"none below {reached}: {planned.stopped}",
        remedy=f"Build a depth of the ladder with `intarsia build {run} --layers N`, or change the settings.",
    )


def _judged(
    source: Source, recipe: Recipe, built: BuildResult, corpus: Corpus | None
) -> tuple[Measures, Measures, str | None]:
    """The original and the new model measured, on which text, and the new one's card rewritten with that."""
    small = open_checkpoint(str(built.out), progress=source.progress)
    before, after = measured(source, small, corpus, unhealed=bare(recipe))
    evaluation = None
    if corpus is not None:
        evaluation = f"{corpus.description}, {len(corpus)} windows of {corpus.seq_len} tokens"
    facts = card_facts(recipe, source.checkpoint, built, title=built.out.name)
    facts |= {"before": before.to_dict(), "after": after.to_dict(), "evaluation": evaluation}
    write_whole(built.out / "README.md", model_card(facts))
    return before, after, evaluation


def _built_but_not_judged(run: Path, out: Path) -> str | None:
    """The recipe's hash, if `out` is what this run built before it was stopped."""
    marker, carried = run / _JUDGING, out / RECIPE_FILE
    if not (marker.is_file() and carried.is_file()):
        return None
    carried_hash = schema.content_hash(schema.load(carried))
    return carried_hash if marker.read_text(encoding="utf-8") == carried_hash else None
