"""A streamed model gives exactly the same decisions and weights as one in memory."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from intarsia.activations.hidden_store import MemoryBudget
from intarsia.activations.stream import LayerStream
from intarsia.building.loaded_model import LoadedModel
from intarsia.checkpoint import files
from intarsia.checkpoint.reader import Checkpoint
from intarsia.errors import UserError
from intarsia.evaluation.agreement import Reference
from intarsia.evaluation.answers import Prompts
from intarsia.evaluation.perplexity import Chain, model_of, perplexity
from intarsia.healing import layerwise
from intarsia.healing.pipeline import quality
from intarsia.healing.settings import ClosedFormSettings
from intarsia.healing.stages.layerwise import LayerwiseSettings
from intarsia.healing.training import Text
from intarsia.progress import Progress, reporting_to
from intarsia.pruning.intermediate import Intermediate
from intarsia.pruning.methods.come_p import ComePSettings
from intarsia.recipe.recipe import Recipe, Variant, identity
from intarsia.recipe.schema import content_hash
from tests import families
from tests.closed_form_fits import fit_on
from tests.conftest import InMemory, Opened
from tests.pruning.by_hand import METHODS, climb, ladder_in, planner_of, progressive_methods
from tests.pruning.conftest import corpus_of
from tests.recipes_by_hand import select, shared

CPU = torch.device("cpu")


def streamed(checkpoint: Checkpoint) -> LoadedModel:
    return LoadedModel(checkpoint, device=CPU, stream=True)


@pytest.fixture
def llama(checkpoint_of: Opened) -> LoadedModel:
    return streamed(checkpoint_of("llama"))


def whole(depth: int = families.DEPTH) -> Recipe:
    return identity(Variant(name="base", model="tiny", sha256="0" * 64), depth)


def cut(resident: LoadedModel) -> Recipe:
    """Layers 2 and 3 merged, layer 5 removed."""
    return whole().with_layers([select(0), select(1), shared(resident.architecture, [2, 3]), select(4)])


def ladder(resident: LoadedModel, place: Path, method: str, *, settings: Any = None, **changes: Any) -> list[str]:
    """The hashes of a ladder's recipes, down to half of the model's depth."""
    in_loop = changes.pop("in_loop", None)
    settings = ComePSettings(granularity=3) if settings is None and method == "come-p" else settings
    corpus = corpus_of(padded=True)
    model = Intermediate(resident, corpus, whole().layers, batch_tokens=2 * corpus.seq_len, **changes)
    run = ladder_in(place, {})
    assert climb(planner_of(method, settings), model, whole(), 3, run, in_loop=in_loop) is None
    model.close()
    return [content_hash(run.recipe(depth)) for depth in run.depths()]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_streamed_model_is_the_model(family: str, checkpoint_of: Opened, resident_of: InMemory) -> None:
    """Embedding, buffers, layers and head, bit for bit; two layers in memory at most, and none of them afterwards."""
    resident, other = resident_of(family), streamed(checkpoint_of(family))
    assert {name: buffer.dtype for name, buffer in other.model.named_buffers()} == {
        name: buffer.dtype for name, buffer in resident.model.named_buffers()
    }
    for name, buffer in resident.model.named_buffers():
        assert torch.equal(other.model.get_buffer(name), buffer), name
    corpus = corpus_of(padded=True)
    a, b = LayerStream(resident.model, resident.architecture), LayerStream(other.model, other.architecture)
    with torch.inference_mode():
        entry, again = a.enter(corpus.input_ids, corpus.mask), b.enter(corpus.input_ids, corpus.mask)
        h_BTD, g_BTD = entry.h_BTD, again.h_BTD
        assert torch.equal(h_BTD, g_BTD)
        for index, layer in enumerate(other.walk(other.layers)):
            h_BTD = a.run(resident.layers[index], h_BTD, entry.calls[index])
            g_BTD = b.run(layer, g_BTD, again.calls[index])
            assert torch.equal(h_BTD, g_BTD), index
        logits = a.logits(h_BTD, corpus.input_ids, corpus.mask)
        assert torch.equal(logits, b.logits(g_BTD, corpus.input_ids, corpus.mask))
    assert other.offload is not None and other.offload.most <= 2
    assert all(parameter.is_meta for layer in other.layers for parameter in layer.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_embedding_and_head_leave_memory_behind_every_use(
    family: str, checkpoint_of: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[Any] = []
    monkeypatch.setattr(files, "let_go", gone.append)
    resident = streamed(checkpoint_of(family))
    tables = resident.model.get_input_embeddings().weight, resident.model.get_output_embeddings().weight
    assert (tables[0] is tables[1]) == resident.architecture.tied
    stream, ids_BT = LayerStream(resident.model, resident.architecture), corpus_of().input_ids
    h_BTD = stream.enter(ids_BT, None).h_BTD
    assert any(parameter is tables[0] for parameter in gone)
    gone.clear()
    stream.logits(h_BTD, ids_BT, None)
    assert any(parameter is tables[1] for parameter in gone)


def test_a_layer_at_rest_that_is_run_is_read_for_that_run(llama: LoadedModel) -> None:
    assert llama.offload is not None
    stream = LayerStream(llama.model, llama.architecture)
    entry = stream.enter(corpus_of().input_ids, None)
    before = sum(llama.offload.reads.values())
    once = stream.run(llama.layers[3], entry.h_BTD, entry.calls[3])
    assert torch.equal(stream.run(llama.layers[3], entry.h_BTD, entry.calls[3]), once)
    assert sum(llama.offload.reads.values()) - before == 2
    with llama.awake(llama.layers[3]) as layer:
        assert torch.equal(stream.run(layer, entry.h_BTD, entry.calls[3]), once)
        assert torch.equal(stream.run(layer, entry.h_BTD, entry.calls[3]), once)
    assert sum(llama.offload.reads.values()) - before == 3
    assert all(parameter.is_meta for parameter in llama.layers[3].parameters())


def test_a_walk_that_is_left_early_lets_go_of_what_it_has_read_ahead(llama: LoadedModel) -> None:
    assert llama.offload is not None
    for _ in llama.walk(llama.layers):
        wait_for(llama, 2)  # the next one is read while this one is worked with
        break
    assert llama.offload.in_memory == 0
    made = llama.module(shared(llama.architecture, [1, 2]))
    assert all(parameter.is_meta for parameter in made.parameters())
    for number, layer in enumerate(llama.walk([llama.layers[0], made, made, llama.layers[5]])):
        assert not any(parameter.is_meta for parameter in layer.parameters()), number
    assert llama.offload.in_memory == 0 and llama.offload.most == 2


def wait_for(resident: LoadedModel, layers: int) -> None:
    """Wait until this many layers are in memory; fail on a timeout."""
    assert resident.offload is not None
    for _ in range(3000):
        if resident.offload.in_memory == layers:
            return
        time.sleep(0.01)
    raise AssertionError(f"{resident.offload.in_memory} layers in memory, not {layers}")


# The plus variants never drop the first four and the last two layers: of six, none.
@pytest.mark.parametrize("method", [method for method in METHODS if method[-1] != "+"])
def test_every_method_plans_the_same(method: str, tmp_path: Path, checkpoint_of: Opened, resident_of: InMemory) -> None:
    """With states in memory, and with all of them in files."""
    wanted = ladder(resident_of("qwen2"), tmp_path / "whole", method)
    resident = streamed(checkpoint_of("qwen2"))
    assert ladder(resident, tmp_path / "streamed", method) == wanted
    assert resident.offload is not None and resident.offload.in_memory == 0 and resident.offload.most <= 2
    spilled = ladder(
        streamed(checkpoint_of("qwen2")), tmp_path / "spilled", method, memory_budget=MemoryBudget(0, tmp_path)
    )
    assert spilled == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spilled", "streamed", "whole"]


@pytest.mark.parametrize("method", [method for method in progressive_methods() if method != "laco"])
def test_healing_in_the_loop_is_the_same(
    method: str, tmp_path: Path, checkpoint_of: Opened, resident_of: InMemory
) -> None:
    rule = ClosedFormSettings(held_out=2)
    wanted = ladder(resident_of("llama"), tmp_path / "whole", method, in_loop=rule)
    resident = streamed(checkpoint_of("llama"))
    assert ladder(resident, tmp_path / "streamed", method, in_loop=rule) == wanted
    assert resident.offload is not None and resident.offload.most <= 2


def test_spans_are_chosen_the_same(tmp_path: Path, checkpoint_of: Opened, resident_of: InMemory) -> None:
    settings = ComePSettings(span_choice="sleb", racing=False, granularity=3)
    wanted = ladder(resident_of("llama"), tmp_path / "whole", "come-p", settings=settings)
    assert ladder(streamed(checkpoint_of("llama")), tmp_path / "streamed", "come-p", settings=settings) == wanted


def test_a_step_reads_a_layer_once_a_pass(checkpoint_of: Opened, tmp_path: Path) -> None:
    """However many batches, candidates and ratios there are: measuring is one pass, and comparing ratios another."""
    resident, corpus = streamed(checkpoint_of("llama")), corpus_of()
    assert resident.offload is not None
    model = Intermediate(resident, corpus, whole().layers, batch_tokens=corpus.seq_len)
    resident.offload.reads.clear()
    model.measure()
    assert len(corpus) == 6 and set(resident.offload.reads.values()) == {1} and len(resident.offload.reads) == 6
    planner = planner_of("come-p", ComePSettings(racing=False, spans=3))
    resident.offload.reads.clear()
    step = planner.decide(model, 5, [{}])  # not the first step, whose map of pieces looks at every layer
    assert step is not None and step.op is not None
    assert len(step.evidence["grid"]) > 20
    originals = [resident.offload.reads[op] for op in resident.offload.reads if op in ORIGINALS]
    # Once for its pieces, once for all candidates before it; and where it is a candidate itself (a ratio of 1), of
    # either span that it is in.
    assert max(originals) <= 4
    resident.offload.reads.clear()
    model.replace(step.start, step.count, step.op)
    assert set(resident.offload.reads.values()) == {1}
    assert sum(resident.offload.reads.values()) == model.depth - step.start
    model.close()


ORIGINALS = {replace(select(layer), source=replace(select(layer).source, variant="")) for layer in range(6)}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_healed_tensors_are_the_same(family: str, checkpoint_of: Opened, resident_of: InMemory) -> None:
    resident, other, corpus = resident_of(family), streamed(checkpoint_of(family)), corpus_of(padded=True)
    recipe = whole().with_layers([select(0), select(2), select(4), select(5)])
    settings = ClosedFormSettings(held_out=2)
    wanted, reports = fit_on(recipe, resident, corpus, settings=settings, batch_tokens=26)
    found, same = fit_on(
        recipe, other, corpus, settings=settings, batch_tokens=26, memory_budget=MemoryBudget(memory_bytes=0)
    )
    assert content_hash(found) == content_hash(wanted)
    assert same == reports and any(report["ridge"] is not None for report in reports)
    assert other.offload is not None and other.offload.most <= 2
    measured = quality(wanted, resident, [corpus, corpus_of()])
    assert quality(found, other, [corpus, corpus_of()]) == measured


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_layers_are_trained_the_same(inputs: Any, checkpoint_of: Opened, resident_of: InMemory) -> None:
    resident, other = resident_of("llama"), streamed(checkpoint_of("llama"))
    text = Text.of(corpus_of(sequences=12), corpus_of(sequences=4))
    settings = LayerwiseSettings(batch_tokens=26, inputs=inputs)
    wanted, _ = layerwise.train(cut(resident), resident, text, settings=settings)
    found, _ = layerwise.train(cut(other), other, text, settings=settings, memory_bytes=0)
    assert wanted.fitted and content_hash(found) == content_hash(wanted)
    assert other.offload is not None and other.offload.most <= 2


def test_perplexity_is_the_same_and_reads_a_layer_once(checkpoint_of: Opened, resident_of: InMemory) -> None:
    resident, other, corpus = resident_of("llama"), streamed(checkpoint_of("llama")), corpus_of(padded=True)
    assert other.offload is not None
    chain = Chain(whole(), other)
    other.offload.reads.clear()
    found = perplexity(chain, corpus, batch_tokens=26)
    assert found == perplexity(Chain(whole(), resident), corpus, batch_tokens=26)
    assert found.value == pytest.approx(perplexity(resident.model, corpus, batch_tokens=26).value, rel=1e-6)
    assert set(other.offload.reads.values()) == {1}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_agreement_along_given_answers_is_the_same(family: str, checkpoint_of: Opened, resident_of: InMemory) -> None:
    """As along those that the original writes; each model reads a layer once."""
    resident, other, tokenizer = resident_of(family), streamed(checkpoint_of(family)), families.make_tokenizer()
    asked = Prompts.of(("roti sa", "a", "kana roti lu mi"), tokenizer, source="by hand")
    whole = Reference.of(resident.model, tokenizer, asked, answer_tokens=9)
    wanted = whole.score(whole.follow(model_of(cut(resident), resident)), resident.model)
    assert other.offload is not None
    original, small = model_of(None, other), model_of(cut(other), other)
    other.offload.reads.clear()
    reference = Reference.of(original, tokenizer, replace(asked, given=whole.answers), answer_tokens=9)
    assert set(other.offload.reads.values()) == {1} and len(other.offload.reads) == families.DEPTH
    other.offload.reads.clear()
    followed = reference.follow(small)
    assert set(other.offload.reads.values()) == {1} and followed.answers is None
    found = reference.score(followed, None)
    assert found.agreement == wanted.agreement and 0.0 < found.agreement.value < 1.0
    assert found.kl.value == pytest.approx(wanted.kl.value, rel=1e-5)
    assert found.tokens == wanted.tokens and wanted.loops is not None
    assert (found.loops, found.length, found.perplexity, found.examples) == (None, None, None, ())
    assert found.measures().keys() == {"agreement", "next_token_kl"}
    assert reference.itself().agreement.value == 1.0


def test_a_shard_that_disappears_is_named(tmp_path: Path) -> None:
    folder = families.save(families.make_model("llama"), tmp_path, max_shard_size="20KB")
    checkpoint = Checkpoint.open(folder, model=str(folder))
    resident = streamed(checkpoint)
    shards = {
        checkpoint.headers[checkpoint.architecture.tensor_name(4, name)].file
        for name in checkpoint.architecture.layer_shapes()
    }
    model = Intermediate(resident, corpus_of(), whole().layers)
    for shard in shards:
        shard.unlink()
    with pytest.raises(UserError) as caught:
        model.measure()
    assert any(str(shard) in str(caught.value) for shard in shards)
    assert resident.offload is not None and resident.offload.in_memory == 0


class OutOfMemory:
    """Makes a stream's layers run out of memory above a number of sequences."""

    def __init__(self, most: int) -> None:
        self.most, self.sizes = most, Counter[int]()

    def run(self, layer: Any, h_BTD: Tensor, call: Any) -> Tensor:
        self.sizes[h_BTD.shape[0]] += 1
        if h_BTD.shape[0] > self.most:
            raise torch.OutOfMemoryError("out of memory")
        out = layer(h_BTD, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out


class Saying(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> OutOfMemory:
    monkeypatch.setattr("intarsia.activations.batches.workers_for", lambda device, at_most: 1)  # as on a GPU
    device = OutOfMemory(1)
    monkeypatch.setattr(LayerStream, "run", lambda self, layer, h_BTD, call: device.run(layer, h_BTD, call))
    return device


def test_a_batch_is_halved_where_memory_runs_out(small_device: OutOfMemory, resident_of: InMemory) -> None:
    resident, corpus, progress = resident_of("llama"), corpus_of(), Saying()
    small_device.most = 6
    wanted = Intermediate(resident, corpus, whole().layers, batch_tokens=13)
    wanted.measure()
    small_device.most = 2
    model = Intermediate(resident, corpus, whole().layers, batch_tokens=1000)
    with reporting_to(progress):
        model.measure()
    assert model.batches.size == 2
    assert progress.said == [
        "cpu is out of memory: continuing with 3 sequences at a time, not 6",
        "cpu is out of memory: continuing with 2 sequences at a time, not 3",
    ]
    torch.testing.assert_close(model.losses_N, wanted.losses_N)
    for found, expected in zip(model.measures, wanted.measures, strict=True):
        assert found.tokens == expected.tokens == corpus.tokens
        assert found.influence == pytest.approx(expected.influence, rel=1e-4)
        assert found.channels["mlp"].tokens == corpus.tokens
    progress.said.clear()
    recipe = whole().with_layers([select(0), select(2), select(4), select(5)])
    with reporting_to(progress):
        fit_on(recipe, resident, corpus, batch_tokens=1000)
    assert progress.said[-1] == "cpu is out of memory: continuing with 2 sequences at a time, not 3"


def test_one_sequence_that_is_too_much_is_the_end(small_device: OutOfMemory, resident_of: InMemory) -> None:
    small_device.most = 0
    model = Intermediate(resident_of("llama"), corpus_of(), whole().layers)
    with pytest.raises(UserError, match="--stream"):
        model.measure()
    assert small_device.sizes[1] == 1
