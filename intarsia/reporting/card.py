"""The model card: README.md of a built model, as text.

`model_card` is a pure function of the known facts about the model. It reads these keys (all except `before` and `after`
may be missing; others are ignored):

    title           name of the new model (the output folder's)
    model           the original model: a hub id, a folder, or `demo`
    revision        of a hub id
    base_model      hub id of the original, if known, for the front matter
    family          title of the model family
    picture         file name of a picture beside the card
    method          name of the planner
    before, after   mappings of the same measures (layers, parameters, bytes, perplexity, ..._per_s ...), a measure
                    being a number or a mapping with `value` and `stderr`
    calibration     a description, or a mapping of settings
    evaluation      the same
    warning         a sentence, if perplexity is good and the answers are not
    settings        mapping of the planner's settings
    heal            mapping of facts about the healing, `stages` first; None without healing
    approximations  sentences about what is not exact in this family
    recipe_sha256   content hash of the recipe
    versions        mapping of package to version
    source_card     text of the original's own README.md, for its licence and languages
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from intarsia.reporting.wording import rows_of, text_of, title_of

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAPER = "https://arxiv.org/abs/2510.15304"
_JOINED = (
    "Layers were not only dropped: the most sensitive pieces of adjacent layers were joined into one layer of the "
    "usual shape"
)
_COMBINED = {
    "weight-sum": "Layers were not only dropped: adjacent layers were added up into one, each weighted by its share",
    "fuse": f"{_JOINED}; the other pieces were added onto the most similar ones",
}


def model_card(results: Mapping[str, Any]) -> str:
    """The text of README.md for a built model; the module's docstring lists the keys of `results`."""
    before, after = results.get("before", {}), results.get("after", {})
    heal, recipe = results.get("heal"), results.get("recipe_sha256")
    combine = (results.get("settings") or {}).get("combine")
    facts = {
        "Calibration": _described(results.get("calibration")),
        "Settings": _described(results.get("settings")),
        "Healing": _described(heal),
        "Recipe": f"`{_code(recipe)}` (SHA-256 of its content)" if recipe else "",
        "Versions": _described(results.get("versions")),
    }
    # Everything below is Markdown, and the filters escape text for it.
    environment = Environment(
        loader=PackageLoader("intarsia.reporting"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {"line": _line, "code": _code, "cell": lambda text: _line(text).replace("|", "\\|")}
    return environment.get_template("card.md.j2").render(
        front_matter=_front_matter(results),
        title=results.get("title", "A shallower model"),
        source=_source(results),
        before={"layers": None, **before},
        after={"layers": None, **after},
        method=results.get("method"),
        is_come=str(results.get("method", "")).startswith("come") and results.get("merged", True),
        joined=_COMBINED.get(str(combine), _JOINED),
        paper=PAPER,
        heal=heal,
        trained=any(stage != "closed-form" for stage in (heal or {}).get("stages", ())),
        family=results.get("family"),
        picture=results.get("picture"),
        measures=[(row[""], row["before"], row["after"]) for row in rows_of(before, after)],
        evaluation=_described(results.get("evaluation")),
        facts=[(name, text) for name, text in facts.items() if text],
        warning=results.get("warning"),
        approximations=results.get("approximations", ()),
    )


def _front_matter(results: Mapping[str, Any]) -> str:
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = _base_model(results)
    if base:
        fields["base_model"] = base
    fields["tags"] = ["intarsia", "depth-pruning", "model-compression"]
    fields |= inherited(results.get("source_card"))
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip()


def _base_model(results: Mapping[str, Any]) -> str | None:
    """The hub id of the original, if any; a local path is of no use to others."""
    return results.get("base_model") or (DEMO_MODEL if results.get("model") == "demo" else None)


def _source(results: Mapping[str, Any]) -> str:
    model = str(results.get("model", ""))
    base = _base_model(results)
    if base is None:
        folder = re.split(r"[\\/]", model.rstrip("\\/"))[-1]
        return f"`{_code(folder)}`" if folder else "another model"
    revision = results.get("revision")
    pinned = f" (revision `{_code(revision)}`)" if revision else ""
    return f"[{_line(base)}](https://huggingface.co/{_line(base)}){pinned}"


def _described(value: Any) -> str:
    """A description unchanged, a mapping as `name value, name value`."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{title_of(key)} `{_code(text_of(key, part))}`" for key, part in value.items() if part is not None
        )
    return _line(value) if value else ""


def _line(text: Any) -> str:
    """Text on one line, escaped against HTML."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")


def _code(text: Any) -> str:
    """Text for use inside backticks."""
    return " ".join(str(text).replace("`", "'").split())


def inherited(card: str | None) -> dict[str, Any]:
    """Licence and languages from the front matter of another model's card; empty without any."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card or "", flags=re.DOTALL)
    fields: Any = None
    if found is not None and len(found[1]) <= 64 * 1024:
        with suppress(yaml.YAMLError, ValueError, RecursionError):
            fields = yaml.safe_load(found[1])
    wanted = ("license", "license_name", "license_link", "language")
    known = {key: fields.get(key) for key in wanted} if isinstance(fields, dict) else {}

    def texts(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value]

    return {
        key: value
        for key, value in known.items()
        if texts(value) and all(isinstance(text, str) and text.strip() for text in texts(value))
    }
