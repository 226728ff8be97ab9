"""A share whose worker dies: where processes of their own can find it."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from intarsia.building.resident import Resident
from intarsia.planning.intermediate import Intermediate
from intarsia.planning.share import Share
from intarsia.recipe.ops import Op


@dataclass(frozen=True, kw_only=True)
class DyingShare(Share):
    """Kills its process at the second share: the first time only, or `always`."""

    mark: Path
    always: bool

    def intermediate(self, resident: Resident, ops: Sequence[Op]) -> Intermediate:
        """As ever, where it survives."""
        if self.number == 1 and (self.always or not self.mark.exists()):
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().intermediate(resident, ops)
