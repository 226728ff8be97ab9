"""The command `intarsia` and its verbs."""

from __future__ import annotations

import os
import signal
import warnings
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Annotated

import typer

from intarsia.cli.anatomy import check as check_anatomy
from intarsia.cli.anatomy import list_families
from intarsia.cli.bench import bench
from intarsia.cli.build import build
from intarsia.cli.compare import compare
from intarsia.cli.default_verb import DefaultVerb
from intarsia.cli.evaluate import perplexity, tasks
from intarsia.cli.export import export
from intarsia.cli.guard import debugging
from intarsia.cli.inspect import inspect
from intarsia.cli.push import push
from intarsia.cli.report import report
from intarsia.cli.verify import verify

# What other libraries say about themselves, unless the user has set it. They read this when they are imported,
# which happens inside the verbs.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}

app = typer.Typer(name="intarsia", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
evaluation = typer.Typer(
    cls=DefaultVerb,
    no_args_is_help=True,
    subcommand_metavar="MODEL --tasks NAMES | COMMAND",
    help="Judge a model. Without a command, `eval MODEL --tasks NAMES` is `eval tasks`.",
)
anatomy = typer.Typer(no_args_is_help=True, help="Which model families are known, and what is exact in each.")

app.command()(build)
app.command()(compare)
app.command()(inspect)
app.command()(bench)
app.command()(report)
app.command()(verify)
app.command()(export)
app.command()(push)
app.add_typer(evaluation, name="eval")
app.add_typer(anatomy, name="anatomy")
anatomy.command("list")(list_families)
anatomy.command("check")(check_anatomy)
evaluation.command()(tasks)
evaluation.command()(perplexity)


def _print_version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"intarsia {version('intarsia')}")
        except PackageNotFoundError:
            typer.echo("intarsia, not installed: run from its source folder")
        raise typer.Exit


@app.callback()
def intarsia(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Make language models shallower, and keep what the removed layers knew."""


def main() -> None:
    """The console script."""
    if not debugging():
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        if "PYTHONWARNINGS" not in os.environ:
            warnings.filterwarnings("ignore")
    # A polite kill clears up like Ctrl-C does: no staging folder stays behind.
    signal.signal(signal.SIGTERM, _terminated)
    app()


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
