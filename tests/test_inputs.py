"""No verb writes to what it reads, inside it or around it, by whatever name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

import intarsia
from intarsia.checkpoint.resolve import inputs_of
from intarsia.commands.compare import CompareEval, Entrants
from intarsia.commands.tailor import SearchOptions
from intarsia.disk import check_out
from intarsia.errors import UserError
from intarsia.options import ModelRef, NewModel, TextSpec
from intarsia.recipe import schema
from tests.conftest import Folder
from tests.recipes_by_hand import recipe_of, select


def state(folder: Path) -> dict[str, str]:
    return {str(file): sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def place(model_folder: Folder, tmp_path: Path) -> Path:
    """A folder with all kinds of inputs."""
    folder = tmp_path / "place"
    shutil.copytree(model_folder("llama"), folder / "models" / "llama")
    (folder / "link").symlink_to(folder / "models" / "llama")
    (folder / "recipes").mkdir()
    schema.save(recipe_of(str(folder / "models" / "llama"), [select(0), select(5)]), folder / "recipes" / "r.yaml")
    intarsia.build(folder / "recipes" / "r.yaml", folder / "built")
    for name in ("text.txt", "more.txt", "quiz.jsonl"):
        (folder / name).write_text("roti")
    (folder / "family").mkdir()
    (folder / "earlier").mkdir()
    (folder / "family" / "run.yaml").write_text(
        f"{{base: {folder / 'models' / 'llama'}, variants: {{other: {folder / 'link'}}}, target: {{layers: 4}}, "
        f"objectives: [{{name: text, loss: {folder / 'text.txt'}}}], search: {{warm_start: [{folder / 'earlier'}]}}}}"
    )
    return folder


OUTS = ("models/llama", "models/llama/new", "models", "link", "link/new", "models/../models/llama", "link/../llama")


def over(out: Path) -> NewModel:
    return NewModel(path=out, overwrite=True)


CALLS: dict[str, tuple[tuple[str, ...], Callable[[Path, Path], object]]] = {
    # A model's folder, and the recipe's own.
    "build": ((*OUTS, "recipes", "."), lambda place, out: intarsia.build(place / "recipes" / "r.yaml", over(out))),
    "rebuild": (("built",), lambda place, out: intarsia.build(place / "built" / "recipe" / "recipe.yaml", over(out))),
    "export": (
        (*OUTS, "models/llama/model.safetensors", "link/m.gguf"),
        lambda place, out: intarsia.export(place / "link", out, overwrite=True),
    ),
    "report": (
        ("built", "built/report.html", "built/config.json", "built/../built/r.html"),
        lambda place, out: intarsia.report(place / "built", out=out, overwrite=True),
    ),
    "report --generate": (
        ("models/llama/config.json", "link/r.html"),
        lambda place, out: intarsia.report(place / "built", out=out, overwrite=True, generate=True),
    ),
    "tailor": (
        (*OUTS, "text.txt", "text.txt/run", "family", "family/run.yaml/run", "earlier", "earlier/run", "."),
        lambda place, out: intarsia.tailor(place / "family" / "run.yaml", out, search=SearchOptions(dry_run=True)),
    ),
    "tailor --calibration": (
        ("more.txt", "more.txt/run"),
        lambda place, out: intarsia.tailor(
            place / "family" / "run.yaml",
            out,
            search=SearchOptions(calibration=(f"{place / 'more.txt'}#0:0.5",), dry_run=True),
        ),
    ),
    "compare": (
        (*OUTS, "text.txt", "quiz.jsonl", "more.txt/out", "family", "."),
        lambda place, out: intarsia.compare(
            str(place / "link"),
            out,
            Entrants(methods=("shortgpt",), layers=(4,)),
            CompareEval(
                text=(f"name={place / 'text.txt'}#0:0.5",),
                tasks=(f"{place / 'quiz.jsonl'}",),
                include_path=place / "family",
            ),
            text=TextSpec(sources=(str(place / "more.txt"),)),
        ),
    ),
    # What heal and compress ask.
    "any": (
        (*OUTS, "built", "text.txt", "text.txt/out", "."),
        lambda place, out: check_out(
            out,
            overwrite=True,
            sign="anything",
            inputs=inputs_of(
                models=[ModelRef(model=str(place / "link")), place / "built", "demo", "org/name"],
                texts=["self", f"name={place / 'text.txt'}#0:0.5", "hub:a:b:c"],
            ),
        ),
    ),
}


@pytest.mark.parametrize(("verb", "out"), [(verb, out) for verb, (outs, _) in CALLS.items() for out in outs])
def test_an_input_is_no_output(verb: str, out: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(place)
    for where in (place / out, Path(out)):
        monkeypatch.chdir(place)
        with pytest.raises(UserError) as caught:
            CALLS[verb][1](place, where)
        messages = [problem.message for problem in caught.value.problems]
        assert any(words in messages[0] for words in ("lies in the input", "does not delete it", "no output folder"))
    assert state(place) == before


def test_other_names_of_the_same_text(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    Path("a=b#c.txt").write_text("roti")
    for text in ("text.txt", "text.txt#0:0.9", "n=text.txt", "n=text.txt#0.9:1", "a=b#c.txt", "n=a=b#c.txt#0:1"):
        assert inputs_of(texts=[text]), text
    assert inputs_of(texts=["self", "hub:a/b:train:text"], models=["demo", "org/name"]) == []


def test_places_beside_inputs_are_free(place: Path) -> None:
    inputs = inputs_of(models=[place / "models" / "llama"], texts=[str(place / "text.txt")])
    for out in ("models/other", "new", "recipes/out", "text"):
        check_out(place / out, inputs=inputs)  # raises nothing
