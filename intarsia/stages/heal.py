"""Heal: repair a cut model, stage by stage, and tell what each stage gave.

Every finished stage is in the run folder, and what a stage has done so far too: the same command goes on from there.
Several processes (`accelerate launch -m intarsia heal ...`) share the end-to-end stage; the first one does the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from intarsia.building.materialize import RECIPE_FILE
from intarsia.checkpoint.hashing import acting_config, scan
from intarsia.checkpoint.reader import Checkpoint
from intarsia.checkpoint.staging import check_out
from intarsia.commands.build import build_recipe, open_variants, read_recipe
from intarsia.errors import UserError
from intarsia.evaluation.speed import peak_memory_bytes
from intarsia.healing import launch
from intarsia.healing.layer_map import check_teacher
from intarsia.healing.settings import LAST, ClosedFormSettings, EndToEndSettings, LayerwiseSettings
from intarsia.progress import Progress, Silent
from intarsia.pruning.run_folder import RunFolder
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.stages.heal_blend import BLEND, back, blend_sha256, forget, over_its_blend
from intarsia.stages.heal_result import HealResult, layer_errors, provenance
from intarsia.stages.heal_stages import STAGES, Healing, stage_settings
from intarsia.stages.heal_texts import Texts, read_texts
from intarsia.stages.placement import placement

Stages = Sequence[str]


def heal(
    source: Path,
    out: Path,
    *,
    data: str | Sequence[str],
    teacher: str | None = None,
    stages: Stages = ("closed-form",),
    tokens: int = 65536,
    seq_len: int = 512,
    fit_tokens: int = 131072,
    eval_text: Sequence[str] = (),
    eval_windows: int = 64,
    closed_form: ClosedFormSettings | None = None,
    layerwise: LayerwiseSettings | None = None,
    end_to_end: EndToEndSettings | None = None,
    lora: int | None = None,
    log: str | None = None,
    run: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    stream: bool = False,
    memory_bytes: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> HealResult:
    """Repair a built model or a recipe, and build what comes out.

    Stopped at any point, the same call continues in the run folder.

    Args:
        source: a built model folder, a recipe (`.yaml`), or a run folder of `plan` (its least depth).
        out: the folder of the healed model.
        data: training text, as for `plan`; a small part of it is held out.
        teacher: whom to learn from; the recipe's own base by default, or, of a recipe over several models, what it
            would be with no layer removed. The closed form always learns from that default.
        stages: some of `STAGES`, in order.
        tokens: training and held-out tokens.
        fit_tokens: the closed form uses no more of them than this.
        eval_text: texts whose perplexity is told after every stage.
        lora, log: as in `EndToEndSettings`; they win over those.
        run: the run folder; beside `out` by default.
        max_shard_bytes: how large a weight file may be.
        stream: keep one layer in memory at a time (not for end-to-end training).
        memory_bytes: what hidden states may take in memory; the rest goes to files in the run folder.

    Raises:
        UserError: something about the input cannot be used.
    """
    begun = time.perf_counter()
    main = launch.rank() == 0
    progress = (progress or Silent()) if main else Silent()
    source, out = Path(source), Path(out)
    run = out.with_name(f"{out.name}.heal") if run is None else Path(run)
    _check_stages(stages, stream=stream)
    if main:
        check_out(out, overwrite=overwrite)
    end_to_end = replace(end_to_end or EndToEndSettings(), seed=seed)
    end_to_end = replace(end_to_end, lora=lora or end_to_end.lora, log=log or end_to_end.log)
    placed = placement(device=device, dtype=dtype, stream=stream, memory_bytes=memory_bytes)
    where = launch.own_device(placed.device)
    barrier: Callable[[], None] = lambda: None  # noqa: E731
    if "end-to-end" in stages or launch.world_size() > 1:
        barrier = launch.accelerator(device=where, log=end_to_end.log, folder=run).wait_for_everyone
    given = read_source(source)
    opened = open_variants(given, progress)
    base = opened[given.base]
    blended = len(opened) > 1
    taught = None if teacher is None else _teacher(given, base, teacher, progress)
    members = {name: scan(checkpoint, progress) for name, checkpoint in opened.items()}
    own_sha256 = blend_sha256(given, members) if blended else members[given.base]
    closed_form = closed_form or LAST
    layerwise = replace(layerwise or LayerwiseSettings(), seed=seed)
    settings = {
        "recipe": schema.content_hash(given),
        "config": acting_config(base.config),
        "teacher": own_sha256 if taught is None else scan(taught, progress),
        "teacher_config": acting_config((taught or base).config),
        **({"members": members} if blended else {}),
        "stages": list(stages),
        "data": data if isinstance(data, str) else ",".join(data),
        "tokens": tokens,
        "seq_len": seq_len,
        "fit_tokens": fit_tokens,
        "eval_text": list(eval_text),
        "eval_windows": eval_windows,
        "seed": seed,
        "device": where.type,
        "dtype": dtype,
        "processes": launch.world_size(),
        **stage_settings(stages, closed_form, layerwise, end_to_end),
    }

    @cache
    def healing() -> Healing:
        recipe, variants = given, opened
        if blended:
            if main:
                RunFolder.start(run, settings)
            recipe, variants = over_its_blend(given, opened, run, progress=progress)
        return Healing(
            recipe=recipe,
            variants=variants,
            teacher=taught,
            run=run,
            placement=replace(placed, devices=(where,)),
            closed_form=closed_form,
            layerwise=layerwise,
            end_to_end=end_to_end,
            barrier=barrier,
            progress=progress,
        )

    read = partial(
        read_texts,
        given,
        base,
        lambda: healing().writer(),
        writer_sha256=own_sha256,
        data=data,
        tokens=tokens,
        seq_len=seq_len,
        fit_tokens=fit_tokens,
        eval_windows=eval_windows,
        seed=seed,
        progress=progress,
    )
    texts: Texts | None = None
    if main:
        # A run folder is begun when all of the input is known to be good: another call may then use the same one.
        RunFolder.offer(run, settings)
        texts = read(eval_text=eval_text)
        RunFolder.start(run, settings).pin("text", texts.facts())
        healing()
    barrier()  # the first process has written what the others find in caches
    texts = texts or read(eval_text=())
    results = healing().run_stages(stages, texts)
    told = provenance(settings, texts.train, results)
    final = replace(back(given, results[-1].recipe), provenance={**given.provenance, "heal": told})
    if main:
        build_recipe(final, out, overwrite=overwrite, max_shard_bytes=max_shard_bytes, progress=progress)
        if blended:
            forget(run)
    barrier()
    return HealResult(
        source=source,
        out=out,
        run=run,
        teacher=BLEND if blended and taught is None else (taught or base).model,
        stages=tuple(result.row() for result in results),
        layers=layer_errors(given, results),
        details={result.stage: result.details for result in results[1:]},
        recipe_sha256=schema.content_hash(final),
        seconds=time.perf_counter() - begun,
        peak_memory_bytes=peak_memory_bytes(),
    )


def read_source(source: Path) -> Recipe:
    """The recipe of a built model, in a file, or of a run folder.

    Raises:
        UserError: there is none.
    """
    if (source / RECIPE_FILE).is_file():
        return schema.load(source / RECIPE_FILE)
    if source.is_dir() and (source / "config.json").exists():
        raise UserError.of(
            where=str(source),
            expected=f"a model that intarsia has built (with {RECIPE_FILE})",
            found="a model without a recipe",
            remedy="Heal what `intarsia compress` or `intarsia build` has made, or a recipe file.",
        )
    return read_recipe(source)


def _check_stages(stages: Stages, *, stream: bool) -> None:
    if stream and "end-to-end" in stages:
        raise UserError.of(
            where="--stream",
            expected="stages that look at one layer at a time: closed-form, layerwise",
            found="end-to-end, which trains all layers at once",
            remedy="Leave --stream out, or end-to-end.",
        )
    wrong = [stage for stage in stages if stage not in STAGES]
    if wrong or not stages or len(set(stages)) != len(stages):
        raise UserError.of(
            where="--stages",
            expected=f"some of {', '.join(STAGES)}, each once, in the order in which they shall run",
            found=", ".join(stages) or "none",
            remedy="Name them, separated by commas.",
        )


def _teacher(recipe: Recipe, base: Checkpoint, teacher: str, progress: Progress) -> Checkpoint:
    from intarsia.checkpoint.resolve import open_checkpoint

    opened = open_checkpoint(teacher, progress=progress)
    check_teacher(recipe, base.architecture, opened.architecture, name=teacher)
    return opened
