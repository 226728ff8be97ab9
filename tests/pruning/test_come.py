"""CoMe and CoMe-P: every decision against what the definition says, worked out from the model's own forward."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from intarsia.architecture.spec import PARTS
from intarsia.building.loaded_model import LoadedModel
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.methods.come import Come, ComeSettings
from intarsia.pruning.methods.come_p import ComeP, ComePSettings
from intarsia.pruning.scores import counts, ratios, share_grid
from intarsia.recipe.recipe import Concat, Op, Select
from tests import families
from tests.conftest import InMemory
from tests.experts_by_hand import sizes_of_experts
from tests.families_dense import UNLIKE
from tests.pruning.conftest import corpus_of
from tests.recipes_by_hand import select, shared

WHOLE = [select(layer) for layer in range(families.DEPTH)]


def measured(resident: LoadedModel, corpus: Corpus, ops: Any = WHOLE, **changes: Any) -> Intermediate:
    model = Intermediate(resident, corpus, ops, batch_tokens=2 * corpus.seq_len, **changes)
    model.measure()
    return model


def hidden_states(resident: LoadedModel, corpus: Corpus) -> list[np.ndarray]:
    """H^0 .. H^5 of every real token, `[N, D]` each; H^6 is not to be had from transformers."""
    mask = torch.ones_like(corpus.input_ids, dtype=torch.bool) if corpus.mask is None else corpus.mask
    with torch.no_grad():
        own = resident.model(corpus.input_ids, attention_mask=mask.long(), output_hidden_states=True)
    return [h[mask].double().numpy() for h in own.hidden_states[:-1]]


def read_out_inputs(resident: LoadedModel, layer: int, part: Any, corpus: Corpus) -> np.ndarray:
    """What o_proj or down_proj reads at every real token, `[N, C]`."""
    seen: list[torch.Tensor] = []
    module = resident.layers[layer].get_submodule(resident.architecture.writer(part).module)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mask = torch.ones_like(corpus.input_ids, dtype=torch.bool) if corpus.mask is None else corpus.mask
    with torch.no_grad():
        resident.model(corpus.input_ids, attention_mask=mask.long())
    handle.remove()
    return seen[0].reshape(*mask.shape, -1)[mask].double().numpy()


def best_experts(resident: LoadedModel, layer: int, count: int, corpus: Corpus, *, l2: bool) -> set[int]:
    seen: list[torch.Tensor] = []
    handle = resident.layers[layer].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mask = torch.ones_like(corpus.input_ids, dtype=torch.bool) if corpus.mask is None else corpus.mask
    with torch.no_grad():
        resident.model(corpus.input_ids, attention_mask=mask.long())
        handle.remove()
        sizes = sizes_of_experts(resident.layers[layer], seen[0][mask], resident.model.config).double().numpy()
    scores = np.sqrt(np.mean(sizes**2, axis=0)) if l2 else np.mean(sizes, axis=0)
    return set(sorted(range(len(scores)), key=lambda piece: -scores[piece])[:count])


def best_pieces(
    resident: LoadedModel, layer: int, part: Any, count: int, corpus: Corpus, *, l2: bool = False
) -> set[int]:
    if resident.architecture.is_mixture(part):
        return best_experts(resident, layer, count, corpus, l2=l2)
    x = read_out_inputs(resident, layer, part, corpus)
    size = np.sqrt(np.mean(x**2, axis=0)) if l2 else np.mean(np.abs(x), axis=0)
    weight = resident.layers[layer].get_submodule(resident.architecture.writer(part).module).weight.double().numpy()
    scores = [0.0] * resident.architecture.n_pieces(part)
    per_piece = len(size) // len(scores)
    for channel in range(len(size)):
        sensitivity = size[channel] * sum(abs(row[channel]) for row in weight)
        scores[channel // per_piece] += sensitivity / per_piece
    return set(sorted(range(len(scores)), key=lambda piece: -scores[piece])[:count])


def taken(op: Op, layer: int, part: Any, whole: int) -> set[int]:
    """Pieces of an original layer in an op."""
    if isinstance(op, Select):
        return set(range(whole)) if op.source.layer == layer else set()
    assert isinstance(op, Concat)
    return {piece for cut in op.cuts if cut.source.layer == layer for piece in cut.pieces(part)}


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_step_by_hand(family: str, padded: bool, resident_of: InMemory) -> None:
    """Span, ratios, counts and kept pieces of the first step."""
    resident, corpus = resident_of(family), corpus_of(padded=padded)
    architecture = resident.architecture
    model = measured(resident, corpus)
    step = Come(ComeSettings()).decide(model, 5, [])
    assert step.op is not None
    assert step.count == 2

    states = hidden_states(resident, corpus)
    scores = {int(start): value for start, value in step.evidence["span_scores"].items()}
    for start in range(families.DEPTH - 2):  # the last span ends where transformers shows nothing
        if start in scores:
            by_hand = np.mean(np.arccos(cosine(states[start], states[start + 2]))) / np.pi
            assert scores[start] == pytest.approx(by_hand, abs=1e-6)
    allowed = {0, 2, 4} if family in ("qwen3", "cohere2", *UNLIKE) else {0, 1, 2, 3, 4}  # attention types do not mix
    assert set(scores) == allowed
    assert step.start == min(scores, key=lambda start: (scores[start], start))

    influences = step.evidence["influence"]
    for layer in range(families.DEPTH - 1):
        assert influences[layer] == pytest.approx(1 - np.mean(cosine(states[layer], states[layer + 1])), abs=1e-6)
    pair = influences[step.start : step.start + 2]
    assert step.evidence["prior_ratios"] == pytest.approx([value / sum(pair) for value in pair])
    for part, key in (("attention", "kv_groups"), ("mlp", "channels")):
        whole = architecture.n_pieces(part)
        expected = [int(share * whole) for share in step.evidence["prior_ratios"]]
        expected[int(pair[1] > pair[0])] += whole - sum(expected)
        assert step.evidence["counts"][key] == expected
        for index, count in enumerate(expected):
            layer = step.start + index
            assert taken(step.op, layer, part, whole) == best_pieces(resident, layer, part, count, corpus)
    if isinstance(step.op, Concat):
        assert step.op.norm == "fold"
        for cut in step.op.cuts:
            for part in PARTS:
                assert cut.weights[part] == pytest.approx(len(cut.pieces(part)) / architecture.n_pieces(part))


def test_pieces_by_root_mean_square(resident_of: InMemory) -> None:
    resident, corpus = resident_of("llama"), corpus_of()
    model = measured(resident, corpus)
    step = Come(ComeSettings(sensitivity="l2")).decide(model, 5, [])
    assert step.op is not None
    for index, count in enumerate(step.evidence["counts"]["channels"]):
        layer = step.start + index
        expected = best_pieces(resident, layer, "mlp", count, corpus, l2=True)
        assert taken(step.op, layer, "mlp", families.CHANNELS) == expected


def test_sharpness_and_dominance(resident_of: InMemory) -> None:
    model = measured(resident_of("llama"), corpus_of())
    plain = Come(ComeSettings()).decide(model, 5, [])
    sharp = Come(ComeSettings(sharpness=3.0)).decide(model, 5, [])
    assert plain is not None and sharp is not None
    pair = plain.evidence["influence"][plain.start : plain.start + 2]
    assert sharp.evidence["prior_ratios"] == pytest.approx([value**3 / sum(v**3 for v in pair) for value in pair])
    assert sharp.evidence["counts"]["channels"] == counts(ratios(pair, 3.0), families.CHANNELS)
    strong = Come(ComeSettings(dominance=0.9)).decide(model, 5, [])
    assert strong is not None
    assert max(strong.evidence["prior_ratios"]) == pytest.approx(max(0.9, *plain.evidence["prior_ratios"]))
    assert sum(strong.evidence["prior_ratios"]) == pytest.approx(1.0)


def test_dominance_counts_original_layers(resident_of: InMemory) -> None:
    """A merged layer of two and one more are three originals: the largest share is at least 0.8^(1/2)."""
    resident = resident_of("llama")
    model = measured(resident, corpus_of(), [shared(resident.architecture, [0, 1]), select(2)])
    step = Come(ComeSettings(dominance=0.8)).decide(model, 1, [])
    assert step is not None
    influences = step.evidence["influence"]
    expected = max(0.8**0.5, max(influences) / sum(influences))
    assert max(step.evidence["prior_ratios"]) == pytest.approx(expected)


def test_three_layers_at_once(resident_of: InMemory) -> None:
    resident, corpus = resident_of("llama"), corpus_of()
    model = measured(resident, corpus)
    step = Come(ComeSettings(merge=3)).decide(model, 3, [])
    assert step is not None and isinstance(step.op, Concat)
    assert step.count == 3
    states = hidden_states(resident, corpus)
    scores = {int(start): value for start, value in step.evidence["span_scores"].items()}
    assert set(scores) == {0, 1, 2, 3}
    for start in range(3):
        by_hand = np.mean(np.arccos(cosine(states[start], states[start + 3]))) / np.pi
        assert scores[start] == pytest.approx(by_hand, abs=1e-6)
    assert step.start == min(scores, key=lambda start: scores[start])
    assert {source.layer for source in step.op.sources} <= set(range(step.start, step.start + 3))
    assert sum(step.evidence["counts"]["kv_groups"]) == 4
    assert sum(step.evidence["counts"]["channels"]) == families.CHANNELS
    # One layer left to remove: the last step merges two.
    last = Come(ComeSettings(merge=3)).decide(model, 5, [])
    assert last is not None and last.count == 2


def test_the_last_tokens_distance(resident_of: InMemory) -> None:
    resident, corpus = resident_of("mistral"), corpus_of(padded=True)
    model = measured(resident, corpus)
    step = Come(ComeSettings(distance="last-token")).decide(model, 5, [])
    assert step is not None and corpus.mask is not None
    states = hidden_states(resident, corpus)
    ends = np.cumsum(corpus.mask.sum(dim=1).numpy()) - 1
    scores = {int(start): value for start, value in step.evidence["span_scores"].items()}
    for start in range(4):
        by_hand = np.mean(np.arccos(cosine(states[start][ends], states[start + 2][ends]))) / np.pi
        assert scores[start] == pytest.approx(by_hand, abs=1e-5)
    assert step.start == min(scores, key=lambda start: scores[start])


def test_spans_by_loss(resident_of: InMemory) -> None:
    """`sleb`: the least loss of the model without the span, from models really without it."""
    resident, corpus = resident_of("qwen2"), corpus_of()
    model = measured(resident, corpus)
    step = Come(ComeSettings(span_choice="sleb")).decide(model, 5, [])
    assert step is not None
    scores = {int(start): value for start, value in step.evidence["span_scores"].items()}
    for start in range(5):
        without = measured(resident, corpus, [*WHOLE[:start], *WHOLE[start + 2 :]])
        assert scores[start] == pytest.approx(without.loss, abs=1e-12)
    assert step.start == min(scores, key=lambda start: scores[start])


def test_averaged_norms(resident_of: InMemory) -> None:
    model = measured(resident_of("llama"), corpus_of())
    step = Come(ComeSettings(norm="average")).decide(model, 5, [])
    assert step is not None and isinstance(step.op, Concat)
    assert step.op.norm == "average"


def test_the_reference(resident_of: InMemory) -> None:
    """Averaged norms, no racing, and the distance of one layer however many are merged."""
    resident, corpus = resident_of("llama"), corpus_of()
    settings = ComeSettings(**ComeSettings.presets["paper"], merge=3)
    model = measured(resident, corpus, after_final_norm=True)
    step = Come(settings).decide(model, 3, [])
    assert step is not None and isinstance(step.op, Concat)
    assert step.op.norm == "average"
    states = hidden_states(resident, corpus)
    scores = {int(start): value for start, value in step.evidence["span_scores"].items()}
    assert set(scores) == {0, 1, 2, 3}
    for start in scores:
        by_hand = np.mean(np.arccos(cosine(states[start], states[start + 1]))) / np.pi
        assert scores[start] == pytest.approx(by_hand, abs=1e-6)


def test_a_merged_layer_is_not_merged_again_if_so_asked(resident_of: InMemory) -> None:
    resident = resident_of("llama")
    ops = [shared(resident.architecture, [0, 1]), select(2), select(3), shared(resident.architecture, [4, 5])]
    model = measured(resident, corpus_of(), ops)
    planner = Come(ComeSettings(no_repeat=True))
    step = planner.decide(model, 3, [])
    assert step is not None and step.start == 1
    model.replace(step.start, step.count, step.op)
    assert planner.decide(model, 1, []) is None
    assert "no-repeat" in planner.reason() and "2 adjacent unmerged layers" in planner.reason()


def test_merging_the_merged(resident_of: InMemory) -> None:
    """Down to one layer: a flat concatenation of original layers with the right totals."""
    resident = resident_of("opt")
    model = measured(resident, corpus_of())
    planner = Come(ComeSettings())
    while model.depth > 1:
        step = planner.decide(model, 1, [])
        assert step is not None
        model.replace(step.start, step.count, step.op)
        for op in model.ops:
            for part in PARTS:
                total = sum(
                    len(taken(op, layer, part, resident.architecture.n_pieces(part))) for layer in range(families.DEPTH)
                )
                assert total == resident.architecture.n_pieces(part)
    assert np.isfinite(model.loss)


# CoMe-P


@pytest.fixture(scope="module")
def predictable(resident_of: InMemory) -> Corpus:
    """Text that the model is sure of, because it wrote it: cutting the model costs clearly."""
    resident = resident_of("llama")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, families.VOCABULARY, (32, 1), generator=generator)
    with torch.no_grad():
        for _ in range(13):
            logits = resident.model(ids).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial((2 * logits).softmax(-1), 1, generator=generator)], dim=1)
    return Corpus.of(ids, description="self", documents=1)


@pytest.mark.parametrize("merge", [2, 3])
def test_the_posterior_form_takes_the_best_of_the_grid(merge: int, resident_of: InMemory) -> None:
    """Every ratio of the grid, built and measured whole."""
    resident, corpus = resident_of("llama"), corpus_of()
    granularity = {2: 10, 3: 4}[merge]
    settings = ComePSettings(granularity=granularity, racing=False, merge=merge, spans=1)
    model = measured(resident, corpus)
    spent = model.layer_forwards
    step = ComeP(settings).decide(model, 7 - merge, [])
    assert step is not None
    losses: dict[tuple[Any, ...], float] = {}
    for shares in share_grid(merge, granularity):
        numbers = {part: counts(shares, resident.architecture.n_pieces(part)) for part in PARTS}
        layers = range(step.start, step.start + merge)
        op = _joined(resident, layers, numbers, corpus)
        whole = [*WHOLE[: step.start], op, *WHOLE[step.start + merge :]]
        losses[tuple(numbers["attention"]), tuple(numbers["mlp"])] = measured(resident, corpus, whole).loss
    best = min(losses, key=lambda key: losses[key])
    found = tuple(step.evidence["counts"]["kv_groups"]), tuple(step.evidence["counts"]["channels"])
    assert found == best
    grid = step.evidence["grid"]
    assert [entry["loss"] for entry in grid] == pytest.approx(list(losses.values()), rel=1e-6)
    assert {entry["sequences"] for entry in grid} == {len(corpus)}
    behind = families.DEPTH - step.start - merge + 1
    assert model.layer_forwards - spent == pytest.approx(len(grid) * behind)


@pytest.mark.parametrize("spans", [2, 5])
def test_the_best_ratio_of_several_spans(spans: int, resident_of: InMemory) -> None:
    """Every ratio of every span that is tried, built and measured whole; one model is tried once."""
    resident, corpus = resident_of("llama"), corpus_of()
    model = measured(resident, corpus)
    settings = ComePSettings(granularity=4, racing=False, spans=spans)
    step = ComeP(settings).decide(model, 5, [])
    assert step is not None
    distances = {int(start): value for start, value in step.evidence["span_scores"].items()}
    tried = sorted(distances, key=lambda start: distances[start])[:spans]
    losses: dict[tuple[Op, ...], float] = {}
    owners: dict[tuple[Op, ...], int] = {}
    for start in tried:
        for shares in share_grid(2, 4):
            numbers = {part: counts(shares, resident.architecture.n_pieces(part)) for part in PARTS}
            layers = (*WHOLE[:start], _joined(resident, range(start, start + 2), numbers, corpus), *WHOLE[start + 2 :])
            if layers not in losses:
                losses[layers] = measured(resident, corpus, layers).loss
                owners[layers] = start
    best = min(losses, key=lambda layers: losses[layers])
    assert (*WHOLE[: step.start], step.op, *WHOLE[step.start + 2 :]) == best
    assert step.start == owners[best]
    grid = step.evidence["grid"]
    assert [entry["loss"] for entry in grid] == pytest.approx(list(losses.values()), rel=1e-6)
    assert [entry["start"] for entry in grid] == list(owners.values())
    # Neighbouring spans both drop the layer that they share: five ratios each, less one for each such pair.
    neighbours = sum(start + 1 in tried for start in tried)
    assert len(grid) == 5 * spans - neighbours
    influences = step.evidence["influence"][step.start : step.start + 2]
    assert step.evidence["prior_ratios"] == pytest.approx(ratios(influences, 1.0))


def test_the_reference_tries_one_span_and_races_nothing(resident_of: InMemory) -> None:
    resident, corpus = resident_of("llama"), corpus_of(sequences=24)
    model = measured(resident, corpus, after_final_norm=True)
    assert ComePSettings.presets["paper"]["spans"] == 1
    step = ComeP(ComePSettings(**ComePSettings.presets["paper"], granularity=4)).decide(model, 5, [])
    assert step is not None
    grid = step.evidence["grid"]
    assert len(grid) == 5
    assert {(entry["start"], entry["sequences"]) for entry in grid} == {(step.start, 24)}


def test_more_spans_than_there_are(resident_of: InMemory) -> None:
    model = measured(resident_of("llama"), corpus_of(), [select(layer) for layer in (0, 3, 5)])
    step = ComeP(ComePSettings(granularity=1, spans=9, racing=False)).decide(model, 2, [])
    assert step is not None
    # Two spans, a layer dropped each time; the middle one is dropped in both.
    assert len(step.evidence["grid"]) == 3 and step.op is not None
    losses = [measured(model.resident, model.corpus, kept).loss for kept in (
        [select(0), select(3)], [select(0), select(5)], [select(3), select(5)]
    )]  # fmt: skip
    assert sorted(entry["loss"] for entry in step.evidence["grid"]) == pytest.approx(sorted(losses), rel=1e-6)


def _joined(resident: LoadedModel, layers: Any, numbers: Any, corpus: Corpus) -> Op:
    from intarsia.recipe.algebra import concat_of

    kept = [
        {part: sorted(best_pieces(resident, layer, part, numbers[part][index], corpus)) for part in PARTS}
        for index, layer in enumerate(layers)
    ]
    weights = [
        {part: numbers[part][index] / resident.architecture.n_pieces(part) for part in PARTS}
        for index in range(len(layers))
    ]
    return concat_of(
        [select(layer) for layer in layers], kept, weights=weights, norm="fold", architecture=resident.architecture
    )


def test_racing_gives_the_same_for_less(resident_of: InMemory, predictable: Corpus) -> None:
    resident = resident_of("llama")
    steps, spent = {}, {}
    for racing in (False, True):
        model = measured(resident, predictable)
        before = model.layer_forwards
        steps[racing] = ComeP(ComePSettings(granularity=10, racing=racing)).decide(model, 5, [])
        spent[racing] = model.layer_forwards - before
    assert steps[True] is not None and steps[False] is not None
    assert steps[True].op == steps[False].op
    assert spent[True] < spent[False]
    sequences = [entry["sequences"] for entry in steps[True].evidence["grid"]]
    assert max(sequences) == len(predictable) and min(sequences) < len(predictable)
    # Who was dropped early was in truth worse than who was kept.
    full = [entry["loss"] for entry in steps[False].evidence["grid"]]
    assert full[sequences.index(min(sequences))] > min(full)


def test_racing_survives_sequences_that_predict_nothing(resident_of: InMemory) -> None:
    longest_first = corpus_of(padded=True, sequences=24)
    assert longest_first.mask is not None
    ids, mask = longest_first.input_ids.flip(0), longest_first.mask.flip(0)
    corpus = Corpus.of(ids, mask=mask, description="shortest first", documents=1)
    model = measured(resident_of("llama"), corpus)
    assert int(model.counts_N[0]) == 0  # one of the first part
    raced = ComeP(ComePSettings(granularity=4)).decide(model, 5, [])
    grid = raced.evidence["grid"]
    ended = [entry["loss"] for entry in grid if entry["sequences"] == len(corpus)]
    assert len(ended) >= 2 and all(math.isfinite(entry["loss"]) for entry in grid)
    best = next(entry for entry in grid if entry["loss"] == min(ended))
    assert (raced.start, tuple(best["ratios"])) == (best["start"], tuple(best["ratios"]))


def test_a_grid_that_is_finer_than_the_pieces_tries_each_split_once(resident_of: InMemory) -> None:
    model = measured(resident_of("llama"), corpus_of())
    step = ComeP(ComePSettings(granularity=200, racing=False)).decide(model, 5, [])
    assert step is not None
    assert len(step.evidence["grid"]) < 201


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("merge", 1),
        ("sharpness", -1.0),
        ("sharpness", float("nan")),
        ("dominance", 0.0),
        ("dominance", 1.5),
        ("granularity", 0),
        ("spans", 0),
        ("span_choice", "luck"),
    ],
)
def test_settings_that_cannot_be(name: str, bad: Any) -> None:
    with pytest.raises(UserError, match=name.replace("_", "-")):
        ComePSettings(**{name: bad})


def test_every_bad_setting_is_reported() -> None:
    with pytest.raises(UserError) as caught:
        ComePSettings(granularity=-1, spans=0)
    assert [problem.message.split()[0] for problem in caught.value.problems] == ["--granularity", "--spans"]
