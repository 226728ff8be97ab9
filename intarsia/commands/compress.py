"""`intarsia compress`, the main job: plan, heal, build, and measure the model before and after."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia import progress
from intarsia.commands.push import push_later
from intarsia.errors import UserError
from intarsia.flags import Result
from intarsia.options import EvalSpec, ModelRef, Output, Runtime, Target, TextSpec
from intarsia.pruning.efforts import heal_of, method_of, text_of
from intarsia.pruning.estimate import Estimate
from intarsia.registry import HealStages, Planner
from intarsia.run_dir import RunDir

if TYPE_CHECKING:
    from intarsia.commands.measures import Measures
    from intarsia.evaluation.results import Agreement
    from intarsia.healing.pipeline import Healed
    from intarsia.recipe.recipe import Recipe

_UNMEASURED = "built"  # in the run folder from before the build until the result has been measured


@dataclass(frozen=True, kw_only=True)
class CompressResult(Result):
    """The result of a compression. After a dry run all measures are None."""

    model: str
    method: str
    target: int
    estimate: Estimate
    before: Measures | None = None
    after: Measures | None = None
    # How the pruned model was healed, and the share of the gap in log-perplexity that this closed; None where nothing
    # was to be healed.
    healed: dict[str, Any] | None = None
    # Accuracy of the new model on the tasks, with the share of the original's that it kept.
    tasks: dict[str, Any] | None = None
    # The text of the perplexity.
    evaluation: str | None = None
    # The new model's answers beside the original's.
    answers: Agreement | None = None
    # One sentence, where perplexity or tasks look well and the answers do not.
    warning: str | None = None
    layer_forwards: float | None = None
    seconds: float = 0.0
    # Of text, planning, healing, building and evaluation.
    seconds_by_part: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    recipe_sha256: str | None = None
    report: Path | None = None
    # Whether the model has a chat template.
    chat_template: bool = False
    out: Path
    run: Path
    # The upload to the hub.
    push: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data = super().to_dict()
        for key in ("before", "after"):
            measures: Measures | None = getattr(self, key)
            data[key] = None if measures is None else measures.to_dict()
        if self.before is not None:  # the work is done
            del data["estimate"]
        return data


def compress(
    model: ModelRef | str,
    out: Output | str | Path,
    target: Target,
    *,
    method: Planner = None,
    heal: HealStages = None,
    text: TextSpec = TextSpec(),
    evaluation: EvalSpec = EvalSpec(),
    runtime: Runtime = Runtime(),
) -> CompressResult:
    """Make a model shallower: plan, heal, build and measure in one go.

    Give either --layers or --sparsity. If it is interrupted, the same command resumes.

    Raises:
        UserError: something about the input cannot be used, or the method cannot reach the target.
    """
    from intarsia.building.materialize import RECIPE_FILE
    from intarsia.checkpoint.resolve import inputs_of, open_checkpoint
    from intarsia.commands.build import build_recipe
    from intarsia.commands.job import Job
    from intarsia.commands.measures import Evaluation, measured, report_model
    from intarsia.commands.planning import Planning, heal_recipe
    from intarsia.commands.report import REPORT
    from intarsia.disk import check_no_input, check_out, write_whole
    from intarsia.evaluation.agreement import doubt
    from intarsia.evaluation.speed import peak_memory_bytes
    from intarsia.healing.pipeline import check_memory, check_stages, check_turns, tokens_read
    from intarsia.recipe import schema

    started, report = time.perf_counter(), progress.current()
    out = Output.of(out)
    run = RunDir(out.run_path)
    stages = heal_of(heal, method, target.effort)

    # Input: find every problem before any work.
    check_stages(stages, runtime)
    send_off = push_later(out.push_to, private=out.private, dry_run=out.dry_run)
    unmeasured = None  # the hash of the recipe, if the output is what this run built before it was killed
    if (run.path / _UNMEASURED).is_file() and (out.path / RECIPE_FILE).is_file():
        found = schema.content_hash(schema.load(out.path / RECIPE_FILE))
        unmeasured = found if (run.path / _UNMEASURED).read_text(encoding="utf-8") == found else None
    read = [*text.sources, *evaluation.sources.values(), *evaluation.tasks, *filter(None, [evaluation.prompts])]
    inputs = inputs_of(models=[model], texts=read)
    check_out(out.path, overwrite=out.overwrite or unmeasured is not None, inputs=inputs)
    check_no_input(run.path, inputs)
    job = Job(model, text_of(text, target.effort), runtime)
    check_turns(stages, job.tokenizer)
    planning = Planning(job, target, method_of(method, target.effort), heals=tokens_read(stages))
    check_memory(stages, planning.estimate.parameters_after, job.checkpoint.nbytes, job.device)
    measuring = Evaluation.of(job, evaluation)
    result = CompressResult(
        model=job.model,
        method=planning.method.name,
        target=planning.target,
        estimate=replace(planning.estimate, heal_passes_at_most=planning.heal_passes_at_most(stages)),
        chat_template=bool(getattr(job.tokenizer, "chat_template", None)),
        out=out.path,
        run=run.path,
    )
    if out.dry_run:
        done = replace(result, seconds=time.perf_counter() - started, peak_memory_bytes=peak_memory_bytes())
        return send_off(done, out.path)
    report.say(result.estimate.words())

    with progress.job(planning.weights(stages, evaluation=measuring.passes(job.spec.length))) as work:
        # Text, in three disjoint parts.
        with work.part("text"):
            _ = job.text.calibration, job.text.selection, job.text.test

        with planning.opened(run) as ladder:
            # Plan.
            with work.part("planning"):
                planned = planning.work(ladder)
            if planning.target not in planned.depths:
                raise UserError(
                    f"{planned.method} found no way down to {planned.target} layers: {planned.stopped}.",
                    f"Build a depth of the ladder with `intarsia build {run.path} --layers N`, or change the settings.",
                )
            pruned = ladder.recipe(planning.target)

            # Heal: each stage is accepted only if the selection part of the text says that the model is better.
            with work.part("healing"):
                healed = heal_recipe(planning, ladder, pruned, stages)
            recipe = healed.recipe if healed is not None else pruned
            planning.close()

            # Build. The output of this command, killed before, is replaced; anything else is not.
            overwrite = out.overwrite or unmeasured == schema.content_hash(recipe)
            check_out(out.path, overwrite=overwrite, inputs=[*inputs, job.checkpoint.folder])
            write_whole(run.path / _UNMEASURED, schema.content_hash(recipe))
            if runtime.stream:
                job.release()  # embedding and head would be mapped twice
            with work.part("building"):
                built = build_recipe(recipe, out.path, overwrite=overwrite, max_shard_bytes=out.shard_bytes)

            # Measure, on the test part of the text unless other text is given.
            if not measuring.texts and job.text.test is not None:
                measuring.texts = {"test": job.text.test}
            if not measuring.texts:
                report.say("no perplexity: the calibration text has nothing left to test on; give --eval-text")
            small = open_checkpoint(str(built.out))
            bare = replace(recipe, fitted={}) if recipe.fitted else None
            with work.part("evaluation", 5):  # speed, three perplexities, answers
                before, after = measured(job, small, measuring, unhealed=bare)

            # Report.
            done = replace(
                result,
                before=before,
                after=after,
                healed=_healed(healed, pruned, before, after),
                tasks=measuring.accuracy,
                evaluation=measuring.words,
                answers=after.answers,
                warning=doubt(before.to_dict(), after.to_dict()),
                layer_forwards=planned.layer_forwards,
                seconds=time.perf_counter() - started,
                seconds_by_part=work.seconds,
                peak_memory_bytes=peak_memory_bytes(),
                recipe_sha256=built.recipe_sha256,
                report=out.path / REPORT,
            )
            names = ("model", "method", "before", "after", "answers", "warning", "healed")
            costs = ("layer_forwards", "seconds", "seconds_by_part", "peak_memory_bytes")
            facts = {name: value for name, value in done.to_dict().items() if name in (*names, *costs)}
            report_model(recipe, job.checkpoint, built, facts | {"run": run.path.name}, measuring.text)
            (run.path / _UNMEASURED).unlink(missing_ok=True)
    return send_off(done, out.path)


def _healed(healed: Healed | None, pruned: Recipe, before: Measures, after: Measures) -> dict[str, Any] | None:
    """How the pruned model was healed, and the share of the gap that this closed; None where nothing was to heal."""
    in_loop = sum(len(tensors) for tensors in pruned.fitted.values())
    stages = () if healed is None else healed.stages[1:]
    if not stages and not in_loop:
        return None
    taken = [stage for stage in stages if stage.taken]
    fits = [entry for stage in taken for entry in stage.details if entry.get("ridge") is not None]
    found: dict[str, Any] = {
        "method": ", ".join(stage.stage for stage in stages) or "closed-form in the loop",
        "taken": bool(taken) or not stages,
        "fitted_output_projections": len(fits) if stages else in_loop,
        "tokens": max((stage.tokens for stage in stages), default=pruned.provenance["calibration"]["tokens"]),
    }
    if in_loop and not any(stage.facts.get("from_scratch") for stage in taken):
        found["fitted_in_loop"] = in_loop
    for stage in stages:
        if "start" in stage.facts:
            found["start"] = stage.facts["start"]
    whole, bare, now = before.perplexity, after.perplexity_without_heal, after.perplexity
    if whole is not None and bare is not None and now is not None and bare.nll > whole.nll:
        found["gap_closed"] = (bare.nll - now.nll) / (bare.nll - whole.nll)
    return found
