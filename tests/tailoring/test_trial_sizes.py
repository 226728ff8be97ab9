"""What a trial may take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from intarsia.evaluation.requests import Request
from intarsia.tailoring.examples import Example
from intarsia.tailoring.family import Family
from intarsia.tailoring.objective import Objective
from intarsia.tailoring.resident_family import ResidentFamily
from intarsia.tailoring.trial_sizes import batch_tokens_of, cache_bytes_of, lacks_memory, longest_row

CPU = torch.device("cpu")


def test_cache_bytes() -> None:
    assert cache_bytes_of(CPU, 12345) == 12345
    assert 0 < cache_bytes_of(CPU, None) <= 2**30


def test_only_questions_are_packed_into_rows() -> None:
    def example(context: int, *answers: int) -> Example:
        requests = tuple(Request(context=(1,) * context, continuation=(2,) * answer) for answer in answers)
        return Example(requests=requests, gold=0, characters=(1,) * len(answers))

    quiz = Objective(name="quiz", measure="margin", source="q", examples=(example(5, 2, 9), example(11, 1, 1)))
    text = Objective(name="text", measure="loss", source="t", examples=(example(1, 300),))
    assert longest_row([quiz, text]) == 14
    assert longest_row([text]) == 0


def test_batches_on_the_cpu_are_those_of_judging(pair: Callable[[str], Family]) -> None:
    layers = ResidentFamily(pair("llama"), device=CPU, dtype=None, memory_bytes=0)
    assert batch_tokens_of(layers) == 512


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("no"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_a_lack_of_memory_looks_like(error: Exception, lacks: bool) -> None:
    assert lacks_memory(error) is lacks
