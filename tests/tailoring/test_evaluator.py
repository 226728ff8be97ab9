"""Candidates scored in memory: as their built folders are scored, whatever was scored before, and at what cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.tailor_trial import Meter
from intarsia.activations.loss import TOP
from intarsia.building.loaded_model import LoadedModel
from intarsia.building.materialize import materialize
from intarsia.data.corpus import Corpus
from intarsia.errors import UserError
from intarsia.evaluation.likelihood import default_batch_tokens, score_requests
from intarsia.evaluation.perplexity import perplexity
from intarsia.options import Runtime
from intarsia.recipe import schema
from intarsia.recipe.algebra import reference_layers
from intarsia.recipe.recipe import Concat, Cut, LayerRef, Merge, Op, Recipe, Select, Variant, derive_spans
from intarsia.tailoring.evaluator import Evaluator, Outcome
from intarsia.tailoring.family import Family
from intarsia.tailoring.family_file import FamilyFile, MemberSpec, ObjectiveSpec, SearchSpec, TargetSpec
from intarsia.tailoring.objective import Objective
from intarsia.tailoring.trial_run import TrialFailed
from tests import families
from tests.closed_form_fits import fit_on

Pair = Callable[[str], Family]
WORDS = families.sample_text(600, seed=5).split()
BUDGET = 12


@pytest.fixture(scope="module")
def objectives(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> tuple[ObjectiveSpec, ...]:
    folder = tmp_path_factory.mktemp("objectives")
    quiz = [
        {"query": " ".join(WORDS[at : at + 1 + at % 7]), "choices": WORDS[at + 8 : at + 11], "gold": at % 3}
        for at in range(20)
    ]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in quiz))
    targets = [{"query": f"{WORDS[at]}:", "target": " " + " ".join(WORDS[at : at + 3])} for at in range(9)]
    (folder / "cot.jsonl").write_text("".join(json.dumps(line) + "\n" for line in targets))
    quiz_file = str(folder / "quiz.jsonl")
    return (
        ObjectiveSpec(name="right", task=quiz_file, metric="accuracy"),
        ObjectiveSpec(name="sure", task=quiz_file, metric="margin"),
        ObjectiveSpec(name="cot", loss=str(folder / "cot.jsonl")),
        ObjectiveSpec(name="prose", loss=str(text_file)),
        ObjectiveSpec(name="near", kl=str(text_file)),
    )


def opened(
    family: Family,
    objectives: Sequence[ObjectiveSpec],
    *,
    least: int = BUDGET,
    most: int = BUDGET,
    heal: Literal["none", "finalists", "every"] = "none",
    memory: str | None = None,
    **settings: Any,
) -> Evaluator:
    spec = FamilyFile(
        base=MemberSpec(model=family.members[0].model),
        target=TargetSpec(layers=4),
        objectives=tuple(objectives),
        search=SearchSpec(min_budget=least, max_budget=most),
        heal=heal,
    )
    return Evaluator(family, spec, Runtime(device="cpu", memory=memory), seq_len=24, **settings)


def select(layer: int, variant: str = "base") -> Select:
    return Select(source=LayerRef(variant=variant, layer=layer))


def merged(layer: int, weight: float = 0.25) -> Merge:
    return Merge(
        sources=(LayerRef(variant="math", layer=layer),),
        weights=(weight,),
        method="task_arithmetic",
        base=LayerRef(variant="base", layer=layer),
    )


def recipe(family: Family, *layers: Op) -> Recipe:
    variants = tuple(Variant(name=member.name, model=member.model) for member in family.members)
    return Recipe(variants=variants, base="base", depth=6, layers=layers, spans=derive_spans(layers, 6))


def objective_of(evaluator: Evaluator, name: str) -> Objective:
    return evaluator.measured[evaluator.objectives.index(name)]


def cost_of(evaluator: Evaluator, outcome: Outcome, name: str) -> float:
    return outcome.costs[evaluator.objectives.index(name)]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_as_the_built_folder_is_scored(
    family: str, pair: Pair, objectives: Sequence[ObjectiveSpec], tmp_path: Path
) -> None:
    members = pair(family)
    evaluator = opened(members, objectives, probe=False)
    made = recipe(members, select(0), select(1, "math"), merged(3), select(5))
    outcome = evaluator.evaluate(made, BUDGET)
    assert outcome.examples == (12, 12, 9, 12, 12)
    materialize(made, members.checkpoints(), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name in ("right", "sure", "cot"):
        objective = objective_of(evaluator, name)
        requests = [request for example in objective.examples[:BUDGET] for request in example.requests]
        sums = score_requests(model, requests, batch_tokens=default_batch_tokens(torch.device("cpu"))).sums_R
        expected, _ = objective.cost(objective.scores(sums.numpy()))
        # Targets go in rows without masks here, so that they are the same but for rounding.
        close = pytest.approx(expected, rel=1e-6) if name == "cot" else expected
        assert cost_of(evaluator, outcome, name) == close
    rows = [[*e.requests[0].context, *e.requests[0].continuation] for e in objective_of(evaluator, "prose").examples]
    corpus = Corpus.of(torch.tensor(rows), description="windows", documents=1)
    assert cost_of(evaluator, outcome, "prose") == pytest.approx(perplexity(model, corpus).nll, rel=1e-6)


def test_divergence_by_hand(pair: Pair, objectives: Sequence[ObjectiveSpec]) -> None:
    members = pair("llama")
    evaluator = opened(members, objectives[-1:])
    assert evaluator.base is not None and evaluator.base.costs[0] == pytest.approx(0.0, abs=1e-6)
    found = evaluator.evaluate(recipe(members, *(select(layer, "math") for layer in range(6))), BUDGET)
    base, other = (
        AutoModelForCausalLM.from_pretrained(members.members[0].model).eval(),
        AutoModelForCausalLM.from_pretrained(members.members[1].model).eval(),
    )
    # The head and the embedding are the base's, the layers the variant's.
    other.set_input_embeddings(base.get_input_embeddings())
    other.set_output_embeddings(base.get_output_embeddings())
    other.model.norm = base.model.norm
    total, full, positions = 0.0, 0.0, 0
    for example in objective_of(evaluator, "near").examples[:BUDGET]:
        ids = torch.tensor([[*example.requests[0].context, *example.requests[0].continuation]])
        with torch.inference_mode():
            p, q = (F.softmax(model(input_ids=ids).logits[0, :-1].double(), -1) for model in (base, other))
        for p_V, q_V in zip(p, q, strict=True):
            kept = p_V.topk(TOP).indices
            p_K = torch.cat([p_V[kept], 1 - p_V[kept].sum()[None]])
            q_K = torch.cat([q_V[kept], 1 - q_V[kept].sum()[None]])
            total += float((p_K * (p_K / q_K).log()).sum())
            full += float((p_V * (p_V / q_V).log()).sum())
            positions += 1
    assert found.costs[0] == pytest.approx(total / positions, rel=1e-4)
    assert 0.5 * full < total <= full


def test_caches_change_nothing(trio: Family, objectives: Sequence[ObjectiveSpec]) -> None:
    recipes = [
        recipe(trio, select(1, "math"), select(1, "lora"), merged(3), select(5)),
        recipe(trio, select(1, "math"), select(1, "lora"), merged(3, 0.75), select(5)),
        recipe(trio, select(1, "math"), select(2), select(3, "math"), select(5)),
        recipe(trio, select(1, "math"), select(1, "lora"), merged(3), select(4)),
    ]
    # None begins as the base, whose states are there from the divergence.
    shared = opened(trio, objectives, least=3)
    tiny = opened(trio, objectives, least=3, memory="2KB", probe=False)
    for budget in (4, BUDGET, 7, 1):
        for made in recipes:
            alone = opened(trio, objectives, least=3, probe=False).evaluate(made, budget)
            assert alone.layer_forwards == 4.0 and alone.details["reused"] == 0.0
            assert shared.evaluate(made, budget).costs == alone.costs
            assert tiny.evaluate(made, budget).costs == alone.costs
    assert tiny.runner.prefixes.states.nbytes <= 1000


def test_batches_side_by_side_change_nothing(trio: Family, objectives: Sequence[ObjectiveSpec]) -> None:
    made = [recipe(trio, select(1, "math"), merged(3), select(layer)) for layer in (4, 5)]
    alone = opened(trio, objectives, least=3)
    expected = [alone.evaluate(each, BUDGET) for each in made]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        two = opened(trio, objectives, least=3)
        found = [two.evaluate(each, BUDGET) for each in made]
    finally:
        torch.set_num_threads(threads)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.costs == pytest.approx(theirs.costs, rel=1e-6)
        assert (ours.layer_forwards, ours.examples) == (theirs.layer_forwards, theirs.examples)


def test_a_trial_costs_what_is_new_in_it(pair: Pair, objectives: Sequence[ObjectiveSpec]) -> None:
    members = pair("llama")
    evaluator = opened(members, objectives[:4], least=4, probe=False)
    first = recipe(members, select(0), select(1), merged(3), select(5))
    assert evaluator.evaluate(first, 4).layer_forwards == 4.0
    again = evaluator.evaluate(first, 4)
    assert again.layer_forwards == 0.0 and again.details["reused"] == 1.0
    # Two layers in common, and a merged one that is new.
    second = evaluator.evaluate(recipe(members, select(0), select(1), merged(3, 0.5), select(5)), 4)
    assert second.layer_forwards == 2.0 and second.details["layers_made"] == 1
    # The same layer after others is run again, but not made again.
    moved = evaluator.evaluate(recipe(members, select(1), select(2), merged(3), select(5)), 4)
    assert moved.layer_forwards == 4.0 and moved.details["layers_made"] == 0
    # A larger budget is run on what is new in it.
    small = evaluator.evaluate(first, 4).details["tokens"]
    larger = evaluator.evaluate(first, BUDGET)
    assert larger.details["tokens"] > small
    assert larger.layer_forwards == pytest.approx(4 * (1 - small / larger.details["tokens"]))


def test_a_larger_budget_contains_the_smaller(pair: Pair, objectives: Sequence[ObjectiveSpec]) -> None:
    """By the examples' own scores: what is new is the difference of the two."""
    members = pair("llama")
    evaluator = opened(members, objectives[1:2], least=4)
    made = recipe(members, select(0), select(2), select(5))
    few = evaluator.evaluate(made, 4).costs[0]
    all_of_them = evaluator.scores(made, BUDGET)[0]
    assert few == pytest.approx(float(np.mean(all_of_them[:4])), rel=1e-12)
    assert evaluator.most == 20
    assert evaluator.evaluate(made, 20).examples == (20,)


def test_the_base_and_what_the_data_are(pair: Pair, objectives: Sequence[ObjectiveSpec]) -> None:
    members = pair("llama")
    evaluator = opened(members, objectives)
    assert evaluator.objectives == ("right", "sure", "cot", "prose", "near")
    assert evaluator.base is not None
    assert evaluator.evaluate(evaluator.unpruned, BUDGET).costs == evaluator.base.costs
    assert evaluator.data["right"] == evaluator.data["sure"] != evaluator.data["cot"]
    evaluator.close()
    assert evaluator.runner.prefixes.states.nbytes == 0
    assert evaluator.evaluate(evaluator.unpruned, BUDGET).costs == evaluator.base.costs


def test_healed(pair: Pair, objectives: Sequence[ObjectiveSpec]) -> None:
    members = pair("llama")
    evaluator = opened(members, objectives[2:4], heal="finalists", most=30, probe=False)
    made = recipe(members, select(0), select(1), select(3), select(5))
    plain = evaluator.evaluate(made, 8)
    healed = evaluator.evaluate(made, 8, healed=True)
    fitted = evaluator.heal(made)
    assert fitted.fitted and not made.fitted
    assert evaluator.evaluate(fitted, 8).costs == healed.costs
    assert healed.costs != plain.costs and all(map(np.isfinite, healed.costs))
    assert healed.layer_forwards > plain.layer_forwards
    # The same fit as outside the search.
    checkpoint = members.checkpoints()["base"]
    assert evaluator._heal_on is not None
    expected, _ = fit_on(made, LoadedModel(checkpoint, device=torch.device("cpu")), evaluator._heal_on)
    assert expected.fitted.keys() == fitted.fitted.keys()
    for index, tensors in expected.fitted.items():
        assert all(np.array_equal(tensors[name], fitted.fitted[index][name]) for name in tensors)
    merged_too = evaluator.heal(recipe(members, select(0), select(1, "math"), merged(3), select(5)))
    assert set(merged_too.fitted) <= {1, 2, 3} and merged_too.fitted


def test_a_fit_is_found_again(pair: Pair, objectives: Sequence[ObjectiveSpec], tmp_path: Path) -> None:
    """While the folder for fits is there; where it is damaged, or the disk is full, the recipe is fitted again."""
    members = pair("llama")
    made = recipe(members, select(0), select(1), select(3), select(5))
    fits = tmp_path / "fits"
    evaluator = opened(members, objectives[2:4], heal="finalists", most=30, probe=False, fits=fits)
    healed = evaluator.heal(made)
    assert not fits.exists()
    fits.mkdir()
    first = schema.content_hash(healed)
    assert schema.content_hash(evaluator.heal(made)) == first
    file, side = fits / f"{schema.content_hash(made)}.yaml", fits / f"{schema.content_hash(made)}.safetensors"
    assert {*fits.iterdir()} == {file, side}
    # What is found is what is there.
    index, name = next((index, name) for index, tensors in healed.fitted.items() for name in tensors)
    other = {index: {name: np.zeros_like(healed.fitted[index][name])}}
    schema.save(replace(made, fitted=other), file)
    assert not evaluator.heal(made).fitted[index][name].any()
    side.write_bytes(side.read_bytes()[:100])
    assert schema.content_hash(evaluator.heal(made)) == first == schema.content_hash(evaluator.heal(made))
    assert schema.content_hash(schema.load(file)) == first


def test_no_room_for_a_fit(
    pair: Pair, objectives: Sequence[ObjectiveSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise UserError("A full disk.")

    monkeypatch.setattr(schema, "write_tensors", full)
    members = pair("llama")
    evaluator = opened(members, objectives[2:4], heal="finalists", most=30, probe=False, fits=tmp_path)
    assert evaluator.heal(recipe(members, select(0), select(1), select(3), select(5))).fitted
    assert not list(tmp_path.iterdir())


def test_healed_towards_the_same_blend_unpruned(trio: Family, objectives: Sequence[ObjectiveSpec]) -> None:
    """A cut of one member in the family is fitted as the same cut of that member alone, towards the member."""
    evaluator = opened(trio, objectives[2:4], heal="finalists", most=30, probe=False)
    kept = (0, 1, 3, 5)
    fitted = evaluator.heal(recipe(trio, *(select(layer, "lora") for layer in kept)))
    alone = replace(recipe(trio, *(select(layer) for layer in kept)), variants=(Variant(name="base", model="lora"),))
    assert evaluator._heal_on is not None
    member = LoadedModel(trio.checkpoints()["lora"], device=torch.device("cpu"))
    expected, _ = fit_on(alone, member, evaluator._heal_on)
    to_base, _ = fit_on(recipe(trio, *(select(layer, "lora") for layer in kept)), evaluator.model, evaluator._heal_on)
    assert expected.fitted.keys() == fitted.fitted.keys() != set()
    differs = False
    for index, tensors in expected.fitted.items():
        for name, array in tensors.items():
            np.testing.assert_allclose(array, fitted.fitted[index][name], rtol=1e-4, atol=1e-6)
            differs |= not np.allclose(to_base.fitted.get(index, {}).get(name, 0.0), array, rtol=1e-2)
    assert differs


def test_unpruned(trio: Family) -> None:
    joined = Concat(
        cuts=(
            Cut(source=LayerRef(variant="base", layer=3), kv_groups=(0,), channels=(0,), weights={}),
            Cut(source=LayerRef(variant="lora", layer=4), kv_groups=(1,), channels=(1,), weights={}),
        )
    )
    made = recipe(trio, select(0, "lora"), replace(merged(2), scale=0.9), joined, select(5))
    assert made.spans == ((0, 2), (2, 3), (3, 5), (5, 6))
    expected = (select(0, "lora"), select(1, "lora"), merged(2), select(3), select(4, "lora"), select(5))
    assert reference_layers(made) == expected
    wide = recipe(trio, select(1, "math"), merged(3))
    assert reference_layers(wide) == (
        *(select(layer, "math") for layer in range(3)),
        *(merged(layer) for layer in (3, 4, 5)),
    )


def test_a_fit_does_not_see_the_windows_that_are_scored(pair: Pair, objectives: Sequence[ObjectiveSpec]) -> None:
    evaluator = opened(pair("llama"), objectives[3:4], heal="finalists", probe=False)
    assert evaluator._heal_on is not None
    fitted_on = {tuple(row) for row in evaluator._heal_on.input_ids.tolist()}
    (prose,) = evaluator.measured
    windows = [(*example.requests[0].context, *example.requests[0].continuation) for example in prose.examples]
    assert not fitted_on & set(windows[:BUDGET])
    assert len(fitted_on) > 16 and fitted_on <= set(windows)


def test_healing_needs_tokens(pair: Pair, objectives: Sequence[ObjectiveSpec]) -> None:
    with pytest.raises(UserError, match=r"The examples have \d+ tokens; .* at least 384"):
        opened(pair("llama"), objectives[:1], heal="every")


def test_a_failed_trial_is_no_score(broken: Callable[[], Family], objectives: Sequence[ObjectiveSpec]) -> None:
    family = broken()
    evaluator = opened(family, objectives, probe=False)
    good = recipe(family, select(0), select(1), select(5))
    before = evaluator.evaluate(good, 4)
    with pytest.raises(TrialFailed, match="sick:4 is NaN or infinite"):
        evaluator.evaluate(recipe(family, select(0), select(1), select(4, "sick")), 4)
    assert evaluator.evaluate(good, 4).costs == before.costs


def test_infinite_states_are_a_failure(pair: Pair, objectives: Sequence[ObjectiveSpec]) -> None:
    """Every tensor is finite; what they make of a text is not."""
    members = pair("llama")
    evaluator = opened(members, objectives[3:], probe=False)
    layers = (select(0), merged(3, 1e30), select(5))
    with pytest.raises(TrialFailed, match="NaN or infinity in prose"):
        evaluator.evaluate(recipe(members, *layers), 4)


def test_a_lack_of_memory_for_the_base_is_made_up_for(
    pair: Pair, objectives: Sequence[ObjectiveSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails at the second batch of the base's distributions: the next trial measures all of them."""
    evaluator = opened(pair("llama"), objectives[-1:], probe=False)
    evaluator._batch_tokens = 24
    usual, calls = evaluator.runner.stream.logits, iter(range(1000))

    def fails_once(*given: Any) -> Tensor:
        if next(calls) == 1:
            raise MemoryError
        return usual(*given)

    monkeypatch.setattr(evaluator.runner.stream, "logits", fails_once)
    with pytest.raises(TrialFailed):
        evaluator.evaluate(evaluator.unpruned, 4)
    assert evaluator.evaluate(evaluator.unpruned, 4).costs == pytest.approx((0.0,), abs=1e-6)


@pytest.mark.parametrize(
    ("error", "message"),
    [(MemoryError("no room"), "out of memory: no room"), (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out")],
)
def test_a_lack_of_memory_is_a_failure(
    error: Exception,
    message: str,
    pair: Pair,
    objectives: Sequence[ObjectiveSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    members = pair("llama")
    evaluator = opened(members, objectives[3:])
    made = recipe(members, select(0), select(1), select(5))
    before = evaluator.evaluate(made, 4)
    assert evaluator.runner.prefixes.states.nbytes > 0
    new = recipe(members, select(0), select(1), merged(5))

    def fails(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(evaluator.runner.stream, "logits", fails)
        with pytest.raises(TrialFailed, match=message):
            evaluator.evaluate(new, 4)
    assert evaluator.runner.prefixes.states.nbytes == 0
    assert evaluator.evaluate(made, 4).costs == before.costs
    with monkeypatch.context() as patched:
        error = RuntimeError("shapes differ")
        patched.setattr(evaluator.runner.stream, "logits", fails)
        with pytest.raises(RuntimeError, match="shapes differ"):
            evaluator.evaluate(new, 4)


def test_bad_input(pair: Pair, objectives: Sequence[ObjectiveSpec]) -> None:
    members = pair("llama")
    evaluator = opened(members, objectives[:3], probe=False)
    good = recipe(members, select(0), select(1), select(5))
    for budget in (0, 21):
        with pytest.raises(UserError, match=f"The budget is {budget}; the objectives have 1 to 20 examples"):
            evaluator.evaluate(good, budget)
    with pytest.raises(UserError, match="code"):
        evaluator.evaluate(recipe(members, select(0), select(1, "code")), 4)
    with pytest.raises(UserError, match=r"max_budget is 21; .* at most 20 examples \(right: 20, sure: 20, cot: 9\)"):
        opened(members, objectives[:3], most=21)


def test_an_objective_whose_every_answer_is_the_same(
    pair: Pair, objectives: Sequence[ObjectiveSpec], tmp_path: Path
) -> None:
    members = pair("llama")
    evaluator = opened(members, objectives[:1])
    scores = evaluator.scores(evaluator.unpruned, 20)[0]
    order = objective_of(evaluator, "right").examples
    wrong = {example.requests for example, score in zip(order, scores, strict=True) if score}
    lines = Path(objectives[0].source).read_text().splitlines()
    file = tmp_path / "hard.jsonl"
    kept = [line for line in lines if _requests(line) in wrong]
    assert 2 <= len(kept) < 20
    file.write_text("\n".join(kept))
    spec = ObjectiveSpec(name="hard", task=str(file), metric="accuracy")
    with pytest.raises(UserError, match=rf"hard .* the same for each of its {len(kept)} examples"):
        opened(members, [spec], least=1, most=len(kept))
    opened(members, [spec], least=1, most=len(kept), probe=False)


def _requests(line: str) -> tuple[Any, ...]:
    from intarsia.evaluation.likelihood import encode_pairs

    record = json.loads(line)
    pairs = [(record["query"], " " + choice) for choice in record["choices"]]
    return encode_pairs(pairs, families.make_tokenizer(), max_length=None, where="quiz")


def test_what_the_benchmark_takes_for_the_forward_pass(
    pair: Pair, objectives: Sequence[ObjectiveSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer of every batch, and norm and head after them, each once; on a clock that counts how often it is
    read."""
    members = pair("llama")
    evaluator = opened(members, objectives[:1], probe=False)
    ticks = iter(range(10_000))
    monkeypatch.setattr("benchmarks.tailor_trial.time.process_time", lambda: next(ticks))
    meter = Meter(evaluator)
    made = recipe(members, select(0), select(1, "math"), merged(3), select(5))
    evaluator.evaluate(made, BUDGET)
    tokens = default_batch_tokens(torch.device("cpu"))
    batches = objective_of(evaluator, "right").batches((0, BUDGET), pack=True, batch_tokens=tokens)
    assert meter.seconds == len(batches) * (4 + 1)
