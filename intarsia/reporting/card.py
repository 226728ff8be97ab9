"""The model card: README.md of a built model, as text.

`model_card` is a pure function of what is known about the model, and leaves out the rest. It reads these keys (all but
`before` and `after` may be missing; others are ignored):

    title           name of the new model (the output folder's)
    model           the original model: a hub id, a folder, or `demo`
    revision        of a hub id
    base_model      hub id of the original, where it is known (of `demo` it is): for the front matter
    family          title of the model family
    picture         file name of a picture beside the card
    method          name of the planner
    command         the command line
    before, after   mappings of the same measures (layers, parameters, bytes, perplexity, ..._per_s ...), a measure
                    being a number or a mapping with `value` and `stderr`
    calibration     a description, or a mapping of settings
    evaluation      the same
    settings        mapping of the planner's settings
    heal            mapping of how the pruned model was healed, `stages` first; None where it was not
    approximations  sentences about what is not exact in this family
    recipe_sha256   content hash of the recipe
    versions        mapping of package to version
    source_card     text of the original's own README.md, for its licence and languages
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_INHERITED = ("license", "license_name", "license_link", "language")
_MAX_FRONT_MATTER = 64 * 1024

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

PAPER = "https://arxiv.org/abs/2510.15304"
CITATION = """\
@inproceedings{wang2025layer,
  title     = {Layer as Puzzle Pieces: Compressing Large Language Models through Layer Concatenation},
  author    = {Wang and Shen and Ding and Xue and Liu and Ding},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
  note      = {arXiv:2510.15304}
}"""


def model_card(results: Mapping[str, Any]) -> str:
    """Return the text of README.md for a built model; the module's docstring lists the keys of `results`."""
    sections = [
        _front_matter(results),
        f"# {_line(results.get('title', 'A shallower model'))}",
        _what_it_is(results),
        _picture(results),
        _measures(results),
        _how_to_load(),
        _how_it_was_made(results),
        _approximations(results.get("approximations", ())),
        _citation(results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(results: Mapping[str, Any]) -> str:
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = _base_model(results)
    if base:
        fields["base_model"] = base
    fields["tags"] = ["intarsia", "depth-pruning", "model-compression"]
    fields.update(inherited(results.get("source_card")))
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).rstrip()}\n---"


def _base_model(results: Mapping[str, Any]) -> str | None:
    """The hub id of the original, where it has one: a folder's path means nothing to anybody else."""
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


def _what_it_is(results: Mapping[str, Any]) -> str:
    before, after = results.get("before", {}), results.get("after", {})
    text = f"This is {_source(results)}"
    if "layers" in before and "layers" in after:
        text += f" with {after['layers']} layers instead of {before['layers']}"
    text += ", made with Intarsia"
    if "method" in results:
        text += f" (method `{_code(results['method'])}`)"
    text += ". "
    if str(results.get("method", "")).startswith("come"):
        text += f"{_how_layers_became_one(results.get('settings'))} ([paper]({PAPER})). "
    if results.get("heal"):
        text += _healed(results["heal"])
    text += "It is a stock checkpoint"
    text += f" of its family ({_line(results['family'])})" if results.get("family") else " of its family"
    return text + ": it needs no code of its own."


def _how_layers_became_one(settings: Any) -> str:
    """By `combine` of the planner's settings, where the method has it."""
    combine = settings.get("combine") if isinstance(settings, Mapping) else None
    if combine == "weight-sum":
        return "Layers were not only dropped: adjacent layers were added up into one, each weighted by its share"
    joined = (
        "Layers were not only dropped: the most sensitive pieces of adjacent layers were joined into one layer of the "
        "usual shape"
    )
    return joined + ("; the other pieces were added onto the most similar ones" if combine == "fuse" else "")


def _healed(heal: Mapping[str, Any]) -> str:
    stages = heal.get("stages", ())
    trained = [stage for stage in stages if stage != "closed-form"]
    if trained:
        return f"It was then trained to follow the original ({_line(', '.join(stages))}). "
    return (
        "Its output projections were then fitted to the original's hidden states by least squares, without training. "
    )


def _picture(results: Mapping[str, Any]) -> str:
    """The puzzle picture, a file beside the card."""
    picture = results.get("picture")
    return f"![Which layers this model is made of]({_line(picture)})" if picture else ""


def _measures(results: Mapping[str, Any]) -> str:
    before, after = results.get("before", {}), results.get("after", {})
    known = (before, after)
    keys = [key for key in {**before, **after} if any(measures.get(key) is not None for measures in known)]
    if not keys:
        return ""
    rows = ["| | before | after |", "|---|---:|---:|"]
    for key in keys:
        rows.append(f"| {_cell(_title(key))} | {_cell(_value(before.get(key)))} | {_cell(_value(after.get(key)))} |")
    evaluation = _described(results.get("evaluation"))
    note = f"\n\nEvaluated on: {evaluation}." if evaluation else ""
    return "## Measured\n\n" + "\n".join(rows) + note


def _how_to_load() -> str:
    return """\
## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the id under which it was uploaded
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""


def _how_it_was_made(results: Mapping[str, Any]) -> str:
    lines = ["## How it was made"]
    if results.get("command"):
        # A fence longer than any run of backticks inside: the command stays one block whatever it holds.
        command = " ".join(str(results["command"]).split("\n"))
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
        lines.append(f"{fence}sh\n{command}\n{fence}")
    recipe = results.get("recipe_sha256")
    facts = {
        "Calibration": _described(results.get("calibration")),
        "Settings": _described(results.get("settings")),
        "Healing": _described(results.get("heal")),
        "Recipe": f"`{_code(recipe)}` (SHA-256 of its content)" if recipe else "",
        "Versions": _described(results.get("versions")),
    }
    listed = [f"- {name}: {text}" for name, text in facts.items() if text]
    if listed:
        lines.append("\n".join(listed))
    return "\n\n".join(lines) if len(lines) > 1 else ""


def _approximations(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    return "## What is not exact\n\n" + "\n".join(f"- {_line(sentence)}" for sentence in sentences)


def _citation(results: Mapping[str, Any]) -> str:
    if not str(results.get("method", "come")).startswith("come"):
        return ""
    return f"## Citation\n\n```bibtex\n{CITATION}\n```"


def _described(value: Any) -> str:
    """A description as it is, a mapping as `name value, name value`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_title(key)} `{_code(_value(part))}`" for key, part in value.items() if part is not None)
    return _line(value) if value else ""


def _title(key: str) -> str:
    return str(key).replace("_per_s", "/s").replace("_", " ")


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        error = value.get("stderr")
        return _value(value.get("value")) + ("" if error is None else f" ± {error:.2g}")
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(part) for part in value)
    return str(value)


def _line(text: Any) -> str:
    """Text on one line, with nothing in it that a renderer would take for HTML."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _code(text: Any) -> str:
    """Text for inside backticks."""
    return " ".join(str(text).replace("`", "'").split())


def inherited(card: str | None) -> dict[str, Any]:
    """Return licence and languages from the front matter of another model's card; empty where there are none."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card or "", flags=re.DOTALL)
    if found is None or len(found[1]) > _MAX_FRONT_MATTER:
        return {}
    try:
        fields = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(fields, dict):
        return {}
    return {key: fields[key] for key in _INHERITED if _is_plain(fields.get(key))}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(part, str) for part in value)
    return isinstance(value, str) and bool(value.strip())
