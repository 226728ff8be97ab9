"""The page says what the runs say, about one run or several, finished or not, and holds nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from intarsia.cli.parse import parse
from intarsia.commands.compare import CompareEval, Entrants, compare
from intarsia.errors import UserError
from intarsia.options import TextSpec
from intarsia.pruning.ladder import Ladder, Wanted
from intarsia.reporting.blocks import Pictures, Table
from intarsia.reporting.page import report_html, write_report
from intarsia.reporting.plan_report import load_run, puzzle_sections, score_section, steps_section
from intarsia.reporting.wording import command, run_command
from tests.reporting.runs import CHANNELS, GROUPS, comparison, plan_run, row, scores

VOID = {"meta", "input", "br", "link", "img"}


class Reader(HTMLParser):
    """Text and attributes of a page, and whether its tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.stack):
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page(*paths: Path) -> tuple[str, Reader]:
    html = report_html(paths)
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.stack
    return html, reader


def test_a_plan_in_full(tmp_path: Path) -> None:
    html, reader = page(plan_run(tmp_path / "run"))
    assert html.startswith("<!doctype html>")
    for heading in ("The puzzle", "Scores of the original layers", "The ladder", "How to reproduce it"):
        assert heading in reader.text
    assert "some/model, come" in reader.text
    assert f"{math.exp(3.0):.4g}" in reader.text  # calibration perplexity of the last step
    assert "12" in reader.text and "2.0 passes of the model" in reader.text
    assert "joined from 2 (KV groups 1, channels 30) + 3 (KV groups 3, channels 10)" in reader.text
    assert "cd" * 32 in reader.text
    pictures = [each for each in reader.all("div") if each.get("class") == "picture"]
    assert [(each["data-layers"], "hidden" in each) for each in pictures] == [("5", True), ("4", False)]
    assert "Sensitivity of KV groups" in reader.text and 'fill="var(--accent)" fill-opacity="0.04"' in html


def test_the_data_of_the_picture(tmp_path: Path) -> None:
    html, _ = page(plan_run(tmp_path / "run"))
    (text,) = re.findall(r'<script type="application/json" class="data">(.*?)</script>', html, flags=re.DOTALL)
    data = json.loads(text)
    assert (data["kv"], data["channels"]) == (GROUPS, CHANNELS)
    assert data["influence"] == [0.9, 0.05, 0.02, 0.03, 0.06, 0.3]
    assert data["spans"]["2"] == 0.12
    layer = data["depths"]["5"][2]
    assert layer["span"] == [2, 4]
    assert [(part["layer"], part["kv"], part["channels"]) for part in layer["parts"]] == [
        (2, [0], 30),
        (3, [1, 2, 3], 10),
    ]
    notes = dict(layer["notes"])
    assert notes["joined"] == "in the step to 5 layers"
    assert notes["ratio by block influence"] == "0.40 : 0.60"
    assert notes["calibration loss"] == "2"
    assert data["depths"]["4"][3] == {"span": [5, 6], "parts": [{"layer": 5, "wood": 5}]}


def test_the_policy_names_the_only_style_and_script(tmp_path: Path) -> None:
    html, reader = page(plan_run(tmp_path / "run"), comparison(tmp_path / "compare", [row("come", 27, "none", 40.0)]))
    (policy,) = [each["content"] for each in reader.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    (style,) = re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    for kind, text in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_nothing_points_outside(tmp_path: Path) -> None:
    html, reader = page(plan_run(tmp_path / "run"))
    for _, attributes in reader.found:
        assert not {"src", "style", "onclick", "onload", "action"} & set(attributes)
        assert str(attributes.get("href", "#")).startswith("#")
    assert set(re.findall(r"https?://[^\"' )<]*", html)) <= {"http://www.w3.org/2000/svg"}
    anchors = {each["id"] for _, each in reader.found if "id" in each}
    assert {str(each["href"])[1:] for each in reader.all("a")} <= anchors


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
    run = plan_run(tmp_path / "run", model=evil, calibration=evil, planner={"merge": evil})
    rows = [row(evil, 27, "none", 40.0, note=evil, tasks=scores(0.5))]
    compared = comparison(tmp_path / "compare", rows, model=evil, settings={evil: evil})
    html, reader = page(run, compared)
    assert "<img" not in html
    assert len(reader.all("script")) == 2  # the picture's data and the page's own
    assert evil in " ".join(reader.texts)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    _, reader = page(plan_run(tmp_path / "none", steps=0))
    assert "This run is not finished" in reader.text and "some/model" in reader.text
    assert not reader.all("svg")
    Ladder(plan_run(tmp_path / "one", steps=1)).want(Wanted(layers=3))
    _, reader = page(tmp_path / "one")
    assert "it has reached 5 layers on the way down to 3." in reader.text
    assert reader.all("svg")
    Ladder(plan_run(tmp_path / "stopped")).want(Wanted(layers=2, stopped="nothing is left to merge"))
    _, reader = page(tmp_path / "stopped")
    assert "on the way down to 2 and stopped: nothing is left to merge." in reader.text
    with (tmp_path / "one" / "log.jsonl").open("a") as file:
        file.write('{"layers": 4, "mer')
    assert "it has reached 5 layers on the way down to 3." in page(tmp_path / "one")[1].text


def test_an_unfinished_comparison_says_what_is_to_come(tmp_path: Path) -> None:
    asked = {"methods": ["come", "sleb"], "layers": [27], "heal": ["none"]}
    _, reader = page(comparison(tmp_path / "run", [row("come", 27, "none", 40.0)], asked=asked))
    assert "Models not measured yet: 1 (sleb at 27)" in reader.text
    _, reader = page(comparison(tmp_path / "empty", []))
    assert "no model has been measured yet" in reader.text


def test_a_comparison_in_full(tmp_path: Path) -> None:
    rows = [
        row("dense", 30, "none", 29.5, tasks=scores(0.7)),
        row("come", 27, "none", 50.0, tasks=scores(0.5), speed={"decode_tokens_per_s": 20.0}),
        row("sleb", 27, "none", 60.0),
    ]
    _, reader = page(comparison(tmp_path / "run", rows))
    assert "best at 27 layers 50 come" in reader.text
    assert "accuracy, piqa against layers" in reader.texts and "come, 27 layers: 0.5" in reader.texts
    assert "90.0% (80.0% to 95.0%)" in reader.text and "70.0%" in reader.text
    assert "chance" in reader.texts and "60.0 ± 6" in reader.text


def test_a_comparison_shows_its_recipes_and_no_file_outside(tmp_path: Path) -> None:
    run = plan_run(tmp_path / "compare" / "plans" / "come")
    inside, outside = "plans/come/ladder/layers-004.yaml", "../elsewhere/layers-004.yaml"
    for name, recipe, count in (("in", inside, 1), ("out", outside, 0)):
        rows = [row("come", 4, "none", 40.0, recipe=recipe)]
        path = comparison(tmp_path / name, rows)
        plan_run(path / "plans" / "come")
        plan_run(tmp_path / "elsewhere") if not (tmp_path / "elsewhere").exists() else None
        _, reader = page(path)
        assert reader.text.count("The puzzle of each method at 4 layers") == 2 * count  # in the list of sections too
    assert run.exists()


def test_runs_on_one_text_share_a_chart(tmp_path: Path) -> None:
    _, reader = page(plan_run(tmp_path / "a"), plan_run(tmp_path / "b", method="come-p"))
    assert "2 runs" in reader.text and "All ladders" in reader.text
    assert "different" not in reader.text
    titles = [text for text in reader.texts if text == "calibration perplexity by depth"]
    assert len(titles) == 1 + 2  # together, and each on its own


def test_runs_on_different_texts_stand_apart(tmp_path: Path) -> None:
    _, reader = page(plan_run(tmp_path / "a"), plan_run(tmp_path / "b", text="99" * 32))
    assert "Ladders measured on different texts are in different charts." in reader.text
    assert reader.texts.count("calibration perplexity by depth") == 2 + 2
    other = {"name": "speeches", "spec": "s.txt", "sha256": "77" * 32}
    first = comparison(tmp_path / "c", [row("come", 27, "none", 40.0)])
    second = comparison(tmp_path / "d", [row("come", 27, "none", 40.0)], eval_texts=[other])
    _, reader = page(first, second)
    assert "These runs were evaluated on different texts" in reader.text
    assert "news (efefefef)" in reader.text and "speeches (77777777)" in reader.text


def test_runs_of_different_models_are_distinguished(tmp_path: Path) -> None:
    _, reader = page(plan_run(tmp_path / "a"), plan_run(tmp_path / "b", model="other/model", sha256="12" * 32))
    assert "These runs started from different models: some/model (abababab), other/model (12121212)." in reader.text


def test_what_is_no_run_is_refused_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as raised:
        write_report([tmp_path / "empty", tmp_path / "gone", plan_run(tmp_path / "run")], tmp_path / "r.html")
    for problem, path in zip(raised.value.problems, ("empty", "gone"), strict=True):
        assert str(tmp_path / path) in problem.message
    assert not (tmp_path / "r.html").exists()


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    write_report([plan_run(tmp_path / "run")], tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == report_html([tmp_path / "run"])
    assert {path.name for path in tmp_path.iterdir()} == {"run", "r.html"}


def test_pieces_of_a_mixture_are_called_experts(tmp_path: Path) -> None:
    """A plan's recipes say so; without that they are channels."""
    run = load_run(plan_run(tmp_path / "run"))
    mixture = replace(
        run,
        recipes={
            layers: replace(recipe, provenance={**recipe.provenance, "mlp_pieces": "experts"})
            for layers, recipe in run.recipes.items()
        },
    )
    for found, name, other in ((run, "channels", "experts"), (mixture, "experts", "channels")):
        sections = [*puzzle_sections(found), score_section(found), steps_section(found)]
        text = str(replace(sections[0], blocks=[block for block in sections[0].blocks if isinstance(block, Table)]))
        text += str(sections[1:])
        assert f"{name} 30" in text and other not in text
        board = next(block for block in sections[0].blocks if isinstance(block, Pictures))
        assert board.data["mlp"] == name
        assert f"30 of 40 {name}" in board.pictures[5]


def test_commands_name_what_is_not_the_default() -> None:
    settings = {
        "model": "a model",
        "method": "come-p",
        "calibration": "x.txt,y.txt",
        "tokens": TextSpec().tokens,
        "seq_len": 256,
        "seed": 0,
        "planner": {"merge": 3, "racing": False, "no_repeat": True, "norm": "fold", "dominance": None},
    }
    assert run_command("plan", settings, "--run", "run", "--layers", "25") == (
        "intarsia plan 'a model' --run run --layers 25 --method come-p --calibration x.txt,y.txt --seq-len 256 "
        "--merge 3 --no-repeat --no-racing"
    )
    laco = {"model": "m", "method": "laco", "planner": {"merge": 2, "threshold": 0.65}}
    assert run_command("compress", laco, "-o", "o", "--layers", "24", "--heal", "none") == (
        "intarsia compress m -o o --layers 24 --heal none --method laco --laco-merge 2"
    )


def test_the_command_of_a_comparison(tmp_path: Path) -> None:
    given = (
        Entrants(methods=("come", "come-p[spans=1]"), layers=(4, 5), heal=("none", "closed-form")),
        CompareEval(
            text=("wiki=w.txt", "news.txt#0.9:1"), windows=(64, 16), tasks=("piqa",), task_layers=(4,), speed=True
        ),
        TextSpec(sources=("a b.txt", "c.txt"), tokens=4096),
    )
    wanted = (
        "intarsia compare some/model -o out --methods come --methods 'come-p[spans=1]' --layers 5,4 --heal none "
        "--heal closed-form --eval-text 'wiki=w.txt,news.txt#0.9:1' --eval-windows 64,16 --tasks piqa --task-layers 4 "
        "--speed --calibration 'a b.txt,c.txt' --tokens 4096"
    )
    assert command("compare", "some/model", "-o", "out", given=given) == wanted
    call = parse(compare, "compare", shlex.split(wanted)[2:])
    assert (call.arguments["entrants"], call.arguments["evaluation"], call.arguments["text"]) == given
    folder = comparison(tmp_path / "out", [row("come", 5, "none", 40.0)], command=wanted)
    _, reader = page(folder)
    assert wanted in reader.text
