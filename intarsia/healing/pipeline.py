"""Heal stages, one after the other: each is recorded in the run folder, and accepted only if the model is better.

    context = HealContext(run=run, variants=variants, load=..., calibration=text, selection=other_text)
    healed = run_stages(context, recipe, heal_stages.choose_all("closed-form,layerwise"))
    healed.recipe

A stage is a function `stage(context, recipe, settings) -> Recipe` (`intarsia.registry.heal_stage`). It works on
`context.calibration`, and keeps what a resumed run needs in `context.folder`. Better means: less perplexity on
`context.selection`, which no stage fits to. A finished stage is only read when the same work is started again.

Several processes may be launched together (`accelerate launch`). All of them call `run_stages`; stages registered with
`whole_model` run in all, the others in the first one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from psutil import virtual_memory

from intarsia import progress
from intarsia.activations.batches import Batches
from intarsia.activations.hidden_store import MemoryBudget
from intarsia.activations.loop import Loop, Passed
from intarsia.architecture.spec import Architecture
from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint.reader import Checkpoint
from intarsia.data.conversations import Turns, learn_turns
from intarsia.data.corpus import Corpus
from intarsia.disk import full_disk_named, read_json
from intarsia.errors import Problems, UserError
from intarsia.evaluation.perplexity import Chain, perplexity
from intarsia.flags import plain
from intarsia.healing import training
from intarsia.healing.closed_form import Start
from intarsia.healing.losses import hidden_mse
from intarsia.healing.teacher import TeacherStates, fits_in_memory
from intarsia.options import Runtime
from intarsia.recipe import schema
from intarsia.recipe.recipe import Recipe
from intarsia.registry import Chosen
from intarsia.run_dir import RunDir

PRUNED = "pruned"
"""The name of the pruned model in the list of stages."""

_KEY = "key.json"
_SET_ASIDE = 1 / 16
"""Without a selection text, this share of the calibration text becomes it."""
_TENSORS = {".safetensors", ".bin", ".distcp", ".pt", ".npy", ".yaml"}
_CPU_BATCH_TOKENS = 2048
_CUDA_BATCH_TOKENS = 16384


@dataclass(kw_only=True)
class HealContext:
    """Everything that heal stages share."""

    # The run folder, opened by the first process.
    run: RunDir
    # Checkpoints of the recipe's variants, by name.
    variants: Mapping[str, Checkpoint]
    # Loads the recipe's base into memory, with the other variants beside it. Called once, and only if it is needed.
    load: Callable[[], LoadedModel]
    device: torch.device
    # The text to fit to and train on.
    calibration: Corpus
    # The text that decides whether a result is accepted (default: the last part of the calibration text).
    selection: Corpus | None = None
    # Texts whose perplexity is reported after each stage.
    evaluation: tuple[Corpus, ...] = ()
    # Report the error of each layer's hidden states too: another pass over the selection text.
    layer_errors: bool = False
    # The teacher of stages that train (default: the base): its checkpoint, and a function that loads it.
    teacher: Checkpoint | None = None
    load_teacher: Callable[[], LoadedModel] | None = None
    # Other recipes of the same depth that a stage may start from.
    starts: tuple[Start, ...] = ()
    # The base's hidden states on the calibration text, where they are known already.
    states: TeacherStates | None = None
    # Frees them.
    release: Callable[[], None] = lambda: None
    # Memory for hidden states, and tokens in a batch; None chooses by the free memory.
    memory_bytes: int | None = None
    batch_tokens: int | None = None
    # The model's, for its chat template.
    tokenizer: Any = None
    # Where the stages are recorded, inside the run folder.
    name: str = "stages"

    # Of the stage under way: the folder of its state and logs; what it reports, row by row; and further facts, such as
    # `tokens` (of the text that it used) and `forwards` (layer-forwards over the text).
    folder: Path = field(default=Path(), init=False)
    details: list[dict[str, Any]] = field(default_factory=list, init=False)
    facts: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.selection is None:
            whole = self.calibration  # a single sequence has to serve for both
            self.calibration, self.selection = whole.split(1.0 - _SET_ASIDE) if len(whole) > 1 else (whole, whole)

    @cached_property
    def resident(self) -> LoadedModel:
        """The recipe's base in memory."""
        return self.load()

    @cached_property
    def teaching(self) -> LoadedModel:
        """The teacher of stages that train, in memory."""
        return self.resident if self.load_teacher is None else self.load_teacher()

    def turns(self, loss_on: str) -> Turns | None:
        """The marks of the assistant's tokens, if losses count on them alone.

        Raises:
            UserError: the chat template does not.
        """
        return None if loss_on == "all" else assistant_turns(self.tokenizer)

    @property
    def memory_budget(self) -> MemoryBudget:
        """Memory for hidden states; the rest goes to files in the run folder."""
        return MemoryBudget(self.memory_bytes, self.run.scratch)

    @property
    def held_out(self) -> Corpus:
        """The selection text."""
        assert self.selection is not None
        return self.selection

    @contextmanager
    def original_states(self, text: Corpus, *, fits: int = 1) -> Iterator[TeacherStates]:
        """The base's hidden states on the calibration text, or the first part of it, for a number of fits."""
        if self.states is not None and text.sha256 == self.states.batches.corpus.sha256:
            yield self.states
            return
        batches, memory_budget = Batches(text, self.resident.device, batch_tokens=self.batch_tokens), self.memory_budget
        keep = fits > 1 and fits_in_memory(self.resident, batches, memory_budget)
        known = None
        if self.states is not None and len(text) <= len(self.states.batches.corpus):  # both are first parts of one text
            known = self.states.known(self.resident.architecture.n_layers)
        loop = Loop(self.resident, batches, memory_budget=memory_budget)
        with TeacherStates(loop, known=known, keep=keep) as states:
            yield states


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The result of a stage; `pruned` is the model before all stages."""

    stage: str
    # As it was before the stage, where that is not accepted. Its provenance says how it was healed so far.
    recipe: Recipe
    # The recipe's file in the run folder.
    path: Path
    # Perplexities of the selection and evaluation texts, and hidden-state errors (see `quality`).
    quality: dict[str, Any]
    # Whether it was accepted.
    taken: bool = True
    tokens: int = 0
    seconds: float = 0.0
    # The stage's report, row by row.
    details: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    # False if it was found in the run folder.
    fresh: bool = True

    @property
    def perplexity(self) -> float:
        """Perplexity on the selection text."""
        return float(self.quality["texts"][0]["value"])

    def row(self) -> dict[str, Any]:
        """One line of a table."""
        errors = self.quality["errors"]
        return {
            "stage": self.stage,
            "held_out_perplexity": self.perplexity,
            **{f"perplexity of {Path(text['text']).name}": text["value"] for text in self.quality["texts"][1:]},
            **({"hidden_error": sum(errors) / len(errors)} if errors else {}),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "taken": self.taken,
        }


@dataclass(frozen=True, kw_only=True)
class Healed:
    """The results of all stages, the pruned model first."""

    stages: tuple[StageResult, ...]

    @property
    def recipe(self) -> Recipe:
        """The healed recipe; its provenance says how it was healed."""
        return self.stages[-1].recipe

    @property
    def path(self) -> Path:
        """The recipe's file in the run folder."""
        return self.stages[-1].path

    @property
    def taken(self) -> bool:
        """Whether any stage was accepted."""
        return any(result.taken for result in self.stages[1:])


def assistant_turns(tokenizer: Any) -> Turns:
    """How the model's chat template marks turns.

    Raises:
        UserError: it has none, or none whose turns can be distinguished.
    """
    found = learn_turns(tokenizer)
    if found is None:
        raise UserError(
            "--loss-on assistant needs a chat template that marks turns, and this model has none.",
            "Leave it out: losses then count on all tokens.",
        )
    return found


def check_turns(stages: Sequence[Chosen], tokenizer: Any) -> None:
    """Check that stages whose losses count on the assistant's tokens can tell them apart.

    Raises:
        UserError: they cannot.
    """
    if any(getattr(chosen.settings, "loss_on", "all") == "assistant" for chosen in stages):
        assistant_turns(tokenizer)


def check_stages(stages: Sequence[Chosen], runtime: Runtime) -> None:
    """Check stages before any work.

    Raises:
        UserError: one trains the whole model, which is streamed or laid over devices; or needs something that is not
            there.
    """
    problems = Problems()
    for chosen in stages if runtime.stream or len(runtime.devices) > 1 else ():
        if chosen.entry.facts.get("whole_model"):
            flag = "--stream" if runtime.stream else "--devices"
            problems.add(
                f"{flag} is given, and {chosen.name} trains all layers at once.",
                f"Leave {flag} out, or give {_without(stages, chosen)}.",
            )
    for chosen in stages:
        if (check := chosen.entry.facts.get("check")) is not None:
            with problems:
                check(chosen.settings)
    problems.raise_any()


def check_memory(stages: Sequence[Chosen], parameters: int, teacher_bytes: int, device: torch.device) -> None:
    """Check that the device has the memory that stages say they take at least.

    Args:
        parameters: of the model that is healed.
        teacher_bytes: the weights of the original.

    Raises:
        UserError: one takes more than there is.
    """
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else virtual_memory().total
    for chosen in stages:
        memory = chosen.entry.facts.get("memory")
        if memory is not None and (least := memory(chosen.settings, parameters, teacher_bytes)) > there:
            raise UserError(
                f"{chosen.name} takes at least {least / 1e9:,.1f} GB, and the memory of {device} is"
                f" {there / 1e9:,.1f} GB.",
                f"Give {_without(stages, chosen)}, or a smaller model.",
            )


def _without(stages: Sequence[Chosen], left_out: Chosen) -> str:
    return f"--heal {','.join(each.label for each in stages if each is not left_out) or 'none'}"


def pinned(chosen: Chosen) -> dict[str, Any]:
    """The settings that decide the result of a stage, and its name; its `not_pinned` names the others."""
    free = getattr(chosen.settings, "not_pinned", ())
    return {name: value for name, value in chosen.to_dict().items() if name not in free}


def passes_at_most(
    stages: Sequence[Chosen], architecture: Architecture, *, starts: int, tokens: int
) -> tuple[float, ...]:
    """Passes of the whole model over a text that each stage takes; one for a stage that does not say."""
    known = (getattr(chosen.settings, "passes_at_most", None) for chosen in stages)
    return tuple(1.0 if each is None else each(architecture, starts=starts, tokens=tokens) for each in known)


def tokens_read(stages: Sequence[Chosen]) -> int:
    """On how many tokens stages ask for the original's hidden states, the first ones of the text.

    Those that train the whole model ask for none; a stage whose settings have no `tokens` reads the whole text.
    """
    others = (chosen.settings for chosen in stages if not chosen.entry.facts.get("whole_model"))
    return max((getattr(settings, "tokens", None) or sys.maxsize for settings in others), default=0)


def run_stages(context: HealContext, recipe: Recipe, stages: Sequence[Chosen]) -> Healed:
    """Run heal stages on a recipe; those that an earlier run has finished are read.

    Raises:
        UserError: a stage cannot work with this text or model, the disk is full, or numbers are not finite.
    """
    main, wait = training.rank() == 0, training.barrier(context.device)
    # Without the report of an earlier healing; its fitted tensors stay.
    before = replace(recipe, provenance={name: said for name, said in recipe.provenance.items() if name != "heal"})
    results: list[StageResult] = []
    sizes = {"starts": 1 + len(context.starts), "tokens": context.calibration.tokens}
    passes = passes_at_most(stages, context.variants[recipe.base].architecture, **sizes)
    measured = context.held_out.tokens * (3 if context.layer_errors else 1) + sum(t.tokens for t in context.evaluation)
    measuring = measured / context.calibration.tokens  # passes over the text
    with progress.current().task("", sum(passes) + (1 + len(stages)) * measuring) as task:
        for number, (chosen, units) in enumerate(zip((None, *stages), (0.0, *passes), strict=True)):
            name = PRUNED if chosen is None else chosen.name
            path = context.run.path / context.name / f"{number}-{name}.yaml"
            key = _key(context, before, chosen)
            known = _facts(path)
            fresh = known is None or known["key"] != key
            if fresh and (main or (chosen is not None and chosen.entry.facts.get("whole_model"))):
                started = time.perf_counter()
                if chosen is not None and chosen.entry.facts.get("whole_model") and context.states is not None:
                    context.states = None  # training needs the memory
                    context.release()
                with progress.current().task("", 1, units=units):
                    found = before if chosen is None else _run(context, before, chosen, path.with_suffix(""), key)
                if main:
                    with progress.current().task("", 1, units=measuring):
                        result = _measured(context, name, path, found, results, time.perf_counter() - started)
                    _write(context, result, results, stages, key)
            else:
                task.advance(units + measuring)
            wait()
            facts = {name: value for name, value in (_facts(path) or {}).items() if name != "key"}
            results.append(StageResult(recipe=schema.load(path), path=path, fresh=fresh, **facts))
            before = results[-1].recipe
            if main:
                _clear(path.with_suffix(""))
    return Healed(stages=tuple(results))


def _run(context: HealContext, recipe: Recipe, chosen: Chosen, folder: Path, key: str) -> Recipe:
    """Run a stage on a recipe. Its folder is kept from an earlier start of the same work."""
    if training.rank() == 0:
        mark = folder / _KEY
        if folder.exists() and (not mark.is_file() or json.loads(mark.read_text(encoding="utf-8")) != key):
            shutil.rmtree(folder)
        context.run.write_json(str(mark.relative_to(context.run.path)), key)
    context.folder, context.details, context.facts = folder, [], {}
    found = chosen.create(context, recipe)
    if not isinstance(found, Recipe) or found.depth != recipe.depth:
        raise UserError(
            f"The heal stage {chosen.name} gave no recipe over the same model.", "It returns the recipe, or a new one."
        )
    return found


def _measured(
    context: HealContext, name: str, path: Path, found: Recipe, results: Sequence[StageResult], seconds: float
) -> StageResult:
    """A stage's recipe with its quality; or the recipe before it, where the model is no better."""
    before = results[-1] if results else None
    if before is not None and schema.content_hash(found) == schema.content_hash(before.recipe):
        measured = before.quality  # it changed nothing
    else:
        texts = (context.held_out, *context.evaluation)
        measured = quality(
            found, context.resident, texts, errors=context.layer_errors, memory_budget=context.memory_budget
        )
    result = StageResult(stage=name, path=path, recipe=found, quality=measured)
    if before is None:
        return result
    tokens = context.facts.pop("tokens", context.calibration.tokens)
    result = replace(result, tokens=tokens, seconds=seconds, details=context.details, facts=context.facts)
    taken = result.perplexity < before.perplexity
    change = f"held-out perplexity {before.perplexity:.2f} -> {result.perplexity:.2f}"
    progress.current().say(f"{name}: {change}" + ("" if taken else "; no better, so the model is not changed"))
    return result if taken else replace(result, recipe=before.recipe, quality=before.quality, taken=False)


def quality(
    recipe: Recipe,
    resident: LoadedModel,
    texts: Sequence[Corpus],
    *,
    errors: bool = True,
    memory_budget: MemoryBudget | None = None,
) -> dict[str, Any]:
    """How good a recipe's model is. Nothing is built for that: its layers run between the base's embedding and head.

    Args:
        resident: the recipe's base.
        errors: measure the layers' hidden states on the first text too.
        memory_budget: memory for hidden states.

    Returns:
        As plain data, `texts`: the perplexity on each; and `errors`: for every output layer the mean over tokens of
        |h - H^stop|^2 / |H^stop|^2 with the original's hidden state after its span. The layer reads what the layers
        before it gave.
    """
    memory_budget = memory_budget or MemoryBudget()
    model = Chain(recipe, resident, memory_budget=memory_budget)
    batch_tokens = _CUDA_BATCH_TOKENS if resident.device.type == "cuda" else _CPU_BATCH_TOKENS
    found: list[dict[str, Any]] = []
    with progress.current().task("", len(texts) + 2 * errors) as task:
        for text in texts:
            measured = perplexity(model, text, batch_tokens=batch_tokens)
            found.append({name: getattr(measured, name) for name in ("text", "value", "nll", "stderr")})
            task.advance()
        batches = Batches(texts[0], resident.device, batch_tokens=batch_tokens)
        loop = Loop(resident, batches, memory_budget=memory_budget)
        return {"texts": found, "errors": _layer_errors(recipe, model, loop) if errors else []}


@torch.inference_mode()
def _layer_errors(recipe: Recipe, model: Chain, loop: Loop) -> list[float]:
    """The original goes through its layers once, and then the recipe's model."""
    sums = [0.0] * len(recipe.layers)
    with TeacherStates(loop) as original, closing(loop.store()) as own:
        original.learn({stop for _, stop in recipe.spans})

        def compare(index: int, passed: Passed) -> None:
            real = passed.ids.numel() if passed.mask is None else int(passed.mask.sum())
            wanted = original.at(recipe.spans[index][1], passed.rows)
            sums[index] += float(hidden_mse(wanted, passed.after, passed.mask)) * real

        loop.embed(own)
        for _ in loop.through(model.layers.placed(), own, observe=compare):
            pass
    return [total / max(loop.corpus.tokens, 1) for total in sums]


def _write(
    context: HealContext, result: StageResult, results: Sequence[StageResult], stages: Sequence[Chosen], key: str
) -> None:
    """The recipe first: a stage is done when its facts are there."""
    recipe, rows = result.recipe, [*results, result]
    if results:
        text = context.calibration
        heal = {
            "settings": {chosen.name: plain(chosen.settings) for chosen in stages[: len(results)]},
            "text": {"description": text.description, "tokens": text.tokens, "sha256": text.sha256},
            "stages": [each.row() for each in rows],
            **{name: fact for each in rows for name, fact in each.facts.items()},
            "output_projections": [entry for each in rows for entry in each.details if "ridge" in entry],
        }
        recipe = replace(recipe, provenance={**recipe.provenance, "heal": heal})
    with full_disk_named(context.run.path):
        result.path.parent.mkdir(parents=True, exist_ok=True)
        schema.save(recipe, result.path)
    names = ("stage", "quality", "taken", "tokens", "seconds", "details", "facts")
    facts = {"key": key, **{name: getattr(result, name) for name in names}}
    context.run.write_json(str(result.path.with_suffix(".json").relative_to(context.run.path)), facts)


def _facts(path: Path) -> dict[str, Any] | None:
    """The record of a stage, if there is one."""
    path, remedy = path.with_suffix(".json"), "Delete it; that stage is then run again."
    return read_json(path, expected="what a heal stage gave", remedy=remedy) if path.is_file() else None


def _key(context: HealContext, recipe: Recipe, chosen: Chosen | None) -> str:
    """The identity of a stage's work in the run folder."""
    facts = [
        schema.content_hash(recipe),
        None if chosen is None else pinned(chosen),
        [text.sha256 for text in (context.calibration, context.held_out, *context.evaluation)],
        [schema.content_hash(start.recipe) for start in context.starts],
        context.layer_errors,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _clear(folder: Path) -> None:
    """Of a recorded stage, delete the tensors of its state; logs stay."""
    for path in list(folder.glob("*")):
        if any(file.suffix in _TENSORS for file in (path, *path.rglob("*"))):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
