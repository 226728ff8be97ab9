"""The command `intarsia`: find the verb, parse its options, call it, and show its result or error.

A verb is a function in `intarsia/commands/`; its signature is its command line (`intarsia.cli.parse`). It returns a
result with `to_dict()`; a result whose `passed` is false gives exit code 1.

Exit codes: 0 success; 1 a failed check, or a bug; 2 unusable input; 130 interrupted. User errors never show a
traceback; that of a bug goes to a log file (with INTARSIA_DEBUG=1 to the terminal).
"""

from __future__ import annotations

import ast
import errno
import importlib.util
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from intarsia import __version__, progress
from intarsia.cli.parse import HELP_FLAGS, parse
from intarsia.errors import Problem, UserError
from intarsia.flags import plain
from intarsia.inspection.own_code import trust_remote_code
from intarsia.progress import duration
from intarsia.reporting.wording import MEASURES, change, is_measure, text_of, title_of

VERBS = {
    "compress": "compress:compress",
    "plan": "plan:plan",
    "build": "build:build",
    "heal": "heal:heal",
    "tailor": "tailor:tailor",
    "compare": "compare:compare",
    "eval tasks": "evaluate:evaluate_tasks",
    "eval perplexity": "evaluate:evaluate_perplexity",
    "eval agreement": "evaluate:evaluate_agreement",
    "bench": "bench:bench",
    "inspect": "inspect:inspect",
    "report": "report:report",
    "verify": "verify:verify",
    "export": "export:export",
    "push": "push:push",
    "anatomy list": "anatomy:families",
    "anatomy check": "anatomy:check_family",
}
"""The function of each verb: module of `intarsia.commands` and name."""

_DEFAULTS = {"eval": "eval tasks"}
"""The default verb of a group."""

# Logging of other libraries, unless the user has set it. They read this on import, which happens inside the verbs.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
# System errors that the user can correct.
_SURROUNDINGS = {
    errno.EACCES: "Change its permissions, or use another place.",
    errno.EPERM: "Change its permissions, or use another place.",
    errno.EROFS: "Use a writable place.",
    errno.ENOSPC: "Free some space, or use a place on another disk.",
    errno.EDQUOT: "Free some space, or use a place on another disk.",
    errno.ENAMETOOLONG: "Use a shorter name.",
    errno.ENOTDIR: "Use a folder.",
}
_DETAILS = {"next_token_kl", "loops", "answer_length", "answer_perplexity"}
"""Keys shown only in the report."""
_LINES = 15
_SPARE = ("perplexity_without_heal", "prefill_per_s", "bytes")
"""Keys to omit, one after the other, if the table has more than `_LINES`."""
_GREETING = "[{'role': 'user', 'content': 'Hello'}]"


def main() -> None:
    """The console script."""
    if not debugging():
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        if "PYTHONWARNINGS" not in os.environ:
            warnings.filterwarnings("ignore")
    # SIGTERM cleans up like Ctrl-C, so that no staging folder is left.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run(sys.argv[1:])


def run(words: Sequence[str]) -> None:
    """Run a command line.

    Raises:
        SystemExit: with the exit code, if it is not 0.
    """
    with guard() as stdout:
        if words[:1] == ["--version"]:
            print(f"intarsia {__version__}", file=stdout)
            return
        name, rest = find(words)
        if not name or (not rest and name not in VERBS):
            _overview(name, Console(file=stdout))
            return
        verb = function(name)
        with redirect_stdout(stdout if any(word in HELP_FLAGS for word in rest) else sys.stderr):
            call = parse(verb, name, rest)
        # Of several launched processes (`accelerate launch`), only the first one prints.
        first = os.environ.get("RANK", "0") == "0"
        quiet = call.shared.quiet or call.shared.json or not first
        with progress.shown(quiet=quiet), trust_remote_code(call.shared.trust_remote_code):
            result = call()
        if first:
            show(result, to=stdout, as_json=call.shared.json)
        if not getattr(result, "passed", True):
            raise SystemExit(1)


def find(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb of a command line, or a group of verbs, and the arguments after it.

    Raises:
        UserError: there is no such verb.
    """
    if not words or words[0] in HELP_FLAGS:
        return "", []
    group = [name for name in VERBS if name.split()[0] == words[0]]
    if words[0] in group:
        return words[0], list(words[1:])
    if not group:
        near = get_close_matches(words[0], [name.split()[0] for name in VERBS], n=1)
        raise UserError(
            f"There is no verb {words[0]!r}.", f"Did you mean {near[0]}?" if near else "See intarsia --help."
        )
    if len(words) == 1 or words[1] in HELP_FLAGS:
        return words[0], []
    if f"{words[0]} {words[1]}" in group:
        return f"{words[0]} {words[1]}", list(words[2:])
    if words[0] in _DEFAULTS:
        return _DEFAULTS[words[0]], list(words[1:])
    verbs = ", ".join(name.split()[1] for name in group)
    raise UserError(f"There is no verb {words[0]} {words[1]!r}.", f"Give one of {verbs}.")


def function(name: str) -> Callable[..., Any]:
    """The function of a verb."""
    module, _, attribute = VERBS[name].partition(":")
    return getattr(import_module(f"intarsia.commands.{module}"), attribute)


def _overview(group: str, console: Console) -> None:
    """Print an overview of the verbs."""
    about = "Make language models shallower, and keep what the removed layers knew."
    console.print(f"Usage: intarsia {group or 'VERB'} ...\n\n{about}\n", highlight=False, markup=False)
    table = Table(show_header=False, show_edge=False, box=None, pad_edge=False)
    for name in VERBS:
        if not group or name.startswith(f"{group} "):
            table.add_row(f"  {name}", _about(name))
    console.print(table)
    console.print("\nintarsia VERB --help lists its options.", highlight=False)


def _about(name: str) -> str:
    """The first line of a verb's docstring, from its source, because importing a verb may import torch."""
    module, _, attribute = VERBS[name].partition(":")
    spec = importlib.util.find_spec(f"intarsia.commands.{module}")
    assert spec is not None and spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    verb = next(each for each in body if isinstance(each, ast.FunctionDef) and each.name == attribute)
    return (ast.get_docstring(verb) or "").partition("\n")[0]


def debugging() -> bool:
    """Whether INTARSIA_DEBUG asks for tracebacks and for the warnings of other libraries."""
    return os.environ.get("INTARSIA_DEBUG", "0") not in ("", "0")


@contextmanager
def guard() -> Iterator[TextIO]:
    """A context to run a verb in; yields the stream for its result.

    Output of libraries goes to stderr, because stdout is for the result.
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
        resumes = bool(getattr(stop, "__notes__", ()))  # the run folder adds a note
        then = "The same command resumes it." if resumes else "The same command starts it again."
        _say(f"Interrupted. {then}")
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _SURROUNDINGS:
            found = f"{error.filename or 'A file'} cannot be used: {error.strerror or error}."
            report([Problem(found, _SURROUNDINGS[error.errno])])
            raise SystemExit(2) from None
        _defect(error)
        raise SystemExit(1) from None


def report(problems: Iterable[Problem]) -> None:
    """Print all problems of an input to stderr, each with its hint."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for problem in problems:
        console.print(Text("error: ", style="bold red") + Text(problem.message))
        if problem.hint:
            console.print(Text("  hint: ", style="dim") + Text(problem.hint))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _defect(error: Exception) -> None:
    """Report a bug: one line, a hint, and the path of the traceback."""
    words = " ".join(str(error).split()) or "no message"
    if len(words) > 300:
        words = words[:300] + " ..."
    # torch's class by name, because a verb that failed early has not imported torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
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


def _log(error: Exception) -> str:
    """Write the traceback to a new file; return its path, or why it could not be written."""
    try:
        handle, path = tempfile.mkstemp(prefix="intarsia-", suffix=".log")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(f"command: {sys.argv}\npython: {sys.version}\n\n")
            file.writelines(traceback.format_exception(error))
    except OSError as failure:
        return f"not kept: {failure}"
    return path


def show(result: Any, *, to: TextIO, as_json: bool) -> None:
    """Write a result to a stream: as one JSON object, or as tables.

    The key decides the format of a value: `bytes` a size, `seconds` a time, `per_s` and perplexities few digits. A
    list of mappings is a separate table.
    """
    if not as_json and hasattr(result, "summary"):  # a shorter form for people
        data = result.summary()
    else:
        data = result.to_dict() if hasattr(result, "to_dict") else plain(result)
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False), file=to, flush=True)
        return
    console = Console(file=to, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        # A pipe has no width, so columns are not wrapped.
        console.width = 240
    if data.get("before") is not None and data.get("after") is not None:
        _show_compressed(data, console)
    else:
        _show_mapping(data, console)


def _show_compressed(data: Mapping[str, Any], console: Console) -> None:
    """Print a short table: measures, time, and paths.

    At most 80 columns, except for long paths, and at most `_LINES` lines, plus one for every further text.
    """
    before, after = data["before"], data["after"]
    parts = [f"{name} {part:,.0f}" for name, part in (data.get("seconds_by_part") or {}).items() if part >= 0.5]
    given: dict[str, Any] = {"on": data.get("evaluation")}
    given["but"] = data.get("warning")
    given["time"] = duration(data["seconds"]) + (f" (seconds: {', '.join(parts)})" if parts else "")
    given |= {"model": data["out"], "report": data.get("report")}
    pipeline = f'transformers.pipeline("text-generation", "{data["out"]}")'
    if data.get("chat_template"):
        given |= {"try it": f"chat = {pipeline}", "": f"chat({_GREETING})[0]['generated_text'][-1]"}
    else:
        given["try it"] = f'{pipeline}("Hello")'
    given["hub"] = (data.get("push") or {}).get("address")
    lines = {name: text for name, text in given.items() if text is not None}

    others = [key for key in after if key.startswith("perplexity of ")]
    titles = {key: name for key, name in (MEASURES | {key: key for key in others}).items() if key not in _DETAILS}
    rows = [key for key in titles if after.get(key) is not None]
    for key in _SPARE:
        if 1 + len(rows) + len(lines) > _LINES and key in rows:
            rows.remove(key)
    table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    for key in rows:
        old, new = before.get(key), after[key]
        table.add_row(*map(Text, (titles[key], text_of(key, old), text_of(key, new), change(old, new))))
    console.print(table)
    for name, text in lines.items():
        console.print(Text(f"{name:<8}", style="dim") + Text(str(text)))


def _show_mapping(data: Mapping[str, Any], console: Console, indent: str = "") -> None:
    for key, value in data.items():
        rows = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
        if value is None or value == {}:
            continue
        if rows and all(isinstance(row, Mapping) for row in rows):
            console.print(Text(f"{indent}{title_of(key)}", style="bold"))
            table = Table(show_edge=False, pad_edge=False)
            names = list(dict.fromkeys(name for row in rows for name in row))
            for name in names:
                numbers = all(isinstance(row.get(name), int | float | None) for row in rows)
                table.add_column(title_of(name), justify="right" if numbers else "left", overflow="fold")
            for row in rows:
                table.add_row(*(Text(text_of(name, row.get(name))) for name in names))
            console.print(table)
        elif isinstance(value, Mapping) and not is_measure(value):
            console.print(Text(f"{indent}{title_of(key)}", style="bold"))
            _show_mapping(value, console, indent + "  ")
        else:
            label = Text(f"{indent}{title_of(key):<{max(1, 24 - len(indent))}} ", style="dim")
            console.print(label + Text(text_of(key, value)))
