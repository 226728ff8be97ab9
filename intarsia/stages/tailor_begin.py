"""What a search begins with: text of what is searched for, sensitivities of pieces, and sensible candidates.

Planners and sensitivities are measured on the same text: what the objectives show of their sources to the search.
Everything made here is kept in the run folder and made once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from intarsia.checkpoint.reader import Checkpoint
from intarsia.commands.planning import Planning
from intarsia.data.corpus import Corpus
from intarsia.disk import write_whole
from intarsia.errors import UserError
from intarsia.evaluation.task_file import names_a_file, read_questions, read_targets
from intarsia.options import Target
from intarsia.progress import Progress
from intarsia.pruning.ladder import Ladder
from intarsia.registry import planners
from intarsia.run_dir import RunDir
from intarsia.stages.source import Source
from intarsia.stages.tailor_folder import TailorFolder
from intarsia.tailoring import warm_start
from intarsia.tailoring.engine import Start
from intarsia.tailoring.family_file import RANDOM_MIDDLE, FamilyFile, ObjectiveSpec
from intarsia.tailoring.history import Trial
from intarsia.tailoring.objective_sources import part_of
from intarsia.tailoring.translate import PieceScores, Translator
from intarsia.tailoring.warm_start import WarmStart, from_recipe, from_search, random_middles

TOKENS = 8192
_LEAST_TOKENS = 128
_SEQ_LEN = 512
_EXAMPLES = "calibration.jsonl"


class Beginning:
    """Makes what a search begins with, and reads it again where it was made before."""

    def __init__(
        self,
        file: FamilyFile,
        folder: TailorFolder,
        *,
        calibration: Sequence[str],
        tokens: int,
        device: str | None,
        dtype: str | None,
        progress: Progress,
    ) -> None:
        """Nothing is done yet.

        Args:
            calibration: specs of text; none for what the objectives show.
            tokens: of text, as far as there are so many.
        """
        self.file, self.folder, self.progress = file, folder, progress
        self._calibration, self._tokens = list(calibration), tokens
        self._device, self._dtype = device, dtype
        self._source: Source | None = None

    def measured(self, members: dict[str, Checkpoint]) -> PieceScores:
        """The sensitivities of all members' pieces.

        Raises:
            UserError: something measured is not finite, or the disk is full.
        """
        path = self.folder.sensitivities
        if not path.exists():
            source = self.source
            corpus = source.corpus
            source.release()
            found = warm_start.measure(
                members, corpus, device=source.device, dtype=source.dtype, progress=self.progress
            )
            warm_start.save(found, path)
        return warm_start.load(path)

    def warm_start(self, translator: Translator) -> WarmStart:
        """The candidates to begin with, and trials of earlier searches.

        Raises:
            UserError: an earlier run cannot be read.
        """
        path = self.folder.warm_start
        if not path.exists():
            starts: list[Start] = []
            earlier: dict[tuple[str, int], Trial] = {}
            for name in self.file.search.warm_start:
                found = self._one(name, translator)
                if not found.starts and not found.earlier:
                    self.progress.say(f"warm start {name}: nothing in it fits this space")
                starts += found.starts
                earlier |= {trial.key: trial for trial in found.earlier}
            self.release()
            unlike = {start.candidate: start for start in reversed(starts)}
            WarmStart(starts=tuple(reversed(unlike.values())), earlier=tuple(earlier.values())).save(path)
        return WarmStart.load(path)

    def _one(self, name: str, translator: Translator) -> WarmStart:
        space = translator.space
        if name == RANDOM_MIDDLE:
            return WarmStart(starts=tuple(random_middles(space, self.file.search.seed)))
        if name in planners:
            if space.kind != "cut":
                return WarmStart()
            run = self.folder.plan_path(name)
            planning = Planning(self.source, Target(layers=space.target), planners.choose(name))
            with planning.opened(RunDir(run)) as ladder:
                planning.work(ladder)
            return _of_ladder(Ladder.existing(run), translator, name)
        earlier = TailorFolder(Path(name))
        if not earlier.is_one():
            return _of_ladder(Ladder.existing(Path(name)), translator, name)
        return from_search(
            earlier.history().trials,
            earlier.front(),
            translator,
            name,
            same=_measured(earlier) == _measured(self.folder),
        )

    @property
    def source(self) -> Source:
        """The base with its calibration text."""
        if self._source is None:
            specs = self._calibration or list(self._shown())
            self._source = _with_text(
                self.file, specs or ["self"], self._tokens, self._device, self._dtype, self.progress
            )
        return self._source

    def release(self) -> None:
        """Let go of the base in memory."""
        if self._source is not None:
            self._source.release()
            self._source = None

    def _shown(self) -> Iterator[str]:
        """What the objectives show of their sources, as specs; items of tasks in a file of the run folder."""
        lines: list[str] = []
        for objective in self.file.objectives:
            texts = _items(objective)
            if texts is None and objective.kind != "task":
                yield part_of(objective)
            lines += [json.dumps({"text": text}) for text in texts or ()]
        if lines:
            path = self.folder.path / _EXAMPLES
            write_whole(path, "\n".join(lines) + "\n")
            yield str(path)


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


def _with_text(
    file: FamilyFile, specs: list[str], tokens: int, device: str | None, dtype: str | None, progress: Progress
) -> Source:
    """The base with as many tokens of the text as there are, up to `tokens`; shorter sequences where they are few."""
    while True:
        seq_len = min(_SEQ_LEN, max(tokens // (4 * len(specs)), 16))
        source = Source(
            file.base.model,
            revision=file.base.revision,
            calibration=specs,
            tokens=tokens,
            seq_len=seq_len,
            seed=file.search.seed,
            device=device,
            dtype=dtype,
            progress=progress,
        )
        positions = source.checkpoint.architecture.config.get("max_position_embeddings")
        source.seq_len = min(seq_len, positions) if isinstance(positions, int) else seq_len
        try:
            _corpus: Corpus = source.corpus
        except UserError:
            if tokens // 2 < _LEAST_TOKENS:
                raise
            tokens //= 2
            continue
        return source


def _of_ladder(run: Ladder, translator: Translator, name: str) -> WarmStart:
    target = translator.space.target
    if target not in run.depths():
        return WarmStart()
    return WarmStart(starts=tuple(from_recipe(run.recipe(target), translator, name)))


def _measured(folder: TailorFolder) -> list[object]:
    """What two searches must share for their costs to be comparable."""
    settings = folder.settings()
    objectives = [[entry[key] for key in ("name", "kind", "metric", "sha256")] for entry in settings["objectives"]]
    hashes = {name: member["sha256"] for name, member in settings["members"].items()}
    return [objectives, hashes, settings["config"], settings["heal"], settings["dtype"]]
