"""Part `table`: what is there, as Markdown and as figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

from benchmarks.tailor_parts import curves
from benchmarks.tailor_parts.curves import Curve
from benchmarks.tailor_parts.scorer import TASKS, TEXTS, kept, mean
from benchmarks.tailor_parts.searches import CURVES, ENGINES, folder_of, is_finished
from benchmarks.tailor_parts.setting import ABLATION, VARIANTS, Rows, Setting
from benchmarks.tailor_parts.sharing import sharing_of
from intarsia.tailoring.family_file import BASE
from intarsia.tailoring.run import TailorRun


def write(setting: Setting, rows: Rows) -> None:
    """Print the tables, and write them with the curves into the folder."""
    parts = []
    if BASE in rows:
        parts += [_models(rows), _ablation(rows)]
    found = _curves(setting)
    if found:
        curves.write(setting.out, found)
        parts.append(_engines(setting, found))
        parts.append(_sharing(setting))
    text = "\n\n".join(part for part in parts if part)
    (setting.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def _models(rows: Rows) -> str:
    everything, base = rows.all(), rows[BASE]
    wholes = [BASE, *VARIANTS]
    names = [name for name in everything if name not in wholes]
    names.sort(key=lambda name: -mean(everything[name], base))
    lines = [
        "Accuracy (arc_easy, piqa) and perplexity; all but the members are healed in closed form.",
        "The mean is of the shares that are kept of the base's.",
        "",
        f"| model | {' | '.join((*TASKS, *TEXTS))} | mean |",
        "|---|" + "---:|" * (len(TASKS) + len(TEXTS) + 1),
    ]
    for name in [*(whole for whole in wholes if whole in everything), *names]:
        row = everything[name]
        cells = [f"{row[task]:.1%}" for task in TASKS] + [f"{row[text]:.2f}" for text in TEXTS]
        lines.append(f"| {name} | {' | '.join(cells)} | {mean(row, base):.3f} |")
    return "\n".join(lines)


def _ablation(rows: Rows) -> str:
    """The mean over seeds, with the standard deviation between them."""
    everything, base = rows.all(), rows[BASE]
    lines = []
    for operations in ABLATION:
        found = [row for name, row in everything.items() if name.rsplit("-", 2)[0] == operations]
        if found:
            means = [mean(row, base) for row in found]
            shares = [f"{statistics.mean(each):.3f}" for each in _columns([kept(row, base) for row in found])]
            lines.append(
                f"| {', '.join(ABLATION[operations])} | {len(found)} | {' | '.join(shares)} | {_spread(means)} |"
            )
    if not lines:
        return ""
    head = f"| operations | seeds | {' | '.join((*TASKS, *TEXTS))} | mean |"
    return "\n".join(["Shares that are kept:", "", head, "|---|---:|" + "---:|" * 6, *lines])


def _columns(shares: Iterable[Mapping[str, float]]) -> list[list[float]]:
    every = list(shares)
    return [[row[name] for row in every] for name in (*TASKS, *TEXTS)]


def _curves(setting: Setting) -> dict[str, dict[int, Curve]]:
    """Of every engine's finished searches with all operations, by seed."""
    found: dict[str, dict[int, Curve]] = {}
    for engine in ENGINES:
        for folder in sorted((setting.out / "searches").glob(f"{CURVES}-{engine}-*")):
            if is_finished(setting, folder.name):
                search = TailorRun.existing(folder_of(setting, folder.name))
                settings = search.settings
                base = [settings["base"][entry["name"]] for entry in settings["objectives"]]
                trials = search.made[: setting.trials]
                curve = curves.curve_of(trials, base, max(settings["budgets"]))
                found.setdefault(engine, {})[int(folder.name.rpartition("-")[2])] = curve
    return found


def _engines(setting: Setting, found: Mapping[str, Mapping[int, Curve]]) -> str:
    lines = ["| engine | seeds | least scalarised excess | dominated volume |", "|---|---:|---:|---:|"]
    for engine, seeds in found.items():
        best = [curve.best[-1] for curve in seeds.values() if curve.best[-1] is not None]
        volume = [curve.volume[-1] for curve in seeds.values() if curve.volume[-1] is not None]
        lines.append(f"| {engine} | {len(seeds)} | {_spread(best)} | {_spread(volume)} |")
    return f"Engines, after {setting.trials} trials; figures in {setting.out}.\n\n" + "\n".join(lines)


def _sharing(setting: Setting) -> str:
    lines = ["| search | layers run | least with a cache without bounds | seconds a trial |", "|---|---:|---:|---:|"]
    for folder in sorted((setting.out / "searches").glob("*")):
        if is_finished(setting, folder.name):
            search = TailorRun.existing(folder)
            made = search.made
            found = sharing_of(made, search.settings["budgets"])
            seconds = sum(trial.seconds for trial in made) / len(made)
            shares = f"{found.run / found.whole:.0%} | {found.least / found.whole:.0%}"
            lines.append(f"| {folder.name} | {shares} | {seconds:.1f} |")
    return "Layers that trials had to run, as a share of all layers on all examples:\n\n" + "\n".join(lines)


def _spread(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.3f}{spread}"
