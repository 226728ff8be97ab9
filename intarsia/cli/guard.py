"""Errors of a verb, their exit codes, and what may go to stdout.

Exit codes: 0 done; 2 input that cannot be used; 1 a defect of ours; 130 interrupted. A user's mistake never shows a
traceback; the traceback of a defect goes to a log file (to the terminal with INTARSIA_DEBUG=1).
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from rich.console import Console
from rich.text import Text

from intarsia.errors import Problem, UserError

# Failures of the machine that the user can correct.
_SURROUNDINGS = {
    errno.EACCES: "Change its permissions, or name another place.",
    errno.EPERM: "Change its permissions, or name another place.",
    errno.EROFS: "Name a place that can be written to.",
    errno.ENOSPC: "Free some space, or name a place on another disk.",
    errno.EDQUOT: "Free some space, or name a place on another disk.",
    errno.ENAMETOOLONG: "Use a shorter name.",
    errno.ENOTDIR: "Name a folder.",
}


def debugging() -> bool:
    """Whether INTARSIA_DEBUG asks for tracebacks and for the warnings of other libraries."""
    return os.environ.get("INTARSIA_DEBUG", "0") not in ("", "0")


@contextmanager
def guard() -> Iterator[TextIO]:
    """Run a verb inside this; gives the stream for its result.

    What libraries print meanwhile goes to stderr: stdout is for the result alone.
    """
    stdout = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield stdout
    except BrokenPipeError:
        raise
    except UserError as error:
        report(error.problems)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        resumes = bool(getattr(stop, "__notes__", ()))  # a run folder notes itself
        then = "The same command continues where this one was." if resumes else "The same command starts it again."
        _say(f"Interrupted. {then}")
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _SURROUNDINGS:
            report([_surroundings(error)])
            raise SystemExit(2) from None
        _defect(error)
        raise SystemExit(1) from None


def report(problems: tuple[Problem, ...] | list[Problem]) -> None:
    """Print all problems of an input to stderr: a sentence and a hint each."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for problem in problems:
        console.print(Text("error: ", style="bold red") + Text(problem.message))
        if problem.hint:
            console.print(Text("  hint: ", style="dim") + Text(problem.hint))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _surroundings(error: OSError) -> Problem:
    assert error.errno is not None
    return Problem(
        f"{error.filename or 'A file'} cannot be used: {error.strerror or error}.", _SURROUNDINGS[error.errno]
    )


def _defect(error: Exception) -> None:
    """Report a defect: one line, what to do about it, and where the traceback is."""
    words = " ".join(str(error).split()) or "no message"
    if len(words) > 300:
        words = words[:300] + " ..."
    if _out_of_memory(error):
        _say(f"error: out of memory: {words}")
        _say("  Try a smaller --batch-tokens, fewer --tokens, or a machine with more memory.")
    else:
        _say(f"error: internal error in intarsia: {type(error).__name__}: {words}")
    for note in getattr(error, "__notes__", ()):
        _say(f"  {note}")
    if debugging():
        traceback.print_exception(error)
    else:
        _say(f"  traceback: {_log(error)} (INTARSIA_DEBUG=1 prints it)")


def _out_of_memory(error: Exception) -> bool:
    # torch's class by its name: a verb that failed early has not imported torch.
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _log(error: Exception) -> str:
    """The path of a new file with the traceback; in words where even that cannot be written."""
    try:
        handle, path = tempfile.mkstemp(prefix="intarsia-", suffix=".log")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(f"command: {sys.argv}\npython: {sys.version}\n\n")
            file.writelines(traceback.format_exception(error))
    except OSError as failure:
        return f"not kept: {failure}"
    return path
