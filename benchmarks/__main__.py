"""`python -m benchmarks NAME [options]`: run one of the benchmarks; without a name, list them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from intarsia.errors import UserError

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def main() -> None:
    """Hand over to the benchmark of that name."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print("python -m benchmarks NAME [--help], with NAME one of: " + ", ".join(NAMES))
        sys.exit(0 if len(sys.argv) < 2 else 2)
    name = sys.argv.pop(1)
    try:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


main()
