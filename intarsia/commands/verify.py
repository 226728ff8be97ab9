"""`intarsia verify`: check that a model folder meets what every runtime expects."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from intarsia.flags import Flag, Result
from intarsia.model_name import require_folder
from intarsia.options import NewModel
from intarsia.progress import current

if TYPE_CHECKING:
    from intarsia.exporting.verify import Check


@dataclass(frozen=True, kw_only=True)
class VerifyResult(Result):
    """The results of all checks."""

    folder: Path
    # Whether no check failed.
    kept: bool
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the command exits with code 0."""
        return self.kept


def verify(
    folder: Annotated[Path, Flag(positional=True, metavar="FOLDER", help="A local model folder.")],
    *,
    shard_size: Annotated[
        str, Flag(names=("--max-shard-size",), metavar="SIZE", help="Largest size of a weight file.")
    ] = "5GB",
    load: Annotated[bool, Flag(help="Also load the model, and generate with and without cache.")] = True,
) -> VerifyResult:
    """Check that a model folder is a stock checkpoint: complete, consistent, and loadable everywhere.

    Exit code 0: all checks passed; 1: a check failed; 2: there is no model folder. A weight file with a single tensor
    may be larger than --max-shard-size. Loading takes memory for the weights in float32.

    Raises:
        UserError: there is no such folder, or it has no readable config.
    """
    require_folder(Path(folder))
    from intarsia.checkpoint.reader import read_config
    from intarsia.exporting import verify as contract

    started, folder = time.perf_counter(), Path(folder)
    subject = contract.Subject(folder, NewModel(path=folder, shard_size=shard_size).shard_bytes)
    read_config(folder, quantised=True)
    looks = {
        "architecture": contract.architecture,
        "config": contract.config_agrees,
        "index and shards": contract.index_right,
        "tensors": contract.tensors,
        "dtype": contract.dtype_kept,
        "finite": contract.finite,
        "sha256": contract.sums_right,
        "tokenizer": contract.tokenizer_kept,
        "generation config": contract.generation_config_valid,
        **({"loads": contract.loads, "generates": contract.generates} if load else {}),
    }
    checks = []
    with current().task("verifying", len(looks)) as task:
        for name, look in looks.items():
            task.note(name)
            checks.append(contract.checked(name, look, subject))
            task.advance()
    return VerifyResult(
        folder=folder,
        kept=all(each.outcome != "failed" for each in checks),
        checks=tuple(checks),
        seconds=time.perf_counter() - started,
    )
