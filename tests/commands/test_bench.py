"""Bench: models side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import intarsia
from intarsia.errors import UserError
from intarsia.evaluation import speed
from tests import families
from tests.command import invoke
from tests.conftest import Folder


@pytest.fixture
def shallow(tmp_path: Path) -> str:
    return str(families.save(families.make_model("llama", num_hidden_layers=3), tmp_path / "shallow"))


def test_every_setting_of_every_model(model_folder: Folder, shallow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is set so that a round takes as many seconds as the model has layers, decoding twice that."""

    def fake(model: Any, batch: int, prompt_len: int, new_tokens: int) -> tuple[float, float]:
        layers = float(model.config.num_hidden_layers)
        return layers, 2 * layers

    monkeypatch.setattr(speed, "_round", fake)
    deep = str(model_folder("llama"))
    found = intarsia.bench(deep, shallow, batch=(1, 4), prompt_len=8, new_tokens=3, repeats=1)
    rows = {(row.model, row.batch): row for row in found.rows}
    assert list(rows) == [(deep, 1), (shallow, 1), (deep, 4), (shallow, 4)]
    for (model, batch), row in rows.items():
        layers = 6 if model == deep else 3
        assert row.layers == layers
        assert row.prefill_per_s == pytest.approx(batch * 8 / layers)
        assert row.decode_per_s == pytest.approx(batch * 2 / (2 * layers))
        assert row.first_token_seconds == layers
        assert row.decode_ratio == row.prefill_ratio == pytest.approx(6 / layers)
        assert row.peak_bytes == row.weights_bytes + row.working_bytes
        assert row.cache_bytes == row.cache_predicted_bytes == 2 * batch * 4 * 4 * 10 * layers * 4
    config = families.make_model("llama").config
    assert rows[deep, 1].weights_bytes - rows[shallow, 1].weights_bytes == 3 * 4 * _layer_parameters(config)


def _layer_parameters(config: Any) -> int:
    kv = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    attention = 2 * config.hidden_size**2 + 2 * config.hidden_size * kv
    return attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size


def test_one_after_the_other_gives_the_same_rows(
    model_folder: Folder, shallow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intarsia.building.offload.free_bytes", lambda device: 0)
    found = intarsia.bench(str(model_folder("llama")), shallow, prompt_len=8, new_tokens=3, repeats=1)
    assert [(row.layers, row.batch) for row in found.rows] == [(6, 1), (3, 1)]
    assert found.rows[0].decode_ratio == 1.0


def test_the_same_model_twice_has_two_names(shallow: str) -> None:
    found = intarsia.bench(shallow, shallow, prompt_len=8, new_tokens=3, repeats=1)
    assert [row.model for row in found.rows] == [shallow, f"{shallow} (2)"]


def test_everything_wrong_is_reported_at_once(shallow: str) -> None:
    with pytest.raises(UserError) as raised:
        intarsia.bench(shallow, batch=(1, 0), prompt_len=families.POSITIONS, new_tokens=1, repeats=0)
    said = [problem.message for problem in raised.value.problems]
    assert [words.split()[0] for words in said] == ["--batch", "--repeats", "--new-tokens", "Prompt"]
    assert shallow in said[-1]
    with pytest.raises(UserError) as raised:
        intarsia.bench("./no-model", "./none-here")
    assert len(raised.value.problems) == 2


def test_command_line(shallow: str) -> None:
    arguments = ["bench", shallow, "--batch", "1,2", "--prompt-len", "8", "--new-tokens", "3", "--repeats", "1"]
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["batch"] for row in found["rows"]] == [1, 2]
    assert all(row["decode_per_s"] > 0 and row["working_bytes"] >= 0 for row in found["rows"])
    wrong = invoke("bench", shallow, "--batch", "two")
    assert wrong.exit_code == 2 and "--batch" in wrong.stderr


def test_a_model_is_its_own_best_draft(model_folder: Folder, tmp_path: Path) -> None:
    """All proposals of an equal model are accepted, and the tokens are those of plain generation."""
    folder = str(model_folder("llama"))
    found = intarsia.bench(folder, prompt_len=4, new_tokens=16, repeats=1, draft=folder).draft
    assert found is not None and found.prompts == 8
    assert found.same_output == 1.0 and found.tokens <= 8 * 16
    assert found.acceptance == 1.0 and found.tokens_per_pass >= 2.0
    assert found.speedup == pytest.approx(found.assisted_per_s / found.plain_per_s)
    other = str(families.save(families.make_model("llama", seed=5), tmp_path / "other"))
    (tmp_path / "prompts.txt").write_text("roti sa\nkana\n")
    poor = intarsia.bench(
        folder, prompt_len=4, new_tokens=16, repeats=1, draft=other, prompts=str(tmp_path / "prompts.txt")
    ).draft
    assert poor is not None and (poor.prompts, poor.same_output) == (2, 1.0)
    assert poor.acceptance < found.acceptance and poor.tokens_per_pass >= 1.0


def test_the_row_of_a_draft_in_a_report(shallow: str, tmp_path: Path) -> None:
    words = ["bench", shallow, "--prompt-len", "4", "--new-tokens", "3", "--repeats", "1", "--draft", shallow, "--json"]
    (tmp_path / "bench.json").write_text(invoke(*words).stdout)
    draft = json.loads((tmp_path / "bench.json").read_text())["draft"]
    intarsia.report(tmp_path / "bench.json", out=tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert (
        "<h3>With a draft</h3>" in page and "<td>shallow</td>" in page and f"{draft['assisted_per_s']:.4g}"[:4] in page
    )
    (tmp_path / "bench.json").write_text('{"rows": [{}], "repeats": 1, "draft": null}')
    with pytest.raises(UserError, match=r"bench\.json: expected output of `bench --json`"):
        intarsia.report(tmp_path / "bench.json", out=tmp_path / "other.html")


def test_a_draft_must_have_the_same_tokens(model_folder: Folder, tmp_path: Path) -> None:
    folder = str(model_folder("llama"))
    other = families.save(families.make_model("llama"), tmp_path / "other")
    tokenizer = families.make_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match=f"^{other} has another tokenizer than {folder}\\."):
        intarsia.bench(folder, draft=str(other))
    with pytest.raises(UserError, match="--draft is given with several models"):
        intarsia.bench(folder, folder, draft=folder)
    with pytest.raises(UserError, match="--prompts is given without --draft"):
        intarsia.bench(folder, prompts="a.txt")
