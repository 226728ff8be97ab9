"""Tasks through lm-eval: local YAML over local files, and our own scores beside the harness's."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from intarsia.errors import UserError
from intarsia.evaluation.likelihood import Likelihoods
from intarsia.evaluation.results import TaskResults, TaskScore, retention, with_retention
from intarsia.evaluation.task_file import Question, is_right, read_items
from intarsia.evaluation.tasks import Task, TaskPlan, load_tasks, plan_tasks, score_tasks
from tests import families

lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="lm-eval is not installed")
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tasks"


@pytest.fixture(scope="module", autouse=True)
def list_of_tasks() -> Iterator[None]:
    """Reads the 14,000 YAML files of lm-eval once."""
    from lm_eval.tasks._index import TaskIndex

    build = TaskIndex.build
    listed = cache(lambda folder: build([folder]))

    def build_once(paths: Iterable[Path], **_: Any) -> dict[str, Any]:
        own = Path(lm_eval_tasks.__file__).parent
        found = [listed(path) if path == own else build([path]) for path in paths]
        return {name: entry for entries in found for name, entry in entries.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(build_once))
        yield


WORDS = families.sample_text(200, seed=9).replace(".", "").split()


def some_questions(n: int) -> list[Question]:
    """Questions of made-up words, with two to four choices of one to four words."""
    return [
        Question(
            query=" ".join(WORDS[i : i + 3 + i % 4]),
            choices=tuple(" ".join(WORDS[i * c : i * c + 1 + (i + c) % 4]) for c in range(2, 4 + i % 3)),
            gold=i % 2,
        )
        for i in range(1, n + 1)
    ]


def log_p_by_hand(model: torch.nn.Module, query: str, continuation: str) -> tuple[float, int]:
    tokenizer = families.make_tokenizer()
    ids, known = tokenizer.encode(query + continuation), len(tokenizer.encode(query))
    with torch.inference_mode():
        log_p = F.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    return sum(log_p[t - 1, ids[t]].item() for t in range(known, len(ids))), len(ids) - known


def run_task(task: Task, model: Any, tokenizer: Any, *, limit: int | None = None) -> tuple[TaskScore, ...]:
    plan = TaskPlan(tasks=(task,), limit=limit, num_fewshot=None)
    return score_tasks(plan, model, tokenizer, name="tiny").scores


METRICS = """
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""


def write_task(folder: Path, name: str, questions: Sequence[Question], extra: str = "") -> Path:
    """A YAML task of lm-eval over a local file; gives the file."""
    data = folder / f"{name}.jsonl"
    data.write_text(
        "".join(json.dumps({"query": q.query, "choices": list(q.choices), "gold": q.gold}) + "\n" for q in questions)
    )
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        f"  cache_dir: {folder / 'cache'}\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{query}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n' + extra + METRICS
    )
    return data


def of_the_harness(name: str, folder: Path, model: Any, tokenizer: Any, limit: int | None) -> Any:
    """lm-eval with nothing of ours in between."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, softmax_dtype="float32"),
        tasks=[name],
        limit=limit,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_local_scores_equal_those_of_lm_eval(family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ours from the file, ours through the harness, and the harness's own agree item by item."""
    file = write_task(tmp_path, "quiz", some_questions(30))
    model = families.make_model(family)
    theirs = of_the_harness("quiz", tmp_path, model, families.make_tokenizer(), limit=25)

    plan = plan_tasks([str(file)], limit=25)
    capfd.readouterr()
    (ours,) = score_tasks(plan, model, families.make_tokenizer(), name="tiny").scores
    shown = capfd.readouterr().err
    assert "Tokenizing" not in shown and "it/s" not in shown, "a bar of lm-eval beside ours"
    (task,) = load_tasks(["quiz"], include_path=tmp_path)
    tokenizer = families.make_tokenizer()
    (through,) = run_task(task, model, tokenizer, limit=25)

    samples = sorted(theirs["samples"]["quiz"], key=lambda sample: sample["doc_id"])
    for metric in ("acc", "acc_norm"):
        expected = tuple(float(sample[metric]) for sample in samples)
        assert ours.outcomes[metric] == through.outcomes[metric] == expected
        assert through.metrics[metric].value == pytest.approx(theirs["results"]["quiz"][f"{metric},none"])
        assert through.metrics[metric].stderr == pytest.approx(ours.metrics[metric].stderr)
    assert ours.n == through.n == 25
    assert ours.chance == pytest.approx(through.chance)
    assert (through.name, through.version, ours.version) == ("quiz", "3.0", None)
    assert through.source.startswith("lm-eval 0.4.")
    assert tokenizer.pad_token is None, "the tokenizer is left as it is"


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_accuracy_by_hand(family: str, tmp_path: Path) -> None:
    model, questions = families.make_model(family), some_questions(30)
    acc, acc_norm = [], []
    for question in questions:
        sums = [log_p_by_hand(model, question.query, " " + choice)[0] for choice in question.choices]
        normed = [total / len(choice) for total, choice in zip(sums, question.choices, strict=True)]
        acc.append(float(sums.index(max(sums)) == question.gold))
        acc_norm.append(float(normed.index(max(normed)) == question.gold))
    (score,) = local_scores(tmp_path, questions, model)
    assert score.outcomes == {"acc": tuple(acc), "acc_norm": tuple(acc_norm)}
    assert acc != acc_norm
    assert score.metrics["acc"].value == pytest.approx(sum(acc) / 30)
    assert (score.n, score.source, score.primary) == (30, "local", "acc_norm")
    assert score.chance == pytest.approx(sum(1 / len(question.choices) for question in questions) / 30)


def local_scores(folder: Path, questions: Sequence[Question], model: Any) -> tuple[TaskScore, ...]:
    file = write_task(folder, "quiz", questions)
    return score_tasks(plan_tasks([str(file)]), model, families.make_tokenizer(), name="tiny").scores


def test_ties_go_to_the_first_and_length_counts_in_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [
        Question(query="a", choices=("same", "same", "no"), gold=0),
        Question(query="a", choices=("same", "same", "no"), gold=1),
        Question(query="a", choices=("ab", "éééé"), gold=1),
    ]
    sums = torch.tensor([-1.0, -1.0, -3.0, -1.0, -1.0, -3.0, -2.0, -3.0], dtype=torch.float64)
    found = Likelihoods(sums_R=sums, greedy_R=torch.zeros(8, dtype=torch.bool))
    monkeypatch.setattr("intarsia.evaluation.tasks.score_requests", lambda *_, **__: found)
    (score,) = local_scores(tmp_path, questions, families.make_model("llama"))
    assert score.outcomes["acc"] == (1.0, 0.0, 0.0)
    assert score.outcomes["acc_norm"] == (1.0, 0.0, 1.0)  # -3 over four characters, not over eight bytes


def test_items_are_pinned(tmp_path: Path) -> None:
    questions, model = some_questions(5), families.make_model("llama")
    wrong = Question(query=questions[0].query, choices=questions[0].choices, gold=1 - questions[0].gold)
    hashes = [
        local_scores(tmp_path, given, model)[0].items_sha256
        for given in (questions, questions, questions[:4], [wrong, *questions[1:]])
    ]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_a_choice_longer_than_the_model(tmp_path: Path) -> None:
    long = Question(query="a", choices=("b " * families.POSITIONS, "c"), gold=0)
    with pytest.raises(UserError, match="tokens of its own"):
        local_scores(tmp_path, [long], families.make_model("llama"))


@pytest.mark.exhaustive
@pytest.mark.registry
@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data/tasks here")
@pytest.mark.parametrize("name", ["piqa", "arc_easy"])
def test_the_demo_model_scores_what_lm_eval_says(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from intarsia.checkpoint.resolve import resolve

    try:
        folder = resolve("demo")
    except UserError as error:
        pytest.skip(f"no demo model: {error}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    spec = f"{SHARED / name}.jsonl#0.33:1"
    _, questions = read_items(spec, Question, limit=20)
    write_task(tmp_path, f"{name}_here", questions)
    theirs = of_the_harness(f"{name}_here", tmp_path, model, AutoTokenizer.from_pretrained(folder), limit=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (ours,) = score_tasks(plan_tasks([spec], limit=20), model, tokenizer, name="demo").scores
    samples = sorted(theirs["samples"][f"{name}_here"], key=lambda sample: sample["doc_id"])
    for metric in ("acc", "acc_norm"):
        assert ours.outcomes[metric] == tuple(float(sample[metric]) for sample in samples)
    assert ours.n == 20


def test_fewshot_prompts_change_the_items(tmp_path: Path) -> None:
    file = write_task(tmp_path, "quiz", some_questions(12), "fewshot_split: test\n")
    model, tokenizer = families.make_model("llama"), families.make_tokenizer()

    def scored(num_fewshot: int | None) -> Any:
        plan = plan_tasks(["quiz"], limit=6, include_path=tmp_path, num_fewshot=num_fewshot)
        return score_tasks(plan, model, tokenizer, name="tiny")

    none, two = scored(None), scored(2)
    assert none.scores[0].items_sha256 == scored(0).scores[0].items_sha256
    assert two.scores[0].items_sha256 == scored(2).scores[0].items_sha256
    assert two.num_fewshot == 2
    with pytest.raises(UserError, match="the same items"):
        retention(none.scores, two.scores, against="tiny")
    with pytest.raises(UserError, match="give a task of lm-eval"):
        plan_tasks([str(file)], num_fewshot=2)


@pytest.mark.exhaustive
def test_a_group_is_aggregated_as_lm_eval_does(tmp_path: Path) -> None:
    questions = some_questions(30)
    write_task(tmp_path, "quiz_a", questions[:7])
    write_task(tmp_path, "quiz_b", questions[7:])
    (tmp_path / "group.yaml").write_text(
        "group: quizzes\ntask: [quiz_a, quiz_b]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    (tmp_path / "even.yaml").write_text(
        "group: even\ntask: [quiz_a, quiz_b]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: false\n"
    )
    model, tokenizer = families.make_model("llama"), families.make_tokenizer()
    group, even = load_tasks(["quizzes", "even"], include_path=tmp_path)
    (whole,) = run_task(group, model, tokenizer)
    theirs = of_the_harness("quizzes", tmp_path, model, families.make_tokenizer(), limit=None)
    assert whole.metrics["acc"].value == pytest.approx(theirs["groups"]["quizzes"]["acc,none"])
    assert (whole.name, whole.n, whole.primary) == ("quizzes", 30, "acc")
    assert sum(whole.outcomes["acc"]) / 30 == pytest.approx(whole.metrics["acc"].value)
    assert whole.chance == pytest.approx(sum(1 / len(question.choices) for question in questions) / 30)

    (uneven,) = run_task(even, model, tokenizer)
    parts = [theirs["results"][name]["acc,none"] for name in ("quiz_a", "quiz_b")]
    assert uneven.metrics["acc"].value == pytest.approx(sum(parts) / 2)
    assert uneven.outcomes == {}, "no mean over items"
    results = TaskResults(model="tiny", scores=(uneven,), dtype="float32")
    assert with_retention(results, results) == results, "its scores are not lost"


@pytest.mark.exhaustive
def test_a_tag_is_several_tasks(tmp_path: Path) -> None:
    for name in ("quiz_a", "quiz_b"):
        write_task(tmp_path, name, some_questions(4), "tag: both\n")
    (tag,) = load_tasks(["both"], include_path=tmp_path)
    scores = run_task(tag, families.make_model("llama"), families.make_tokenizer(), limit=3)
    assert [(score.name, score.n) for score in scores] == [("quiz_a", 3), ("quiz_b", 3)]


def test_contexts_to_choose_from(tmp_path: Path) -> None:
    """As WinoGrande asks: every choice is a context of its own, before one and the same continuation."""
    write_task(tmp_path, "quiz", some_questions(20))
    written = (tmp_path / "quiz.yaml").read_text()
    written = written.replace('doc_to_text: "{{query}}"', "doc_to_text: gold")
    written = written.replace('doc_to_target: "{{gold}}"', "doc_to_target: query")
    (tmp_path / "quiz.yaml").write_text(written)
    model = families.make_model("qwen2")
    theirs = of_the_harness("quiz", tmp_path, model, families.make_tokenizer(), limit=None)
    (task,) = load_tasks(["quiz"], include_path=tmp_path)
    (score,) = run_task(task, model, families.make_tokenizer())
    samples = sorted(theirs["samples"]["quiz"], key=lambda sample: sample["doc_id"])
    assert score.outcomes["acc"] == tuple(float(sample["acc"]) for sample in samples)
    assert 0 < sum(score.outcomes["acc"]) < 20
    assert len({argument[1] for argument in samples[0]["arguments"]}) == 1
    chance = sum(1 / len(question.choices) for question in some_questions(20)) / 20
    assert score.chance == pytest.approx(chance)


def test_a_task_without_items(tmp_path: Path) -> None:
    write_task(tmp_path, "quiz", some_questions(3), "process_docs: !function emptied.none\n")
    (tmp_path / "emptied.py").write_text("def none(docs):\n    return docs.select([])\n")
    with pytest.raises(UserError, match="The data set of the task quiz cannot be read"):
        load_tasks(["quiz"], include_path=tmp_path)


def write_sums(folder: Path, items: Sequence[dict[str, str]]) -> None:
    """A YAML task as lm-eval's gsm8k: examples of a training part, and two filters of what is written."""
    for part, rows in (("train", items[:2]), ("test", items[2:])):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(
        f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}, cache_dir: {folder}/cache}}
output_type: generate_until
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "Q: {{{{query}}}}\\nA:"
doc_to_target: "{{{{answer}}}}"
fewshot_config: {{sampler: first_n}}
generation_kwargs: {{until: ["Q:"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "#### (.)"}}, {{function: take_first}}]
  - name: flexible-extract
    filter: [{{function: regex, regex_pattern: "(\\\\S)", group_select: -1}}, {{function: take_first}}]
metadata: {{version: 1.0}}
"""
    )


def test_a_task_that_writes_text(tmp_path: Path) -> None:
    """As gsm8k: with examples, a filter's name in each metric, and what another model keeps of it on the same items."""
    tokenizer = families.make_tokenizer()
    models = [families.make_model("llama", seed=seed) for seed in (0, 1)]
    items = [{"query": query, "answer": "x"} for query in WORDS[:14]]
    before = "".join(f"Q: {item['query']}\nA: {item['answer']}\n\n" for item in items[:2])
    last: list[list[str]] = []  # the last character that each model writes
    for model in models:
        last.append([])
        for item in items[2:]:
            ids = torch.tensor([tokenizer(f"{before}Q: {item['query']}\nA:")["input_ids"]])
            out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=12, pad_token_id=1)
            written = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("Q:")[0]
            last[-1].append(written.strip()[-1:] or "[invalid]")
    for number, (item, said) in enumerate(zip(items[2:], last[0], strict=True)):
        item["answer"] = said if number % 3 else "never this"
    write_sums(tmp_path, items)
    plan = plan_tasks(["sums"], include_path=tmp_path, num_fewshot=2)
    name = "exact_match,flexible-extract"
    scores = [score_tasks(plan, model, tokenizer, name="tiny").scores[0] for model in models]
    for score, said in zip(scores, last, strict=True):
        assert score.outcomes[name] == tuple(
            float(a == item["answer"]) for a, item in zip(said, items[2:], strict=True)
        )
        assert score.outcomes["exact_match,strict-match"] == (0.0,) * 12
        assert (score.n, score.chance, score.version) == (12, None, "1.0")
    assert scores[0].metrics[name].value == pytest.approx(8 / 12)
    assert scores[0].primary == name
    kept = retention(scores[:1], scores[1:], against="tiny").tasks[0]
    assert kept.accuracy is not None and kept.accuracy.value == sum(scores[1].outcomes[name]) / 8
    assert kept.metric == name and kept.n == 12 and kept.above_chance is None
    assert kept.accuracy.low is not None and kept.accuracy.low <= kept.accuracy.value <= (kept.accuracy.high or 0.0)


@pytest.mark.parametrize("name", ["gsm8k", pytest.param("ifeval", marks=pytest.mark.exhaustive)])
def test_lm_evals_own_tasks_that_write_text(name: str, tmp_path: Path) -> None:
    """Its own definitions, over rows of a local file in place of the hub's."""
    import lm_eval.tasks

    pytest.importorskip("langdetect", reason="lm-eval[ifeval] is not installed")
    known: dict[str, list[dict[str, Any]]] = {
        "gsm8k": [
            {"question": f"How many are {n} and 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(7)
        ],
        "ifeval": [
            {"key": n, "prompt": word, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
            for n, word in enumerate(WORDS[:7])
        ],
    }
    rows = known[name]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    here = Path(lm_eval.tasks.__file__).parent / name / f"{name}.yaml"
    files = ", ".join(f"{part}: {tmp_path / 'rows.jsonl'}" for part in ("train", "test"))
    (tmp_path / "here.yaml").write_text(
        f"include: {here}\ntask: {name}_here\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{{files}}}, cache_dir: {tmp_path / 'cache'}}}\n"
    )
    plan = plan_tasks([f"{name}_here"], limit=4, include_path=tmp_path, num_fewshot=2)
    model, tokenizer = families.make_model("llama"), families.make_tokenizer()
    (score,) = score_tasks(plan, model, tokenizer, name="tiny").scores
    assert score.primary == {"gsm8k": "exact_match,flexible-extract", "ifeval": "prompt_level_strict_acc"}[name]
    assert score.n == len(score.outcomes[score.primary]) == 4 and score.chance is None
    assert retention([score], [score], against="tiny").tasks[0].metric == score.primary
    if name == "ifeval":  # 0 examples, as the task says: a prompt alone, and an answer up to half the positions
        for row, right in zip(rows, score.outcomes[score.primary], strict=False):
            ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
            most = families.POSITIONS // 2
            out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=most, pad_token_id=1)
            written = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert right == ("," not in written and bool(written.strip()))


def test_a_task_that_needs_a_package(tmp_path: Path) -> None:
    write_task(tmp_path, "quiz", some_questions(3), "process_docs: !function needy.none\n")
    (tmp_path / "needy.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(UserError, match=r"The task quiz needs a package that is not installed \(.*nowhere_to_be_found"):
        load_tasks(["quiz"], include_path=tmp_path)


def test_random_numbers_of_others_stay(tmp_path: Path) -> None:
    write_task(tmp_path, "quiz", some_questions(3))
    model = families.make_model("llama")
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    expected = random.random(), float(np.random.rand()), torch.rand(1).item()
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    (task,) = load_tasks(["quiz"], include_path=tmp_path)
    run_task(task, model, families.make_tokenizer())
    assert (random.random(), float(np.random.rand()), torch.rand(1).item()) == expected


@pytest.mark.exhaustive
def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(UserError) as raised:
        load_tasks(["arc_eazy", "helaswag", "piqa"])
    first, second = raised.value.problems
    assert first.message == "There is no task 'arc_eazy'." and "Did you mean arc_easy" in first.hint
    assert "hellaswag" in second.hint


def test_data_sets_that_cannot_be_had(tmp_path: Path) -> None:
    write_task(tmp_path, "quiz", some_questions(3)).unlink()
    with pytest.raises(UserError, match=r"The data set of the task quiz cannot be read \(.*Error: "):
        load_tasks(["quiz"], include_path=tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        load_tasks(["quiz"], include_path=tmp_path / "none")


def test_lm_eval_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'intarsia\[tasks\]'"):
        load_tasks(["piqa"])


def test_plans_are_checked_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        plan_tasks(["piqa", " "], limit=0, num_fewshot=-1)
    assert [problem.message.split()[0] for problem in raised.value.problems] == ["--tasks", "--limit", "--num-fewshot"]
    with pytest.raises(UserError, match="--tasks is empty"):
        plan_tasks([])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_task(tmp_path / folder, "quiz", some_questions(3))
    with pytest.raises(UserError, match="quiz more than once"):
        plan_tasks([str(tmp_path / folder / "quiz.jsonl") for folder in ("a", "b")])


@pytest.mark.parametrize(
    ("written", "answer", "expected"),
    [
        ("3 and 4 make 7.", "7", True),
        ("It is 1,000 dollars", "#### 1000", True),
        ("so 5.0", "The sum is 5.", True),
        ("-3", "3", False),
        ("none", "3", False),
        ("The Paris!", "paris", True),
        ("Paris\nis a town", "Paris", True),
        ("It is Paris", "Paris", False),
        ("in 1990 he left", "1990 was the year", False),
        ("1990 was the year.", "1990 was the year", True),
    ],
)
def test_what_counts_as_the_answer(written: str, answer: str, expected: bool) -> None:
    assert is_right(written, answer) is expected


@pytest.mark.parametrize("chat", [False, True])
def test_answers_that_are_written(tmp_path: Path, chat: bool) -> None:
    """What the model would write itself, after the file's first item as an example, is right, and nothing else is."""
    model, tokenizer = families.make_model("llama"), families.make_tokenizer(chat=True)
    items = [{"query": f"roti {word}", "answer": word} for word in ("sa", "lu", "mi", "ka")]
    form = "<|user|>{query}</s><|assistant|>{answer}</s>" if chat else "{query} {answer}\n\n"
    ask = "<|user|>{query}</s><|assistant|>" if chat else "{query}"
    ids = tokenizer(form.format(**items[0]) + ask.format(**items[1]), return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=256, pad_token_id=1)
    items[1]["answer"] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n\n")[0]
    file = tmp_path / "quiz.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    plan = plan_tasks([str(file)], limit=2, num_fewshot=1, chat=chat)
    (score,) = score_tasks(plan, model, tokenizer, name="tiny").scores
    assert (score.primary, score.n, score.chance, score.source) == ("exact_match", 2, None, "local")
    assert score.outcomes["exact_match"] == (1.0, 0.0)
    kept = retention([score], [score], against="tiny").mean
    assert kept.accuracy is not None and (kept.accuracy.value, kept.above_chance) == (1.0, None)
    with pytest.raises(UserError, match=r"--num-fewshot is 4, but .* has 4 items"):
        plan_tasks([str(file)], num_fewshot=4)
    tokenizer.chat_template = None
    if chat:
        with pytest.raises(UserError, match="--chat-template is given, but tiny has no chat template"):
            score_tasks(plan, model, tokenizer, name="tiny")
    file.write_text('{"query": "a", "answer": " "}\n')
    with pytest.raises(UserError, match=r"quiz\.jsonl:1, answer: text is blank"):
        plan_tasks([str(file)])
