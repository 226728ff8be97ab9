"""`intarsia verify`: does a model folder keep what every runtime expects of one?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from intarsia.errors import check
from intarsia.flags import Flag
from intarsia.options import NewModel
from intarsia.progress import Task, current

if TYPE_CHECKING:
    from intarsia.checkpoint.reader import Checkpoint
    from intarsia.exporting.verify import Check


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What came of every check."""

    folder: Path
    # whether no check failed
    kept: bool
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the command ends with exit code 0."""
        return self.kept

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "folder": str(self.folder), "checks": [asdict(each) for each in self.checks]}


def verify(
    folder: Annotated[Path, Flag(positional=True, metavar="FOLDER", help="A local model folder.")],
    *,
    shard_size: Annotated[
        str, Flag(names=("--max-shard-size",), metavar="SIZE", help="Size of a weight file at most, such as 5GB.")
    ] = "5GB",
    load: Annotated[bool, Flag(help="Also load the model, and compare generation with and without cache.")] = True,
) -> VerifyResult:
    """Check that a model folder is a stock checkpoint: whole, consistent, and loading everywhere.

    Exit code 0: it is. 1: a check failed. 2: there is nothing to check. A weight file with a single tensor may be
    larger than the size given. Loading takes memory for the weights in float32.

    Raises:
        UserError: there is no such folder, or it has no config that can be read.
    """
    from intarsia.building.materialize import RECIPE_FILE
    from intarsia.checkpoint.files import read_config, require_folder
    from intarsia.checkpoint.hashing import scan
    from intarsia.checkpoint.reader import Checkpoint
    from intarsia.exporting import verify as contract
    from intarsia.exporting import verify_tokenizer

    started = time.perf_counter()
    folder, progress = Path(folder), current()
    max_shard_bytes = NewModel(path=folder, shard_size=shard_size).shard_bytes
    require_folder(folder)
    read_config(folder, quantised=True)
    opened: list[Checkpoint] = []

    def tensors() -> str:
        checkpoint = Checkpoint.open(folder, model=str(folder))
        opened.append(checkpoint)
        check((not checkpoint.untied, *contract.UNTIED))
        return f"{len(checkpoint.headers) + len(checkpoint.kept)} tensors, {checkpoint.parameters:,} parameters"

    def finite() -> str:
        scan(_first(opened), progress)
        return "no NaN, no infinity"

    def vocabulary() -> int:
        return _first(opened).architecture.vocabulary

    built_here = (folder / RECIPE_FILE).is_file()
    looks: list[tuple[str, Callable[[], str]]] = [
        ("architecture", partial(contract.architecture, folder)),
        ("config", partial(contract.config_agrees, folder)),
        ("index and shards", partial(contract.index_right, folder, max_shard_bytes)),
        ("tensors", tensors),
        ("dtype", lambda: contract.dtype_kept(_first(opened))),
        ("finite", finite),
        ("sha256", partial(contract.sums_right, folder, built_here=built_here, progress=progress)),
        ("tokenizer", lambda: verify_tokenizer.tokenizer_kept(folder, vocabulary())),
        ("generation config", lambda: verify_tokenizer.generation_config_valid(folder, vocabulary())),
    ]
    with progress.task("verifying", len(looks) + 2 * load) as task:
        checks = []
        for name, look in looks:
            task.note(name)
            checks.append(contract.checked(name, look))
            task.advance()
        if load:
            checks += _run(folder, task)
    return VerifyResult(
        folder=folder,
        kept=all(each.outcome != "failed" for each in checks),
        checks=tuple(checks),
        seconds=time.perf_counter() - started,
    )


def _first(opened: list[Checkpoint]) -> Checkpoint:
    if not opened:
        from intarsia.exporting.verify import Skipped

        raise Skipped("the tensors are not those of the config")
    return opened[0]


def _run(folder: Path, task: Task) -> list[Check]:
    from intarsia.exporting import verify as contract

    models: list[Any] = []

    def load() -> str:
        found, model = contract.loads(folder)
        models.append(model)
        return found

    def generate() -> str:
        if not models:
            raise contract.Skipped("the model does not load")
        return contract.generates(folder, models[0])

    checks = []
    for name, look in (("loads", load), ("generates", generate)):
        task.note(name)
        checks.append(contract.checked(name, look))
        task.advance()
    return checks
