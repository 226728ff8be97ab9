from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.data.conversations import Turns, learn_turns
from intarsia.data.self_text import Sampling, self_corpus
from intarsia.errors import UserError
from intarsia.progress import Progress, reporting_to
from tests import families


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "selftext"


def _write(model: Any, tokenizer: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = {"n": 3, "seq_len": 32, "seed": 0}
    return self_corpus(model, tokenizer, **{**settings, **changes})


def _fails() -> Any:
    raise AssertionError("the model was asked for")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_writes_what_the_model_would_write(family: str) -> None:
    """With one candidate the text is the model's own greedy continuation, worked out without a cache."""
    model, tokenizer = families.make_model(family), families.make_tokenizer()
    corpus = _write(model, tokenizer, n=2, seq_len=20, sampling=Sampling(top_k=1, shortest_turn=0))
    assert corpus.input_ids.shape == (2, 20) and corpus.mask is None
    ids = corpus.input_ids[:1, :1]
    with torch.inference_mode():
        while ids.shape[1] < 20:
            logits = model(input_ids=ids, use_cache=False).logits[:, -1, : len(tokenizer)]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert corpus.input_ids[0].tolist() == ids[0].tolist()


@pytest.mark.parametrize("chat", [False, True])
def test_same_seed_same_bytes(chat: bool) -> None:
    model, tokenizer = families.make_model("llama"), families.make_tokenizer(chat=chat)
    state = torch.get_rng_state()
    first, again, other = (_write(model, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.sha256 == again.sha256 != other.sha256
    assert len({tuple(row) for row in first.input_ids.tolist()}) == 3
    assert int(first.input_ids.max()) < len(tokenizer)


def test_batches_do_not_repeat_each_other() -> None:
    model, tokenizer = families.make_model("llama"), families.make_tokenizer()
    corpus = _write(model, tokenizer, n=5, sampling=Sampling(most_rows=2))
    assert corpus.input_ids.shape == (5, 32)
    assert len({tuple(row) for row in corpus.input_ids.tolist()}) == 5


def test_conversations_follow_the_template() -> None:
    model, tokenizer = families.make_model("llama"), families.make_tokenizer(chat=True)
    sampling = Sampling(shortest_turn=2, longest_question=5, longest_answer=9)
    corpus = _write(model, tokenizer, n=2, seq_len=200, sampling=sampling)
    user, assistant = (tokenizer(f"<|{role}|>")["input_ids"] for role in ("user", "assistant"))
    row = corpus.input_ids[0].tolist()
    lengths: dict[str, list[int]] = {"user": [], "assistant": []}
    at, role = 0, "user"
    while True:
        header = user if role == "user" else assistant
        if at + len(header) > len(row):
            break
        assert row[at : at + len(header)] == header
        at += len(header)
        if 0 not in row[at:]:
            break
        end = row.index(0, at)  # EOS ends a turn
        lengths[role].append(end - at)
        at, role = end + 1, "assistant" if role == "user" else "user"
    assert len(lengths["assistant"]) >= 2
    assert min(lengths["user"]) >= 2 and max(lengths["user"]) <= 5
    assert min(lengths["assistant"]) >= 2 and max(lengths["assistant"]) <= 9


@pytest.mark.parametrize("top_k", [1000, 50])
def test_sampling_follows_the_models_distribution(top_k: int) -> None:
    """The first free token of many rows is spread as the model has it: its top-k, and of those top-p."""
    model, tokenizer = families.make_model("llama"), families.make_tokenizer()
    sampling = Sampling(top_k=top_k, top_p=0.6, most_rows=2000)
    corpus = _write(model, tokenizer, n=2000, seq_len=2, sampling=sampling)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[0]])).logits[0, -1].double()
    logits[0] = -torch.inf  # a document does not end at once
    logits, ids = logits[: len(tokenizer)].sort(descending=True)
    p = logits[:top_k].softmax(-1)
    kept = int((p.cumsum(0) - p < 0.6).sum())
    found = Counter(corpus.input_ids[:, 1].tolist())
    assert set(found) <= set(ids[:kept].tolist())
    expected = p[:kept] / p[:kept].sum() * 2000
    counts = torch.tensor([found[i] for i in ids[:kept].tolist()])
    assert 10 < kept < len(p)
    assert bool(((counts - expected).abs() < 5 * expected.sqrt()).all())


def test_cached(cache: Path) -> None:
    model, tokenizer = families.make_model("llama"), families.make_tokenizer()
    first = _write(lambda: model, tokenizer, cache_key="abc")
    assert len(list(cache.iterdir())) == 1
    again = _write(_fails, tokenizer, cache_key="abc")
    assert (again.sha256, again.documents) == (first.sha256, first.documents)
    for changes in ({"cache_key": "abd"}, {"seed": 1}, {"n": 2}, {"sampling": Sampling(top_k=5)}):
        with pytest.raises(AssertionError, match="was asked for"):
            _write(_fails, tokenizer, **{"cache_key": "abc", **changes})
    next(cache.iterdir()).write_bytes(b"broken")
    assert _write(model, tokenizer, cache_key="abc").sha256 == first.sha256
    assert _write(_fails, tokenizer, cache_key="abc").sha256 == first.sha256
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("INTARSIA_CACHE", str(tmp_path / "file"))
    assert len(_write(families.make_model("llama"), families.make_tokenizer(), cache_key="abc")) == 3


def test_progress_reaches_its_total() -> None:
    class Watching(Progress):
        total = done = 0.0

        def task(self, title: str, total: float, *, units: float | None = None) -> Any:
            self.total += total
            return super().task(title, total)

    class Counting:
        def __init__(self, to: Watching) -> None:
            self.to, self.calls = to, 0

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None: ...

        def advance(self, n: float = 1.0) -> None:
            self.to.done += n
            self.calls += 1

    watching = Watching()
    counting = Counting(watching)
    watching.task = lambda title, total: setattr(watching, "total", total) or counting  # type: ignore[method-assign]
    with reporting_to(watching):
        _write(families.make_model("llama"), families.make_tokenizer())
    assert watching.done == watching.total == 96
    assert counting.calls == 32  # it moves at every token


def test_the_head_reads_rows_that_lie_together() -> None:
    """For rows apart PyTorch copies the head's matrix once for each of them."""
    model, tokenizer = families.make_model("llama"), families.make_tokenizer(chat=True)
    read: list[tuple[bool, tuple[int, ...]]] = []
    model.lm_head.register_forward_hook(lambda _, given, __: read.append((given[0].is_contiguous(), given[0].shape)))
    _write(model, tokenizer, n=2, seq_len=200)
    assert all(together for together, _ in read)
    assert {tuple(shape) for _, shape in read} == {(2, 1, families.WIDTH)}
    assert not model.lm_head._forward_pre_hooks


def test_training_mode_is_put_back() -> None:
    model = families.make_model("llama").train()
    _write(model, families.make_tokenizer())
    assert model.training


def test_logits_that_are_not_finite() -> None:
    model = families.make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(UserError, match="logits of the model: expected finite"):
        _write(model, families.make_tokenizer())


def test_learns_the_form_of_a_template() -> None:
    tokenizer = families.make_tokenizer(chat=True)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text)["input_ids"])

    assert learn_turns(tokenizer) == Turns(
        opening=ids("<|user|>"),
        to_assistant=ids("</s><|assistant|>"),
        to_user=ids("</s><|user|>"),
        enders=frozenset({0}),
    )


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "{% for message in messages %}{{ message['role'] }}{% endfor %}",
        "{% for message in messages %}{{ message['content'] }}{% endfor %}",
        "{{ messages[0]['content'] }}",
        "{{ unclosed",
    ],
)
def test_templates_that_teach_nothing(template: str | None) -> None:
    tokenizer = families.make_tokenizer()
    tokenizer.chat_template = template
    assert learn_turns(tokenizer) is None
