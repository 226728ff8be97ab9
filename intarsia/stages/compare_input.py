"""Validate the options of a comparison, and estimate what it takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intarsia.commands.planning import Planning
from intarsia.data.corpus import Corpus
from intarsia.errors import Problem, UserError
from intarsia.evaluation.perplexity import eval_corpus
from intarsia.evaluation.task_plan import LocalTask, TaskPlan
from intarsia.options import Target
from intarsia.registry import Chosen, heal_stages
from intarsia.stages.source import Source

HEALS = ("none", "closed-form")


def check_lists(
    layers: Sequence[int],
    heal: Sequence[str],
    texts: Sequence[str],
    windows: Sequence[int],
    tasks: Sequence[str],
    task_layers: Sequence[int] | None,
) -> None:
    """Refuse lists that do not fit together.

    Raises:
        UserError: with everything that is wrong.
    """
    problems = []

    def wrong(where: str, expected: str, found: str, remedy: str) -> None:
        problems.append(Problem(where=where, expected=expected, found=found, remedy=remedy))

    if not layers:
        wrong("--layers", "at least one depth", "none", "Write them like 27,25,23.")
    unknown = [each for each in heal if each not in HEALS]
    if unknown or not heal:
        wrong("--heal", f"one or both of {', '.join(HEALS)}", ", ".join(unknown) or "none", "Write none,closed-form.")
    if not texts and not tasks:
        wrong("--eval-text", "something to judge by", "neither a text nor tasks", "Give --eval-text or --tasks.")
    if any(count < 1 for count in windows):
        wrong("--eval-windows", "1 or more", ", ".join(map(str, windows)), "Give such numbers.")
    if len(windows) not in (1, len(texts)):
        wrong(
            "--eval-windows",
            f"one number, or one for each of the {len(texts)} texts",
            f"{len(windows)} of them",
            "Give one for each --eval-text, in the same order.",
        )
    strangers = [depth for depth in task_layers or () if depth not in layers]
    if strangers:
        wrong("--task-layers", "depths among --layers", ", ".join(map(str, strangers)), "Add them to --layers.")
    if task_layers is not None and not tasks:
        wrong("--task-layers", "--tasks beside it", "no tasks", "Give --tasks, or leave it out.")
    if problems:
        raise UserError(problems)


def check_depths(depths: Sequence[int], whole: int) -> None:
    """Refuse depths that a model of `whole` layers cannot be cut to.

    Raises:
        UserError: naming them.
    """
    wrong = [depth for depth in depths if not 1 <= depth < whole]
    if wrong:
        raise UserError.of(
            where="--layers",
            expected=f"depths from 1 to {whole - 1} (the model has {whole} layers)",
            found=", ".join(map(str, wrong)),
            remedy="Ask for fewer layers than the model has.",
        )


def load_texts(
    specs: Sequence[str], windows: Sequence[int], tokenizer: Any, *, seq_len: int
) -> tuple[dict[str, Corpus], list[dict[str, Any]]]:
    """The evaluation texts by name, and what is told of them.

    A text is a source as anywhere else, or NAME=SOURCE; without a name it is called after its file.

    Raises:
        UserError: one cannot be used, or two have one name.
    """
    texts: dict[str, Corpus] = {}
    facts: list[dict[str, Any]] = []
    for each, count in zip(specs, windows, strict=True):
        name, spec = named(each)
        if name in texts:
            raise UserError.of(
                where=f"--eval-text {each}",
                expected="a name of its own for every text",
                found=f"{name!r} again",
                remedy="Give names: --eval-text NAME=FILE.",
            )
        corpus = eval_corpus(spec, tokenizer, seq_len=seq_len, windows=count)
        texts[name] = corpus
        facts.append({"name": name, "spec": spec, "sha256": corpus.sha256, "windows": len(corpus), "seq_len": seq_len})
    return texts, facts


def named(text: str) -> tuple[str, str]:
    """Name and source of an evaluation text."""
    name, equals, spec = text.partition("=")
    if equals and name and not any(mark in name for mark in "/\\#:") and not Path(text.partition("#")[0]).exists():
        return name, spec
    file, _, part = text.partition("#")
    stem = text.split(":")[1] if text.startswith("hub:") and text.count(":") else Path(file).stem
    return (f"{stem} {part}" if part else stem), text


def task_facts_of(plan: TaskPlan, specs: Sequence[str], include_path: Path | None) -> list[dict[str, Any]]:
    """What is pinned of the tasks: of a local file the questions that are asked."""
    facts = []
    for spec, task in zip(specs, plan.tasks, strict=True):
        fact: dict[str, Any] = {"name": task.name, "spec": spec, "limit": plan.limit}
        if isinstance(task, LocalTask):
            fact["sha256"] = hashlib.sha256(repr(task.questions).encode()).hexdigest()
        elif include_path is not None:
            fact["include_path"] = str(include_path)
        facts.append(fact)
    return facts


def estimated(entrant: Chosen, source: Source, depths: Sequence[int], heals: Sequence[str]) -> dict[str, Any]:
    """Passes over the calibration text that a method takes at most, without the one that all methods share."""
    architecture = source.checkpoint.architecture
    planner = entrant.create()
    shared = architecture.n_layers if planner.measures or planner.progressive else 0
    sequences = max(source.tokens // source.seq_len, 1)
    # Where a step may take several layers, every depth may need a ladder of its own.
    ladders = depths if planner.layers_at_once > 2 else [min(depths)]
    forwards = sum(planner.forwards_at_most(architecture, target, sequences) - shared for target in ladders)
    stages = heal_stages.choose_all("closed-form" if "closed-form" in heals else "none")
    heal = Planning(source, Target(layers=min(depths)), entrant).heal_passes_at_most(stages)
    return {
        "method": entrant.label,
        "passes_at_most": forwards / architecture.n_layers,
        "heal_passes_at_most": len(depths) * heal,
        "models": len(depths) * len(heals),
    }
