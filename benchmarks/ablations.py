"""What each part of CoMe contributes: the paper's ablations, and those of this project's changes.

Calibration: equal parts of WikiText-2 (validation), news without its last tenth, and speeches. Evaluation: windows of
512 tokens of WikiText-2 (test), and of that last tenth of the news. Healed rows are fitted lightly: on unchanged layers
only down_proj, without o_proj as in `intarsia compress` and `compare`. It is one `intarsia compare`, so a stopped
benchmark resumes. Prints the table, and with --docs writes it into the page between its marks (the page is made where
there is none).

    python -m benchmarks ablations --data ../shared/data -o out/bench/ablations --docs docs/ABLATIONS.md
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import intarsia
from intarsia import progress
from intarsia.commands.compare import CompareEval, Entrants
from intarsia.options import TextSpec
from intarsia.reporting.comparison import DENSE, Comparison, Row, load

HEALS = {"none": "none", "closed-form": "closed-form[fit_unchanged=mlp,fit_held_out=8]"}
"""The second takes half of the time that the default does."""
BASE = "come"
ABLATIONS: Mapping[str, str] = {
    "come": "the default: joined pieces, shares by block influence, norms folded",
    "come[combine=weight-sum]": "whole layers are summed, weighted by share",
    "come[combine=fuse]": "discarded pieces are added to the most similar kept ones",
    "come[sharpness=0.5]": "shares by the square root of block influence",
    "come[sharpness=2]": "shares by the square of block influence",
    "come[dominance=0.8]": "the strongest layer has at least 0.8^(1/(n-1)) of the pieces",
    "come[span_choice=sleb]": "merges where skipping costs least, not where influence is least",
    "come[norm=average]": "norms averaged by share, as published",
    "come-p": "shares by calibration loss, tried on three spans",
    "come-p[spans=1]": "shares by calibration loss, on one span, as published",
}
_BEGIN, _END = "<!-- ablations -->", "<!-- /ablations -->"
_PAGE = f"""# Ablations

The effect of each part of CoMe on SmolLM2-135M-Instruct (30 layers): perplexity of WikiText-2 (test) / held-out news,
pruned and, in columns marked as healed, healed in closed form. In brackets: the change of log-perplexity against
`{BASE}` in the same column; negative is better.

{_BEGIN}
{_END}
"""


def main() -> None:
    """Compare, print, and write the page."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("-o", "--out", type=Path, default=Path("out/bench/ablations"))
    options.add_argument("--model", default="demo")
    options.add_argument("--layers", type=int, nargs="+", default=[27, 23])
    options.add_argument("--heal", nargs="+", default=list(HEALS), choices=list(HEALS))
    options.add_argument("--tokens", type=int, default=65536)
    options.add_argument("--eval-windows", type=int, nargs=2, default=[64, 16], metavar=("WIKITEXT", "NEWS"))
    options.add_argument("--methods", nargs="+", default=list(ABLATIONS))
    options.add_argument("--docs", type=Path)
    given = options.parse_args()
    found = compared(given)
    text = table(found, given.methods, given.layers, [heal for heal in HEALS if heal in given.heal])
    print(f"\n{text}")
    if given.docs is not None:
        page = given.docs.read_text(encoding="utf-8") if given.docs.exists() else _PAGE
        before, _, rest = page.partition(_BEGIN)
        _, _, after = rest.partition(_END)
        given.docs.write_text(f"{before}{_BEGIN}\n{text}{_END}{after}", encoding="utf-8")


def compared(given: argparse.Namespace) -> Comparison:
    """The comparison on the project's texts."""
    text = given.data / "text"
    sources = (
        str(text / "wikitext2.valid.txt"),
        f"{text / 'abc_news.txt'}#0:0.9",
        str(text / "state_union.txt"),
    )
    heal = tuple(HEALS[name] for name in given.heal)
    entrants = Entrants(methods=tuple(given.methods), layers=tuple(given.layers), heal=heal)
    texts = (f"WikiText-2={text / 'wikitext2.test.raw.txt'}", f"news={text / 'abc_news.txt'}#0.9:1")
    evaluation = CompareEval(text=texts, windows=tuple(given.eval_windows))
    with progress.shown():
        intarsia.compare(
            given.model, given.out, entrants, evaluation, text=TextSpec(sources=sources, tokens=given.tokens)
        )
    return load(given.out)


def table(found: Comparison, methods: Sequence[str], layers: Sequence[int], heals: Sequence[str]) -> str:
    """A row a method, a column a depth and heal."""
    rows = {row.key: row for row in found.rows}
    dense = next(row for row in found.rows if row.method == DENSE)
    columns = [(depth, heal) for depth in layers for heal in heals]
    heads = [f"{depth}" + ("" if heal == "none" else ", healed") for depth, heal in columns]
    said = ", ".join(
        f"{text['windows']} windows of {text['seq_len']} tokens of {text['name']}" for text in found.eval_texts
    )
    whole = " / ".join(f"{dense.perplexity[text]['value']:.1f}" for text in found.texts)
    lines = [
        f"Calibration: {found.settings['tokens']:,} tokens. Evaluation: {said}. Dense: {whole}.",
        "",
        "| method | difference | " + " | ".join(heads) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for method in methods:
        cells = [
            _cell(rows.get((method, depth, HEALS[heal])), rows.get((BASE, depth, HEALS[heal])), found.texts)
            for depth, heal in columns
        ]
        lines.append(f"| `{method}` | {ABLATIONS.get(method, '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None, base: Row | None, texts: Sequence[str]) -> str:
    if row is None or not row.perplexity:
        return "—"
    values = " / ".join(f"{row.perplexity[text]['value']:.1f}" for text in texts)
    if base is None or row.method == BASE or not base.perplexity:
        return values
    changes = " / ".join(f"{row.perplexity[text]['nll'] - base.perplexity[text]['nll']:+.3f}" for text in texts)
    return f"{values} ({changes})"


if __name__ == "__main__":
    main()
