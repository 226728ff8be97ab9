"""The model card."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from intarsia.reporting.card import DEMO_MODEL, inherited, model_card

SOURCE_CARD = """---
license: apache-2.0
language:
- en
datasets:
- somebody/something
---
# SmolLM2
license: other
"""

RESULTS: dict[str, Any] = {
    "title": "demo-25",
    "model": "demo",
    "family": "Llama",
    "method": "come",
    "before": {"layers": 30, "parameters": 134515008, "perplexity": {"value": 28.2468, "stderr": 0.5}, "bytes": 1},
    "after": {"layers": 25, "parameters": 116815008, "perplexity": {"value": 50.0, "stderr": 1.25}},
    "calibration": {"source": "self", "tokens": 65536},
    "evaluation": "64 windows of 512 tokens of wikitext2.test.raw.txt",
    "settings": {"merge": 2, "norm": "fold", "dominance": None},
    "approximations": ["QK-norm weights are averaged"],
    "recipe_sha256": "ab" * 32,
    "versions": {"intarsia": "0.1.0", "torch": "2.13.0"},
    "source_card": SOURCE_CARD,
}


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    fields = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(fields, dict)
    return fields


def test_front_matter() -> None:
    assert front_matter(model_card(RESULTS)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": DEMO_MODEL,
        "tags": ["intarsia", "depth-pruning", "model-compression"],
        "license": "apache-2.0",
        "language": ["en"],
    }


def test_says_what_it_is_and_how_it_was_made() -> None:
    card = model_card(RESULTS)
    assert "# demo-25" in card
    assert "25 layers instead of 30" in card
    assert "| layers | 30 | 25 |" in card
    assert "| parameters | 134,515,008 | 116,815,008 |" in card
    assert "| perplexity | 28.25 ± 0.5 | 50 ± 1.2 |" in card
    assert "| size | 1 B |  |" in card
    assert "tokens `65,536`" in card
    assert "merge `2`, norm `fold`" in card
    assert "- QK-norm weights are averaged" in card
    assert "ab" * 32 in card
    assert "torch `2.13.0`" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "2510.15304" in card
    assert "64 windows of 512" in card
    assert card.endswith("```\n")


def test_little_is_known() -> None:
    card = model_card({"before": {}, "after": {}})
    assert "base_model" not in front_matter(card)
    assert "another model" in card
    assert "Measured" not in card
    assert "How it was made" not in card
    assert "None" not in card


def test_a_folder_is_no_base_model_and_its_path_stays_private() -> None:
    card = model_card({"model": "/home/somebody/models/secret-7b/", "before": {}, "after": {}})
    assert "base_model" not in front_matter(card)
    assert "secret-7b" in card
    assert "somebody" not in card
    given = model_card({"model": "models/x", "base_model": "org/x", "revision": "abc", "before": {}, "after": {}})
    assert front_matter(given)["base_model"] == "org/x"
    assert "https://huggingface.co/org/x" in given
    assert "revision `abc`" in given


def test_a_baseline_is_not_called_come() -> None:
    card = model_card({**RESULTS, "method": "shortgpt"})
    assert "joined into one layer" not in card
    assert "Citation" not in card


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "a | b\n| c", "--- \nlicense: mit", "```\n# taken over", "`x` <b>"]
)
def test_texts_stay_texts(hostile: str) -> None:
    card = model_card(
        {
            "title": hostile,
            "model": hostile,
            "base_model": hostile,
            "method": hostile,
            "before": {"layers": 2, hostile: hostile},
            "after": {"layers": 1},
            "settings": {"x": hostile},
            "approximations": [hostile],
        }
    )
    fields = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert "license" not in fields
    assert fields["base_model"] == hostile
    body = card.split("\n---\n", 1)[1]
    # Inside backticks nothing is read as HTML or as Markdown.
    prose = re.sub(r"`[^`\n]*`", "", re.sub(r"^(`{3,}).*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE))
    assert "<" not in prose
    assert "\n# taken over" not in body
    assert all(line.replace("\\|", "").count("|") == 4 for line in body.splitlines() if line.startswith("|"))


@pytest.mark.parametrize(
    ("combine", "said", "unsaid"),
    [
        ("concat", "most sensitive pieces of adjacent layers were joined", "added"),
        ("fuse", "the other pieces were added onto the most similar ones", "weighted by its share"),
        ("weight-sum", "adjacent layers were added up into one, each weighted by its share", "pieces"),
    ],
)
def test_says_how_layers_became_one(combine: str, said: str, unsaid: str) -> None:
    intro = model_card({**RESULTS, "settings": {"combine": combine}}).split("## Measured")[0]
    assert said in intro
    assert unsaid not in intro


@pytest.mark.parametrize(
    "card",
    [
        None,
        "",
        "no front matter",
        "---\nlicense: [unclosed\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: 5\n---\n",
        "---\nlicense: ''\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        "---\nlicense: mit\n",
        "# title\n---\nlicense: mit\n---\n",
    ],
)
def test_a_source_card_without_a_licence(card: str | None) -> None:
    assert inherited(card) == {}


def test_named_licences_are_inherited() -> None:
    card = "\ufeff---\r\nlicense: other\r\nlicense_name: llama3\r\nlicense_link: LICENSE\r\n---\r\ntext"
    assert inherited(card) == {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
