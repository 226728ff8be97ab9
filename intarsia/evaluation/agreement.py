"""How far a model's words are the original's: the original's answers token by token, and the model's own answers.

    reference = Reference.of(original, tokenizer, prompts, answer_tokens=64)
    followed = reference.follow(model)           # one pass along the original's answers, and its own answers
    found = reference.score(followed, original)  # what the original makes of these

Answers are greedy. The original's next token is the likeliest by its own pass along its answers, so that a model agrees
with itself wholly. An answer loops when it has not ended and its last tokens are one passage three times in a row.

Shape suffixes: `B` prompts of a batch, `T` tokens, `V` vocabulary, `M` tokens of the answers, `P` prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.activations.loss import Likeliest
from intarsia.errors import UserError, check
from intarsia.evaluation.answers import greedy_answers, loops, side_by_side
from intarsia.evaluation.likelihood import (
    Request,
    batches_of,
    default_batch_tokens,
    evaluating,
    forward_of,
    score_batch,
)
from intarsia.evaluation.perplexity import ratio_stderr
from intarsia.evaluation.prompts import Ids, Prompts
from intarsia.evaluation.results import Agreement, Metric
from intarsia.options import AnswerSpec

_EXAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Followed:
    """What a model says along the original's answers, and its own answers."""

    # For each prompt: tokens that agree, and the summed KL.
    agree_P: Tensor
    kl_P: Tensor
    answers: tuple[Ids, ...]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The original's answers, and its next tokens along them."""

    prompts: Prompts
    answers: tuple[Ids, ...]
    # Of the same tokens in the order of `batches`.
    likeliest: tuple[Likeliest, ...]
    # The original's summed loss on its own answers, for each prompt.
    loss_P: Tensor
    answer_tokens: int
    tokenizer: Any

    @classmethod
    def of(cls, original: Any, tokenizer: Any, prompts: Prompts, *, answer_tokens: int) -> Reference:
        """Let the original answer, and run it once along its answers."""
        answers = greedy_answers(original, tokenizer, prompts, answer_tokens)
        kept, loss_P = [], torch.zeros(len(answers), dtype=torch.float64)
        with evaluating(original), torch.inference_mode():
            forward = forward_of(original)
            for batch in _batches(prompts, answers, original):
                logits_NV = forward(batch.rows)
                kept.append(Likeliest.of(logits_NV))
                loss_P.index_add_(0, batch.request_M, -score_batch(logits_NV, batch)[0].cpu().double())
        return cls(
            prompts=prompts,
            answers=answers,
            likeliest=tuple(kept),
            loss_P=loss_P,
            answer_tokens=answer_tokens,
            tokenizer=tokenizer,
        )

    def itself(self) -> Agreement:
        """The original's own row of a table: full agreement, and how its answers are."""
        counts_P = _counts(self.answers)
        whole = Followed(agree_P=counts_P, kl_P=torch.zeros_like(counts_P), answers=self.answers)
        return self._result(whole, self.loss_P)

    def follow(self, model: Any) -> Followed:
        """One pass of a model along the original's answers, and its own answers to the same prompts."""
        agree_P, kl_P = torch.zeros(len(self.answers), dtype=torch.float64), torch.zeros_like(self.loss_P)
        with evaluating(model), torch.inference_mode():
            forward = forward_of(model)
            for batch, theirs in zip(_batches(self.prompts, self.answers, model), self.likeliest, strict=True):
                logits_NV = forward(batch.rows)
                next_N1 = theirs.tokens[:, :1].to(logits_NV.device).long()
                same_N = logits_NV.gather(1, next_N1)[:, 0] >= logits_NV.amax(-1)  # of equal ones any may come first
                kl_N = theirs.divergence(logits_NV)
                if not bool(kl_N.isfinite().all()):
                    raise UserError(
                        "Agreement: a next-token probability is NaN or infinite.",
                        "Check the model's weights, and use bfloat16 or float32 if it was run in float16.",
                    )
                agree_P.index_add_(0, batch.request_M, same_N.cpu().double()[batch.position_M])
                kl_P.index_add_(0, batch.request_M, kl_N.cpu().double()[batch.position_M])
        answers = greedy_answers(model, self.tokenizer, self.prompts, self.answer_tokens)
        return Followed(agree_P=agree_P, kl_P=kl_P, answers=answers)

    def score(self, followed: Followed, original: Any) -> Agreement:
        """The measures of a model, with what the original makes of its answers."""
        loss_P = torch.zeros(len(self.answers), dtype=torch.float64)
        with evaluating(original), torch.inference_mode():
            forward = forward_of(original)
            for batch in _batches(self.prompts, followed.answers, original):
                loss_P.index_add_(0, batch.request_M, -score_batch(forward(batch.rows), batch)[0].cpu().double())
        return self._result(followed, loss_P)

    def _result(self, followed: Followed, loss_P: Tensor) -> Agreement:
        counts_P, own_P = _counts(self.answers), _counts(followed.answers)
        enders = self.prompts.enders
        loops_P = torch.tensor([loops(answer, enders) for answer in followed.answers], dtype=torch.float64)
        nll = _ratio(loss_P, own_P)
        value = math.exp(min(nll.value, 700.0))
        return Agreement(
            agreement=_ratio(followed.agree_P, counts_P),
            kl=_ratio(followed.kl_P, counts_P),
            loops=_ratio(loops_P, torch.ones_like(loops_P)),
            length=_ratio(own_P, torch.ones_like(own_P)),
            perplexity=Metric(value=value, stderr=None if nll.stderr is None else value * nll.stderr),
            prompts=len(self.answers),
            tokens=int(counts_P.sum()),
            source=self.prompts.source,
            sha256=self.prompts.sha256,
            examples=tuple(self._example(number, followed.answers[number]) for number in self._shown()),
        )

    def _shown(self) -> range:
        return range(min(_EXAMPLES, len(self.answers)))

    def _example(self, number: int, answer: Ids) -> dict[str, Any]:
        return {
            "prompt": self.prompts.texts[number].strip(),
            **side_by_side(self.tokenizer, self.answers[number], answer),
        }


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The prompts that models are asked, as far as they are known before the original is loaded."""

    tokenizer: Any
    # Those of a file; None where the original writes them.
    prompts: Prompts | None
    answers: int
    answer_tokens: int
    # Most tokens of a prompt.
    longest: int

    @classmethod
    def of(cls, spec: AnswerSpec, tokenizer: Any, *configs: Mapping[str, Any], stream: bool = False) -> Asked | None:
        """What is asked for; None for nothing, and where models are streamed, which cannot write.

        Args:
            configs: of the models that answer; the smallest number of positions is the limit.

        Raises:
            UserError: the file of prompts cannot be used.
        """
        check(
            (
                not (stream and spec.prompts),
                "--prompts is given with --stream, and to answer the whole model must be in memory.",
                "Leave one of them out.",
            )
        )
        if stream or not spec.answers:
            return None
        known = [config.get("max_position_embeddings") for config in configs]
        positions = min((count for count in known if isinstance(count, int)), default=None)
        tokens = spec.answer_tokens if positions is None else max(2, min(spec.answer_tokens, positions // 2))
        prompts = None
        if spec.prompts is not None:
            tokens = spec.answer_tokens
            prompts = Prompts.read(spec.prompts, tokenizer, n=spec.answers, answer_tokens=tokens, positions=positions)
        longest = 2**20 if positions is None else positions - tokens
        return cls(tokenizer=tokenizer, prompts=prompts, answers=spec.answers, answer_tokens=tokens, longest=longest)

    def answered(self, original: Any, *, seed: int, key: str | None) -> Reference:
        """The original's answers; first it writes the prompts, where no file has them.

        Args:
            key: the hash of its weights, under which prompts are kept; None keeps nothing.
        """
        prompts = self.ready(original, seed=seed, key=key)
        return Reference.of(original, self.tokenizer, prompts, answer_tokens=self.answer_tokens)

    def ready(self, original: Any, *, seed: int, key: str | None) -> Prompts:
        """The prompts alone, written by the original where no file has them."""
        return self.prompts or Prompts.written(
            original, self.tokenizer, n=self.answers, seed=seed, longest=self.longest, key=key
        )


_WELL, _KEPT = 1.5, 0.9
_LEAST_AGREEMENT, _MOST_LOOPS = 0.6, 0.25


def doubt(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """One sentence where perplexity or choices look well, and the answers do not; else None.

    Args:
        before: measures of the original: those of `Agreement.measures`, and `perplexity` or `accuracy` or both.
        after: of the new model.
    """

    def number(measures: Mapping[str, Any], key: str) -> float | None:
        found = measures.get(key)
        return found["value"] if isinstance(found, Mapping) else found

    def ratio(key: str) -> float | None:
        old, new = number(before, key), number(after, key)
        return None if not old or new is None else new / old

    agreement, loops, loops_before = number(after, "agreement"), number(after, "loops"), number(before, "loops")
    if agreement is None or loops is None or loops_before is None:
        return None
    if agreement >= _LEAST_AGREEMENT and loops - loops_before <= _MOST_LOOPS:
        return None
    perplexity, kept = ratio("perplexity"), ratio("accuracy")
    if perplexity is not None and perplexity <= _WELL:
        well = "perplexity"
    elif kept is not None and kept >= _KEPT:
        well = "accuracy"
    else:
        return None
    return f"answers differ more than {well} says: {agreement:.0%} of tokens agree, {loops:.0%} loop"


def _batches(prompts: Prompts, answers: Sequence[Ids], model: Any) -> Iterator[Any]:
    requests = [
        Request(context=prompt, continuation=answer) for prompt, answer in zip(prompts.ids, answers, strict=True)
    ]
    device = next(model.parameters()).device
    yield from batches_of(requests, pack=False, batch_tokens=default_batch_tokens(device))


def _counts(answers: Sequence[Ids]) -> Tensor:
    return torch.tensor([len(answer) for answer in answers], dtype=torch.float64)


def _ratio(sums_P: Tensor, counts_P: Tensor) -> Metric:
    """A mean over tokens, with the standard error that prompts as independent draws give; None of a single one."""
    value = float(sums_P.sum() / counts_P.sum())
    return Metric(value=value, stderr=ratio_stderr(sums_P, counts_P, value) if len(sums_P) > 1 else None)
