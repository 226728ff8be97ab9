"""What a search starts with: text of what is searched for, sensitivities of pieces, and sensible candidates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intarsia.commands.job import Job
from intarsia.commands.planning import Planning
from intarsia.disk import write_whole
from intarsia.errors import UserError
from intarsia.evaluation.task_file import names_a_file, read_questions, read_targets
from intarsia.options import ModelRef, Runtime, Target, TextSpec
from intarsia.progress import current
from intarsia.pruning.ladder import Ladder
from intarsia.registry import planners
from intarsia.run_dir import RunDir
from intarsia.tailoring import warm_start
from intarsia.tailoring.family import Family
from intarsia.tailoring.family_file import RANDOM_MIDDLE, FamilyFile, ObjectiveSpec
from intarsia.tailoring.final import SENSITIVITIES
from intarsia.tailoring.objective import part_of
from intarsia.tailoring.run import TailorRun, is_tailor_run
from intarsia.tailoring.translate import Translator
from intarsia.tailoring.warm_start import WarmStart, from_recipe, from_search, random_middles

if TYPE_CHECKING:
    from intarsia.commands.tailor import SearchOptions

_LEAST_TOKENS = 128
_SEQ_LEN = 512
_EXAMPLES = "calibration.jsonl"


class SearchStart:
    """What a search starts with: sensitivities of pieces, and sensible candidates. Each is made once and kept.

    Planners and sensitivities are measured on the same text: what the objectives show of their sources to the search.
    """

    def __init__(self, file: FamilyFile, search: SearchOptions, runtime: Runtime, run: TailorRun) -> None:
        self.file, self.search, self.runtime, self.run = file, search, runtime, run
        self._job: Job | None = None

    def sensitivities(self, family: Family) -> dict[Any, Any]:
        """The sensitivities of all members' pieces.

        Raises:
            UserError: something measured is not finite, or the disk is full.
        """
        path = self.run.path / SENSITIVITIES
        if not path.exists():
            corpus = self.job.text.calibration
            self.job.release()
            found = warm_start.measure(family.checkpoints(), corpus, device=self.job.device, dtype=self.job.dtype)
            warm_start.save(found, path)
        return warm_start.load(path)

    def start(self, translator: Translator) -> WarmStart:
        """The candidates to start with, and trials of earlier searches.

        Raises:
            UserError: an earlier run cannot be read.
        """
        path = self.run.path / "warm_start.json"
        if not path.exists():
            parts = []
            for name in self.file.search.warm_start:
                found = self._one(name, translator)
                if not found.starts and not found.earlier:
                    current().say(f"warm start {name}: nothing in it fits this space")
                parts.append(found)
            if self._job is not None:
                self._job.release()
            WarmStart.joined(parts).save(path)
        return WarmStart.load(path)

    def _one(self, name: str, translator: Translator) -> WarmStart:
        space = translator.space
        if name == RANDOM_MIDDLE:
            return WarmStart(starts=tuple(random_middles(space, self.file.search.seed)))
        if name in planners:
            if space.kind != "cut":
                return WarmStart()
            return _of_ladder(self._planned(name, space.target), translator, name)
        if not is_tailor_run(Path(name)):
            return _of_ladder(Path(name), translator, name)
        earlier = TailorRun(name)
        return from_search(
            earlier.trials, earlier.front, translator, name, same=_measured(earlier) == _measured(self.run)
        )

    def _planned(self, method: str, layers: int) -> Path:
        """The run folder of a planner, down to that depth."""
        run = self.run.path / "plans" / method
        planning = Planning(self.job, Target(layers=layers), planners.choose(method))
        with planning.opened(RunDir(run)) as ladder:
            planning.work(ladder)
        return run

    @property
    def job(self) -> Job:
        """The base with its calibration text: as many tokens as there are; shorter sequences where they are few."""
        if self._job is None:
            sources = self.search.calibration or tuple(self._shown()) or ("self",)
            self._job = self._with_text(sources)
        return self._job

    def _with_text(self, sources: tuple[str, ...]) -> Job:
        base, tokens = self.file.base, self.search.tokens
        while True:
            seq_len = min(_SEQ_LEN, max(tokens // (4 * len(sources)), 16))
            job = Job(ModelRef(model=base.model, revision=base.revision, dequantize=True), runtime=self.runtime)
            positions = job.checkpoint.architecture.config.get("max_position_embeddings")
            seq_len = min(seq_len, positions) if isinstance(positions, int) else seq_len
            text = TextSpec(sources=sources, tokens=tokens, seq_len=seq_len, seed=self.file.search.seed)
            job = Job(job.checkpoint, text, self.runtime)
            try:
                _ = job.text.calibration
            except UserError:
                if tokens // 2 < _LEAST_TOKENS:
                    raise
                tokens //= 2
                continue
            return job

    def _shown(self) -> Iterator[str]:
        """What the objectives show of their sources, as specs; items of tasks in a file of the run folder."""
        lines: list[str] = []
        for objective in self.file.objectives:
            texts = _items(objective)
            if texts is None and objective.kind != "task":
                yield part_of(objective)
            lines += [json.dumps({"text": text}) for text in texts or ()]
        if lines:
            path = self.run.artifact(_EXAMPLES)
            write_whole(path, "\n".join(lines) + "\n")
            yield str(path)


def _of_ladder(path: Path, translator: Translator, name: str) -> WarmStart:
    ladder, target = Ladder.existing(path), translator.space.target
    if target not in ladder.depths():
        return WarmStart()
    return WarmStart(starts=tuple(from_recipe(ladder.recipe(target), translator, name)))


def _measured(run: TailorRun) -> list[object]:
    """What two searches must share for their costs to be comparable."""
    facts = run.settings
    objectives = [[entry[key] for key in ("name", "kind", "metric", "sha256")] for entry in facts["objectives"]]
    hashes = {name: member["sha256"] for name, member in facts["members"].items()}
    return [objectives, hashes, facts["config"], facts["heal"], facts["dtype"]]


def _items(objective: ObjectiveSpec) -> list[str] | None:
    """The items that an objective shows, as text; None where its source is no file of items."""
    if not names_a_file(objective.source):
        return None
    part = part_of(objective)
    if objective.kind == "task":
        return [f"{question.query} {question.choices[question.gold]}" for question in read_questions(part)[1]]
    try:
        return [f"{target.query} {target.target}" for target in read_targets(part)[1]]
    except UserError:
        return None  # a file of texts, which is read as such
