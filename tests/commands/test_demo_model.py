"""The whole way on a real model: SmolLM2-135M-Instruct, 30 layers, grouped-query attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import intarsia
from intarsia.checkpoint.gguf_source import demo_folder
from intarsia.recipe import schema
from intarsia.recipe.recipe import Concat
from tests import verbs

REPOSITORY = Path(__file__).parents[2]

PROSE = """\
The old harbour lies at the end of a narrow bay, and for most of the year it is a quiet place. Fishing boats leave
before sunrise and come back in the afternoon, when the market on the quay opens for a few hours. In the summer there
are visitors from the city, who sit outside the two cafes and watch the ferries cross to the islands. The town grew rich
in the eighteenth century, when its merchants traded timber and salt with the countries around the Baltic Sea. Many of
the houses along the main street were built in those years. They have tall windows and steep roofs, and some of them
still carry the names of the ships that paid for them above the door. After the railway came, most of the trade moved
to larger ports in the south, and the population fell by almost a third within twenty years. Today about four thousand
people live here. The school, the hospital and a factory that makes parts for wind turbines are the largest employers.
In recent years the council has tried to attract young families by building cheap houses on the hill behind the church,
and by improving the train service to the capital, which now takes less than two hours. Not everyone is happy about the
changes. Some of the older residents fear that the town will lose its character, while others say that without new
people there will soon be no town at all. At the last meeting of the council the argument went on until midnight, and
in the end the members decided to ask the citizens themselves. The vote will take place in the first week of October.
"""


@pytest.mark.exhaustive
@pytest.mark.registry
def test_compress_the_demo_model(tmp_path: Path) -> None:
    try:
        demo_folder()
    except intarsia.UserError as error:
        pytest.skip(f"the demo model is not to be had: {error}")
    text = tmp_path / "licence.txt"
    text.write_text((REPOSITORY / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    prose = tmp_path / "prose.txt"
    prose.write_text(PROSE, encoding="utf-8")

    result = verbs.compress(
        "demo",
        tmp_path / "out",
        layers=28,
        calibration=str(text),
        tokens=2048,
        seq_len=128,
        heal="none",  # so little of such a text heals nothing
        eval_text=str(prose),
        windows=2,
    )

    assert result.before is not None and result.after is not None
    assert (result.before.layers, result.before.parameters) == (30, 134_515_008)
    assert (result.after.layers, result.after.parameters) == (28, 134_515_008 - 2 * 3_540_096)
    assert result.before.perplexity is not None and result.after.perplexity is not None
    # Plain English prose; the cut costs something, and does not destroy the model.
    assert 5 < result.before.perplexity.value < 40
    assert 1.05 < result.after.perplexity.value / result.before.perplexity.value < 2.5
    recipe = schema.load(tmp_path / "out" / "recipe" / "recipe.yaml")
    merged = [op for op in recipe.layers if isinstance(op, Concat)]
    assert merged and all(sum(len(cut.channels) for cut in op.cuts) == 1536 for op in merged)
    assert recipe.spans[0][0] == 0 and recipe.spans[-1][1] == 30

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    cached = model.generate(**ids, max_new_tokens=12, do_sample=False, use_cache=True)
    plain = model.generate(**ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    assert cached.shape[1] > ids["input_ids"].shape[1]
