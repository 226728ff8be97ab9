from __future__ import annotations

import pytest

from intarsia.reporting.source_card import inherited


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


def test_named_licences_come_along() -> None:
    card = "\ufeff---\r\nlicense: other\r\nlicense_name: llama3\r\nlicense_link: LICENSE\r\n---\r\ntext"
    assert inherited(card) == {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}
