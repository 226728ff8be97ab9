"""One HTML file about one run or several. It opens anywhere, and requests nothing outside itself.

Style and script are in the file; a content security policy allows these two by their hashes and refuses everything
else, requests included. Templates escape everything that comes from a run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from intarsia import __version__
from intarsia.disk import damage_named, read_json, write_whole
from intarsia.errors import Problems, UserError
from intarsia.reporting import comparison_report, model_report, plan_report, tailor_report
from intarsia.reporting.blocks import Ladder, Section, Subject, Tile, Written, table
from intarsia.reporting.figures import variables
from intarsia.reporting.plan_report import ladder_figure
from intarsia.reporting.wording import model_name, text_of, title_of
from intarsia.tailoring.run import is_tailor_run

Generations = Mapping[Path, Sequence[Written]]

_TILES = ("acceptance", "tokens_per_pass", "speedup", "same_output")
_DRAFTED = (
    "The draft proposes tokens, and the model checks them in one pass; the acceptance is the share that it keeps. "
    "Greedy answers, with the draft and without it in turns."
)


def write_report(paths: Sequence[Path], out: Path, *, generations: Generations | None = None) -> None:
    """Write the report of some runs; the file appears whole or stays as it was.

    Args:
        paths: run folders of `plan` and `tailor`, comparisons, model folders that intarsia has built, and what
            `bench --json` printed.
        generations: what models generated, by the path of their folder.

    Raises:
        UserError: a path is none of these, or damaged; all problems at once, and nothing is written.
    """
    text = report_html([*paths], generations=generations)
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {out.parent} for the report.", "Make it first.")
    write_whole(out, text)


def report_html(paths: Sequence[Path], *, generations: Generations | None = None) -> str:
    """Return the report as text.

    Raises:
        UserError: as `write_report`.
    """
    return render(_subjects(paths, generations or {}))


def render(subjects: Sequence[Subject]) -> str:
    """Return the page about some subjects."""
    style, script = variables() + _part("page.css"), _part("page.js")
    environment = Environment(
        loader=PackageLoader("intarsia.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=subjects[0].title if len(subjects) == 1 else f"{len(subjects)} runs",
        subjects=subjects,
        anchors=[
            [_anchor(f"{number}-{section.title}") for section in each.sections] for number, each in enumerate(subjects)
        ],
        together=together(subjects),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'",
        made_with=f"Intarsia {__version__}",
    )


def together(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Return notes on how several runs differ, and the ladders that can share a chart."""
    if len(subjects) < 2:
        return {"notes": [], "section": None}
    notes = []
    bases = {subject.base[0]: subject.base[1] for subject in subjects if subject.base[0]}
    if len(bases) > 1:
        notes.append(
            f"These runs started from different models: {', '.join(f'{n} ({k[:8]})' for k, n in bases.items())}."
        )
    evaluated = [subject for subject in subjects if subject.texts]
    if len({frozenset(subject.texts) for subject in evaluated}) > 1:
        each = "; ".join(f"{subject.title}: {_named(subject.texts)}" for subject in evaluated)
        notes.append(
            "These runs were evaluated on different texts, so their perplexities cannot be compared and are shown "
            f"apart. {each}."
        )
    groups: dict[tuple[str, str], list[Ladder]] = {}
    for subject in subjects:
        for ladder in subject.ladders:
            groups.setdefault((ladder.measure, ladder.text_key), []).append(ladder)
    measures = [measure for measure, _ in groups]
    if len(measures) > len(set(measures)):
        notes.append("Ladders that were measured on different texts are in different charts.")
    figures = [ladder_figure(_distinct(ladders)) for ladders in groups.values() if ladders]
    section = Section(title="All ladders", blocks=figures, intro="Lower is better.") if figures else None
    return {"notes": notes, "section": section}


def _distinct(ladders: Sequence[Ladder]) -> list[Ladder]:
    """Ladders of one chart with different names."""
    seen: Counter[str] = Counter()
    found = []
    for ladder in ladders:
        seen[ladder.name] += 1
        again = f" ({seen[ladder.name]})" if seen[ladder.name] > 1 else ""
        found.append(replace(ladder, name=ladder.name + again))
    return found


def _named(texts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({key[:8]})" for key, name in texts.items())


def _subjects(paths: Sequence[Path], generations: Generations) -> list[Subject]:
    if not paths:
        raise UserError("There is no run to report on.", "Name one.")
    subjects, problems = list[Subject](), Problems()
    for path in paths:
        with problems:
            subjects.append(_subject(path, generations))
    problems.raise_any()
    return subjects


def _subject(path: Path, generations: Generations) -> Subject:
    if path in generations:
        return model_report.read(path, generations=generations[path])
    for known, read in _KINDS:
        if known(path):
            return read(path)
    raise UserError(
        f"{path} is no run folder of `plan` or `tailor`, no comparison, no model that intarsia has built, and not what "
        "`bench --json` printed."
        if path.exists()
        else f"There is no folder {path}.",
        "Give the folder of a run; for a healing, the model that it wrote.",
    )


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _part(name: str) -> str:
    return (files("intarsia.reporting") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _is_bench(path: Path) -> bool:
    """Whether a file has the rows of `bench --json`."""
    with suppress(OSError, ValueError):
        return path.suffix == ".json" and {"rows", "repeats", "draft"} <= _bench(path).keys()
    return False


def _bench(path: Path) -> dict[str, Any]:
    return read_json(path, expected="what `bench --json` printed", remedy="Measure again.")


def _bench_subject(path: Path) -> Subject:
    """Speed and memory of models, and of a model with a draft."""
    with damage_named(path, expected="what `bench --json` printed", remedy="Measure again."):
        found = _bench(path)
        rows = [_written({**row, "model": model_name(row["model"])}) for row in found["rows"]]
        models = list(dict.fromkeys(row["model"] for row in rows))
        sections = [Section(title="Speed and memory", blocks=[table(rows, text_columns=("model",))])]
        draft = found.get("draft") or {}
        if draft:
            cells = {"draft": model_name(str(found.get("draft_model", ""))), **_written(draft)}
            blocks = [table([cells], text_columns=("draft",))]
            sections.append(Section(title="With a draft", blocks=blocks, intro=_DRAFTED))
        rounds = f"{found['threads']} threads, medians of {found['repeats']} rounds"
        return Subject(
            path=path,
            title=f"Speed: {', '.join(models)}",
            subtitle=f"On {found['device']} in {found['dtype']}, {rounds}",
            base=("", models[0]),
            tiles=[Tile(name=title_of(name), now=text_of(name, draft[name], brief=True)) for name in _TILES if draft],
            sections=sections,
        )


def _written(row: Mapping[str, Any]) -> dict[str, str]:
    return {title_of(name): text_of(name, value) for name, value in row.items()}


_KINDS: Sequence[tuple[Callable[[Path], bool], Callable[[Path], Subject]]] = (
    (comparison_report.is_comparison, comparison_report.read),
    (is_tailor_run, tailor_report.read),
    (plan_report.is_plan_run, plan_report.read),
    (model_report.is_model_folder, model_report.read),
    (_is_bench, _bench_subject),
)
"""For each kind of folder or file: what recognises it, and what reads it."""
