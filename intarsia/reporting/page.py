"""One HTML file about one run or several. It opens anywhere, and requests nothing outside itself.

Style and script are in the file; a content security policy allows these two by their hashes and refuses everything
else, requests included. Templates escape everything that comes from a run.
"""

from __future__ import annotations

import base64
import hashlib
import re
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
from intarsia.reporting.blocks import Figure, Measured, Section, Subject, Table, Tile, Written
from intarsia.reporting.figures import variables
from intarsia.reporting.plan_report import ladder_figure
from intarsia.reporting.wording import model_name, text_of, texts_of, title_of
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
    write_whole(out, report_html([*paths], generations=generations))


def report_html(paths: Sequence[Path], *, generations: Generations | None = None) -> str:
    """The report as text.

    Raises:
        UserError: as `write_report`.
    """
    subjects, problems = list[Subject](), Problems()
    for path in paths:
        with problems:
            subjects.append(_subject(path, generations or {}))
    problems.raise_any()
    return render(subjects)


def render(subjects: Sequence[Subject]) -> str:
    """The page about some subjects."""
    templates = files("intarsia.reporting") / "templates"
    style, script = ((templates / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    style = variables() + style
    environment = Environment(
        loader=PackageLoader("intarsia.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["anchor"] = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return environment.get_template("page.html.j2").render(
        title=subjects[0].title if len(subjects) == 1 else f"{len(subjects)} runs",
        subjects=subjects,
        notes=differences(subjects),
        ladders=all_ladders(subjects) if len(subjects) > 1 else (),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'",
        made_with=f"Intarsia {__version__}",
    )


def differences(subjects: Sequence[Subject]) -> list[str]:
    """What a reader of several runs must know before comparing them."""
    notes = []
    bases = {subject.base[0]: subject.base[1] for subject in subjects if subject.base[0]}
    if len(bases) > 1:
        notes.append(f"These runs started from different models: {_hashed(bases)}.")
    evaluated = [subject for subject in subjects if subject.texts]
    if len({frozenset(subject.texts) for subject in evaluated}) > 1:
        each = "; ".join(f"{subject.title}: {_hashed(subject.texts)}" for subject in evaluated)
        notes.append(
            "These runs were evaluated on different texts, so their perplexities cannot be compared and are shown "
            f"apart. {each}."
        )
    texts = {(ladder.measure, ladder.text_key) for subject in subjects for ladder in subject.ladders}
    if len(texts) > len({measure for measure, _ in texts}):
        notes.append("Ladders that were measured on different texts are in different charts.")
    return notes


def all_ladders(subjects: Sequence[Subject]) -> list[Figure]:
    """The ladders of all runs; those with one measure, on one text, share a chart."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for ladder in (ladder for subject in subjects for ladder in subject.ladders):
        group = groups.setdefault((ladder.measure, ladder.text_key), [])
        again = sum(other.name.partition(" (")[0] == ladder.name for other in group)
        group.append(replace(ladder, name=f"{ladder.name} ({again + 1})") if again else ladder)
    return [ladder_figure(group) for group in groups.values()]


def _hashed(names: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({key[:8]})" for key, name in names.items())


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
        measured = [{**row, "model": model_name(row["model"])} for row in found["rows"]]
        models = list(dict.fromkeys(str(row["model"]) for row in measured))
        sections = [Section(title="Speed and memory", blocks=[Table(rows=texts_of(measured), words=("model",))])]
        if draft := found.get("draft") or {}:
            rows = texts_of([{"draft": model_name(str(found.get("draft_model", ""))), **draft}])
            sections.append(Section(title="With a draft", blocks=[Table(rows=rows, words=("draft",))], intro=_DRAFTED))
        rounds = f"{found['threads']} threads, medians of {found['repeats']} rounds"
        return Subject(
            title=f"Speed: {', '.join(models)}",
            subtitle=f"On {found['device']} in {found['dtype']}, {rounds}",
            base=("", models[0]),
            tiles=[Tile(name=title_of(name), now=text_of(name, draft[name], brief=True)) for name in _TILES if draft],
            sections=sections,
        )


_KINDS: Sequence[tuple[Callable[[Path], bool], Callable[[Path], Subject]]] = (
    (comparison_report.is_comparison, comparison_report.read),
    (is_tailor_run, tailor_report.read),
    (plan_report.is_plan_run, plan_report.read),
    (model_report.is_model_folder, model_report.read),
    (_is_bench, _bench_subject),
)
"""For each kind of folder or file: what recognises it, and what reads it."""
