"""One HTML file that tells of one run or several. It opens anywhere, and asks for nothing outside itself.

Style and script stand in the file; a content security policy allows these two by their hashes and refuses everything
else, requests included. Everything that comes from a run is escaped by the template.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, select_autoescape
from markupsafe import Markup

from intarsia.disk import write_whole
from intarsia.errors import Problem, UserError
from intarsia.reporting import compare_run, model_folder, plan_folder, plan_run, tailor_run
from intarsia.reporting.blocks import Ladder, Section, Subject, Written
from intarsia.reporting.chart import style as chart_style
from intarsia.reporting.plan_ladder import ladder_figure

Generations = Mapping[Path, Sequence[Written]]

_KINDS: Sequence[tuple[Callable[[Path], bool], Callable[[Path], Subject]]] = (
    (compare_run.is_comparison, compare_run.read),
    (tailor_run.is_tailor_run, tailor_run.read),
    (plan_folder.is_plan_run, plan_run.read),
    (model_folder.is_model_folder, model_folder.read),
)
"""What can be reported on: how a folder of that kind is known, and what reads it. A further kind is a further line."""


def write_report(paths: Sequence[Path], out: Path, *, generations: Generations | None = None) -> None:
    """Write the report of some runs; the file is there whole or as it was before.

    Args:
        paths: run folders of `plan` and `tailor`, comparisons, and model folders that intarsia has built.
        generations: what models wrote, by the path of their folder.

    Raises:
        UserError: something is none of these, or damaged; every such problem at once. Nothing has been written then.
    """
    text = report_html([*paths], generations=generations)
    if not out.parent.is_dir():
        raise UserError.of(
            where=str(out), expected="a file in a folder that exists", found="no such folder", remedy="Make it first."
        )
    write_whole(out, text)


def report_html(paths: Sequence[Path], *, generations: Generations | None = None) -> str:
    """The report as text.

    Raises:
        UserError: as `write_report`.
    """
    return render(_subjects(paths, generations or {}))


def render(subjects: Sequence[Subject]) -> str:
    """The page about some subjects."""
    style, script = _part("page.css") + chart_style(), _part("page.js")
    environment = Environment(
        autoescape=select_autoescape(default=True), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["picture"] = Markup
    text: str = environment.from_string(_part("page.html")).render(
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
        made_with=_version(),
    )
    return text.lstrip()


def together(subjects: Sequence[Subject]) -> dict[str, Any]:
    """What several runs have to say about each other: notes on what differs, and ladders that may share a chart."""
    if len(subjects) < 2:
        return {"notes": [], "section": None}
    notes = []
    bases = {subject.base[0]: subject.base[1] for subject in subjects if subject.base[0]}
    if len(bases) > 1:
        notes.append(
            f"These runs began with different models: {', '.join(f'{n} ({k[:8]})' for k, n in bases.items())}."
        )
    judged = [subject for subject in subjects if subject.texts]
    if len({frozenset(subject.texts) for subject in judged}) > 1:
        each = "; ".join(f"{subject.title}: {_named(subject.texts)}" for subject in judged)
        notes.append(
            "These runs were judged on different texts, so their perplexities cannot be compared and are shown apart. "
            f"{each}."
        )
    groups: dict[tuple[str, str], list[Ladder]] = {}
    for subject in subjects:
        for ladder in subject.ladders:
            groups.setdefault((ladder.measure, ladder.text_key), []).append(ladder)
    measures = [measure for measure, _ in groups]
    if len(measures) > len(set(measures)):
        notes.append("Ladders that were measured on different texts stand in different charts.")
    figures = [ladder_figure(_distinct(ladders)) for ladders in groups.values() if ladders]
    section = Section(title="All ladders", blocks=figures, intro="Lower is better.") if figures else None
    return {"notes": notes, "section": section}


def _distinct(ladders: Sequence[Ladder]) -> list[Ladder]:
    """Ladders of one chart need names of their own."""
    seen: dict[str, int] = {}
    found = []
    for ladder in ladders:
        seen[ladder.name] = seen.get(ladder.name, 0) + 1
        number = seen[ladder.name]
        name = ladder.name if number == 1 else f"{ladder.name} ({number})"
        found.append(
            Ladder(
                name=name,
                measure=ladder.measure,
                text=ladder.text,
                text_key=ladder.text_key,
                points=ladder.points,
            )
        )
    return found


def _named(texts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({key[:8]})" for key, name in texts.items())


def _subjects(paths: Sequence[Path], generations: Generations) -> list[Subject]:
    if not paths:
        raise UserError.of(where="report", expected="at least one run", found="none", remedy="Name one.")
    subjects: list[Subject] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            subjects.append(_subject(path, generations))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return subjects


def _subject(path: Path, generations: Generations) -> Subject:
    if path in generations:
        return model_folder.read(path, generations=generations[path])
    for known, read in _KINDS:
        if known(path):
            return read(path)
    raise UserError.of(
        where=str(path),
        expected="a run folder of `intarsia plan` or `tailor`, a comparison, or a model that intarsia has built",
        found="no such folder" if not path.exists() else "something else",
        remedy="Give the folder of a run; of a healing, the model that came out of it.",
    )


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _part(name: str) -> str:
    return (files("intarsia.reporting") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _version() -> str:
    try:
        return f"Intarsia {version('intarsia')}"
    except PackageNotFoundError:
        return "Intarsia"
