"""LaCo against its algorithm, transcribed on state dictionaries and whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.errors import UserError
from intarsia.pruning.methods.laco import LacoSettings, collapsed
from intarsia.recipe.recipe import Merge, Select
from tests import families
from tests.conftest import InMemory
from tests.pruning.by_hand import ladder_of, real_tokens, with_layers
from tests.pruning.conftest import corpus_of
from tests.recipes_by_hand import ref, select

State = dict[str, torch.Tensor]


def states_of(resident: Any, layers: Any = None) -> list[State]:
    return [
        {name: tensor.double() for name, tensor in layer.state_dict().items()} for layer in layers or resident.layers
    ]


def merged(states: list[State], start: int, count: int) -> list[State]:
    """theta_l + sum_k (theta_{l+k} - theta_l); the layers after l are gone."""
    base = states[start]
    total = {name: base[name] + sum(states[start + k][name] - base[name] for k in range(1, count)) for name in base}
    return [*states[:start], total, *states[start + count :]]


def final_states(resident: Any, states: list[State], corpus: Any) -> torch.Tensor:
    """What transformers calls the last hidden state, without padding: one vector a sequence."""
    model = with_layers(resident, [{name: tensor.float() for name, tensor in state.items()} for state in states])
    real = real_tokens(corpus)
    with torch.no_grad():
        own = model(corpus.input_ids, attention_mask=real.long(), output_hidden_states=True, use_cache=False)
    return own.hidden_states[-1].masked_fill(~real[..., None], 0.0).flatten(1)


def by_hand(resident: Any, corpus: Any, target: int, c: int, threshold: float, interval: int, lowest: int) -> Any:
    original = states_of(resident)
    reference, current, log = final_states(resident, original, corpus), original, []
    pointer = len(current) - c
    while len(current) > target:
        if pointer < lowest:
            threshold, pointer = round(threshold - 0.05, 10), len(current) - c
            continue
        count = min(c, len(current) - target + 1, len(current) - pointer)
        candidate = merged(current, pointer, count)
        similarity = float(torch.cosine_similarity(final_states(resident, candidate, corpus), reference).mean())
        if similarity > threshold:
            log.append((pointer, count, similarity, threshold))
            current = candidate
            pointer = min(pointer - interval, len(current) - c)
        else:
            pointer -= 1
    return log, current


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "mistral", "qwen2", "opt"])
def test_the_algorithm(family: str, padded: bool, resident_of: InMemory, tmp_path: Path) -> None:
    resident, corpus = resident_of(family), corpus_of(padded=padded)
    settings = LacoSettings(merge=3, threshold=0.9, interval=1, lowest=0)
    run, stopped, model = ladder_of("laco", resident, corpus, tmp_path / "run", 3, settings)
    steps, states = by_hand(resident, corpus, 3, 3, 0.9, 1, 0)
    assert stopped is None and run.depths() == [4, 3]
    for entry, (start, count, similarity, threshold) in zip(run.log(), steps, strict=True):
        assert entry["merged"] == [start, start + count]
        assert entry["evidence"]["similarity"] == pytest.approx(similarity, abs=1e-5)
        assert entry["evidence"]["threshold"] == pytest.approx(threshold)
        assert entry["evidence"]["tried"][str(start)] == entry["evidence"]["similarity"]
    for module, state in zip(model.modules, states, strict=True):
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor.double(), state[name], rtol=1e-4, atol=1e-5)


def test_the_threshold_decides(resident_of: InMemory, tmp_path: Path) -> None:
    """Below everything: the first place that is tried, and then the interval further down."""
    settings = LacoSettings(merge=2, threshold=-1.0, interval=2, lowest=0)
    run, _, _ = ladder_of("laco", resident_of("llama"), corpus_of(), tmp_path / "run", 3, settings)
    assert [entry["merged"] for entry in run.log()] == [[4, 6], [2, 4], [0, 2]]


def test_the_range_of_layers(resident_of: InMemory, tmp_path: Path) -> None:
    settings = LacoSettings(merge=2, threshold=-1.0, interval=1, lowest=2, highest=4)
    run, stopped, _ = ladder_of("laco", resident_of("llama"), corpus_of(), tmp_path / "run", 1, settings)
    assert [entry["merged"] for entry in run.log()] == [[2, 4], [2, 4], [2, 4]]
    assert stopped is not None and "range of layers" in stopped


def test_stopped_and_started_again(resident_of: InMemory, tmp_path: Path) -> None:
    resident, settings = resident_of("llama"), LacoSettings(merge=2, threshold=0.9, lowest=0)
    whole, _, _ = ladder_of("laco", resident, corpus_of(), tmp_path / "whole", 2, settings)
    for target in (5, 3, 2):
        parts, _, _ = ladder_of("laco", resident, corpus_of(), tmp_path / "parts", target, settings)
    assert [entry["evidence"] for entry in parts.log()] == [entry["evidence"] for entry in whole.log()]
    assert [entry["hash"] for entry in parts.log()] == [entry["hash"] for entry in whole.log()]


def test_attention_types_do_not_mix(resident_of: InMemory, tmp_path: Path) -> None:
    settings = LacoSettings(merge=2, threshold=-1.0, lowest=0)
    run, _, _ = ladder_of("laco", resident_of("qwen3"), corpus_of(), tmp_path / "run", 3, settings)
    assert [entry["merged"] for entry in run.log()] == [[4, 6], [2, 4], [0, 2]]
    _, stopped, _ = ladder_of("laco", resident_of("qwen3"), corpus_of(), tmp_path / "run", 2, settings)
    assert stopped is not None and "attention type" in stopped


def test_weights_of_a_merge_and_of_a_merge_of_a_merge() -> None:
    three = collapsed([select(1), select(2), select(3)])
    assert three == Merge(sources=(ref(1), ref(2), ref(3)), weights=(-1.0, 1.0, 1.0))
    # theta_0 + (three - theta_0) + (theta_4 - theta_0)
    again = collapsed([select(0), three, select(4)])
    assert again == Merge(sources=(ref(0), ref(1), ref(2), ref(3), ref(4)), weights=(-1.0, -1.0, 1.0, 1.0, 1.0))
    assert collapsed([select(0), select(1)]) == Select(source=ref(1))


def test_what_the_notebook_computes(resident_of: InMemory, tmp_path: Path) -> None:
    """Each difference to the base as it has been changed by then: nothing but the last layer is left of the sum."""
    resident, corpus = resident_of("llama"), corpus_of()
    base, *others = states_of(resident)[1:4]
    for other in others:
        base = {name: base[name] + (other[name] - base[name]) for name in base}
    settings = LacoSettings(merge=3, threshold=-1.0, interval=9, lowest=1, highest=4, formula="notebook")
    run, _, model = ladder_of("laco", resident, corpus, tmp_path / "run", 4, settings)
    assert [entry["merged"] for entry in run.log()] == [[1, 4]]
    for name, tensor in model.modules[1].state_dict().items():
        torch.testing.assert_close(tensor.double(), base[name], rtol=1e-5, atol=1e-6)
    states = states_of(resident)
    similarity = torch.cosine_similarity(
        final_states(resident, [states[0], *states[3:]], corpus), final_states(resident, states, corpus)
    ).mean()
    assert run.log()[0]["evidence"]["similarity"] == pytest.approx(float(similarity), abs=1e-5)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError) as caught:
        LacoSettings(merge=1, threshold=2.0, interval=0, lowest=-1, highest=-2)
    assert [problem.message.split()[0] for problem in caught.value.problems] == [
        "--laco-merge",
        "--laco-threshold",
        "--laco-interval",
        "--laco-lowest",
        "--laco-highest",
    ]
    assert families.DEPTH == 6
