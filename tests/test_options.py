"""The value objects, and how fields become flags, plain data and command lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from intarsia.errors import UserError
from intarsia.flags import byte_count, field_comments, flag, from_plain, options_of, plain, token_count
from intarsia.options import EvalSpec, ModelRef, Output, Runtime, Target, TextSpec


def said(error: UserError) -> list[str]:
    return [problem.message for problem in error.problems]


def test_defaults() -> None:
    assert TextSpec() == TextSpec(sources=("self",), tokens=None, seq_len=512, seed=0)
    assert (TextSpec().length, TextSpec(tokens=1024).length) == (65_536, 1024)
    assert EvalSpec() == EvalSpec(text=(), windows=(64,), tasks=(), limit=None, speed=True)
    assert Output(path=Path("out")).shard_bytes == 5 * 10**9
    assert Runtime(memory="1.5GiB").memory_bytes == 3 * 2**29
    assert Runtime().memory_bytes is None


def test_plain_values_become_objects() -> None:
    assert ModelRef.of("demo") == ModelRef.of(ModelRef(model="demo")) == ModelRef(model="demo")
    assert ModelRef.of(Path("a/b")).model == "a/b"
    assert Output.of("out").path == Path("out")
    assert TextSpec(sources="a.txt").sources == ("a.txt",)
    assert Output.of("a/out").run_path == Path("a/out.run")
    assert Output(path="out", run="r").run_path == Path("r")


def test_every_problem_of_a_value_is_found_at_once() -> None:
    with pytest.raises(UserError) as caught:
        TextSpec(sources=(), tokens=4, seq_len=8, seed=-1)
    assert said(caught.value) == [
        "--calibration names no text.",
        "--tokens is 4, less than one sequence of --seq-len 8.",
        "--seed is -1; it must be at least 0.",
    ]
    assert all(problem.hint for problem in caught.value.problems)
    with pytest.raises(UserError) as caught:
        EvalSpec(answers=-1, windows=-1, limit=0)  # options of three classes
    assert [message.split()[0] for message in said(caught.value)] == ["--answers", "--eval-windows", "--limit"]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Target, {"layers": 3, "sparsity": 0.2}, "--layers and --sparsity are both given."),
        (Target, {"layers": 0}, "--layers is 0; a model keeps at least 1 layer."),
        (Target, {"sparsity": 1.0}, "--sparsity is 1.0; it is a share between 0 and 1."),
        (Runtime, {"memory": "8XB"}, "--memory is '8XB', which is no size."),
        (Runtime, {"batch_tokens": 0}, "--batch-tokens is 0; it must be at least 1."),
        (Runtime, {"devices": "cuda:0", "stream": True}, "--devices is given with --device or --stream."),
        (EvalSpec, {"limit": 0}, "--limit is 0; it must be at least 1."),
        (EvalSpec, {"windows": -1}, "--eval-windows is -1; it must be at least 0."),
        (
            EvalSpec,
            {"text": ("a.txt", "b.txt"), "windows": (1, 2, 3)},
            "--eval-windows has 3 numbers, and --eval-text 2.",
        ),
        (EvalSpec, {"text": ("a.txt", "other/a.txt")}, "Two --eval-text are called 'a'."),
        (Output, {"path": ""}, "There is no output folder."),
        (Output, {"path": "o", "private": True}, "--private is given without --push-to-hub."),
        (ModelRef, {"model": ""}, "The model has no name."),
    ],
)
def test_values_that_cannot_be(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        kind(**values)
    assert said(caught.value) == [message]


def test_evaluation_texts_and_their_names() -> None:
    spec = EvalSpec(text=("wiki=w.txt", "news.txt#0.9:1", "hub:org/set:train"), windows=4)
    assert spec.sources == {"wiki": "w.txt", "news 0.9:1": "news.txt#0.9:1", "org/set": "hub:org/set:train"}
    assert spec.windows == (4,)


def test_a_target_is_required_where_it_must_be() -> None:
    assert Target(layers=3).require().layers == 3
    with pytest.raises(UserError, match="Neither --layers nor --sparsity"):
        Target().require()


@pytest.mark.parametrize(
    ("text", "count"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("7", 7), ("12kb", 12_000), ("1_000", 1000)]
)
def test_sizes(text: str, count: int) -> None:
    assert byte_count(text) == count


def test_token_counts() -> None:
    assert [token_count(text) for text in ("65536", "500k", "2M", "1.5G")] == [65536, 500_000, 2_000_000, 1_500_000_000]
    for text in ("", "-3", "many", "0", "3 Q"):
        with pytest.raises(UserError):
            token_count(text)


@dataclass(frozen=True, kw_only=True)
class Base:
    # Said above,
    # in two lines.
    first: int = 1
    second: Literal["a", "b"] = "a"
    # Said too.
    third: float = 0.5  # not this


@dataclass(frozen=True, kw_only=True)
class Derived(Base):
    first: int = 7
    # A list of numbers.
    depths: tuple[int, ...] = flag((), "--at", "-a")


def test_help_is_the_comment_of_a_field() -> None:
    assert field_comments(Derived) == {
        "first": "Said above, in two lines.",
        "third": "Said too.",
        "depths": "A list of numbers.",
    }
    assert [(option.key, option.names, option.default) for option in options_of(Derived)] == [
        ("first", ("--first",), 7),
        ("second", ("--second",), "a"),
        ("third", ("--third",), 0.5),
        ("at", ("--at", "-a"), ()),
    ]


def test_settings_from_plain_data() -> None:
    found = from_plain(Derived, {"second": "b", "third": "2", "depths": "3,4"})
    assert found == Derived(second="b", third=2.0, depths=(3, 4))
    assert plain(found) == {"first": 7, "second": "b", "third": 2.0, "depths": [3, 4]}
    assert from_plain(Derived, plain(found)) == found
    with pytest.raises(UserError) as caught:
        from_plain(Derived, {"second": "c", "depths": ["x"], "fourth": 1}, where="mine")
    assert said(caught.value) == [
        "--second takes one of a, b, not 'c'.",
        "--at takes a whole number, not 'x'.",
        "mine: there is no option fourth.",
    ]
