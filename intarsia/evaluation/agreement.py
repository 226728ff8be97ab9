"""Agreement of a model with the original: next tokens along the original's answers, and the model's own answers.

    reference = Reference.of(original, tokenizer, prompts, answer_tokens=64)
    followed = reference.follow(model)           # a pass along the original's answers; own answers
    found = reference.score(followed, original)  # with the original's loss on the own answers

Answers are greedy. The original's next tokens are those of its own pass along its answers, so that a model agrees with
itself to 1. An answer loops if it has no end and its last tokens repeat one passage three times.

A streamed model (a `Chain`) generates nothing, because every token would read all layers: the prompts need answers, and
each model makes one pass along them.

Shape suffixes: `T` tokens of an answer, `V` vocabulary, `P` prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intarsia.activations.loss import Likeliest
from intarsia.activations.statistics import require_finite
from intarsia.evaluation.answers import Ids, Prompts, greedy_answers, loops, side_by_side
from intarsia.evaluation.likelihood import (
    Request,
    batches_of,
    default_batch_tokens,
    evaluating,
    log_totals,
    logits_of,
)
from intarsia.evaluation.perplexity import Chain, ratio_stderr
from intarsia.evaluation.results import Agreement, Metric
from intarsia.options import AnswerSpec
from intarsia.progress import current

_EXAMPLES = 4
_WELL, _KEPT = 1.5, 0.9
_LEAST_AGREEMENT, _MOST_LOOPS = 0.6, 0.25


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A model's next tokens along the original's answers, and its own answers."""

    # For each prompt: the number of agreeing tokens, and the summed KL.
    agree_P: Tensor
    kl_P: Tensor
    # None for a model that does not generate.
    answers: tuple[Ids, ...] | None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The original's answers, and its likeliest next tokens along them."""

    prompts: Prompts
    answers: tuple[Ids, ...]
    # The next tokens along each answer.
    likeliest: tuple[Likeliest, ...]
    # The original's summed loss on its own answers, for each prompt.
    loss_P: Tensor
    answer_tokens: int
    tokenizer: Any

    @classmethod
    def of(cls, original: Any, tokenizer: Any, prompts: Prompts, *, answer_tokens: int) -> Reference:
        """Generate the original's answers, unless they are given, and run it once along them."""
        answers = prompts.given or greedy_answers(original, tokenizer, prompts, answer_tokens)
        kept, loss_P = dict[int, Likeliest](), torch.zeros(len(answers), dtype=torch.float64)

        def take(number: int, logits_TV: Tensor) -> None:
            kept[number] = Likeliest.of(logits_TV)
            loss_P[number] = _loss(logits_TV, answers[number])

        _along(original, prompts, answers, take)
        return cls(
            prompts=prompts,
            answers=answers,
            likeliest=tuple(kept[number] for number in range(len(answers))),
            loss_P=loss_P,
            answer_tokens=answer_tokens,
            tokenizer=tokenizer,
        )

    def itself(self) -> Agreement:
        """The original's row in a table: agreement 1, and measures of its own answers."""
        counts_P = _counts(self.answers)
        answers = self.answers if self.prompts.given is None else None
        whole = Followed(agree_P=counts_P, kl_P=torch.zeros_like(counts_P), answers=answers)
        return self._result(whole, self.loss_P)

    def follow(self, model: Any) -> Followed:
        """Run a model along the original's answers, and generate its own answers to the same prompts."""
        agree_P, kl_P = torch.zeros(len(self.answers), dtype=torch.float64), torch.zeros_like(self.loss_P)

        def take(number: int, logits_TV: Tensor) -> None:
            theirs = self.likeliest[number]
            next_T1 = theirs.tokens[:, :1].to(logits_TV.device).long()
            same_T = logits_TV.gather(1, next_T1)[:, 0] >= logits_TV.amax(-1)  # ties count as agreement
            kl_T = theirs.divergence(logits_TV).cpu().double()
            require_finite(kl_T, "A next-token probability")
            agree_P[number], kl_P[number] = int(same_T.sum()), kl_T.sum()

        _along(model, self.prompts, self.answers, take)
        answers = None
        if self.prompts.given is None:
            answers = greedy_answers(model, self.tokenizer, self.prompts, self.answer_tokens)
        return Followed(agree_P=agree_P, kl_P=kl_P, answers=answers)

    def score(self, followed: Followed, original: Any) -> Agreement:
        """The measures of a model, including the original's perplexity on its answers.

        Args:
            original: not needed if the model generated none.
        """
        answers, loss_P = followed.answers, torch.zeros(len(self.answers), dtype=torch.float64)
        if answers is not None:

            def take(number: int, logits_TV: Tensor) -> None:
                loss_P[number] = _loss(logits_TV, answers[number])

            _along(original, self.prompts, answers, take)
        return self._result(followed, loss_P)

    def _result(self, followed: Followed, loss_P: Tensor) -> Agreement:
        """The measures of a model.

        Args:
            loss_P: the original's loss on each of the model's own answers.
        """
        counts_P = _counts(self.answers)
        own: dict[str, Metric | None] = {"loops": None, "length": None, "perplexity": None}
        if followed.answers is not None:
            loops_P = torch.tensor([loops(answer, self.prompts.enders) for answer in followed.answers]).double()
            own_P, one_P = _counts(followed.answers), torch.ones_like(loops_P)
            nll = _ratio(loss_P, own_P)
            value = math.exp(min(nll.value, 700.0))
            perplexity = Metric(value=value, stderr=None if nll.stderr is None else value * nll.stderr)
            own = {"loops": _ratio(loops_P, one_P), "length": _ratio(own_P, one_P), "perplexity": perplexity}
        answered = zip(self.prompts.texts[:_EXAMPLES], self.answers, followed.answers or (), strict=False)
        return Agreement(
            agreement=_ratio(followed.agree_P, counts_P),
            kl=_ratio(followed.kl_P, counts_P),
            **own,
            prompts=len(self.answers),
            tokens=int(counts_P.sum()),
            source=self.prompts.source,
            sha256=self.prompts.sha256,
            examples=tuple(
                {"prompt": text.strip(), **side_by_side(self.tokenizer, original, answer)}
                for text, original, answer in answered
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The request for prompts and answers, before the original is loaded."""

    tokenizer: Any
    # Those of a file; None if the original writes them.
    prompts: Prompts | None
    answers: int
    answer_tokens: int
    # Most tokens of a prompt.
    longest: int

    @classmethod
    def of(cls, spec: AnswerSpec, tokenizer: Any, *configs: Mapping[str, Any], stream: bool = False) -> Asked | None:
        """Read the options; None without prompts.

        Args:
            configs: of the answering models; the smallest number of positions is the limit.
            stream: models are streamed and do not generate, so that answers are needed too.

        Raises:
            UserError: the file of prompts cannot be used.
        """
        if not spec.answers:
            return None
        if stream and spec.prompts is None:
            current().say(
                "agreement is not measured: streamed models do not generate; give answers with --prompts FILE"
            )
            return None
        if stream:
            current().say(f"agreement uses the answers in {spec.prompts}, because streamed models do not generate")
        known = [config.get("max_position_embeddings") for config in configs]
        positions = min((count for count in known if isinstance(count, int)), default=None)
        tokens = spec.answer_tokens if positions is None else max(2, min(spec.answer_tokens, positions // 2))
        prompts = None
        if spec.prompts is not None:
            tokens = spec.answer_tokens
            limits: dict[str, Any] = {"answer_tokens": tokens, "positions": positions}
            prompts = Prompts.read(spec.prompts, tokenizer, n=spec.answers, given=stream, **limits)
        longest = 2**20 if positions is None else positions - tokens
        return cls(tokenizer=tokenizer, prompts=prompts, answers=spec.answers, answer_tokens=tokens, longest=longest)

    def answered(self, original: Any, *, seed: int, key: str | None) -> Reference:
        """The original's answers to the prompts of a file, or to prompts that it writes itself.

        Args:
            key: the hash of its weights, to cache prompts; None disables the cache.
        """
        prompts = self.ready(original, seed=seed, key=key)
        return Reference.of(original, self.tokenizer, prompts, answer_tokens=self.answer_tokens)

    def ready(self, original: Any, *, seed: int, key: str | None) -> Prompts:
        """The prompts, from a file or written by the original."""
        return self.prompts or Prompts.written(
            original, self.tokenizer, n=self.answers, seed=seed, longest=self.longest, key=key
        )


def doubt(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """A warning if perplexity or accuracy is good and agreement is not; else None.

    Args:
        before: measures of the original: those of `Agreement.measures`, and `perplexity`, `accuracy` or both.
        after: measures of the new model.
    """

    def number(measures: Mapping[str, Any], key: str) -> float | None:
        found = measures.get(key)
        return found["value"] if isinstance(found, Mapping) else found

    def ratio(key: str) -> float | None:
        old, new = number(before, key), number(after, key)
        return None if not old or new is None else new / old

    agreement, loops, loops_before = number(after, "agreement"), number(after, "loops"), number(before, "loops")
    if agreement is None:
        return None
    if agreement >= _LEAST_AGREEMENT and (loops or 0.0) - (loops_before or 0.0) <= _MOST_LOOPS:
        return None
    perplexity, kept = ratio("perplexity"), ratio("accuracy")
    if perplexity is not None and perplexity <= _WELL:
        well = "perplexity"
    elif kept is not None and kept >= _KEPT:
        well = "accuracy"
    else:
        return None
    more = "" if loops is None else f", {loops:.0%} loop"
    return f"answers differ more than {well} says: {agreement:.0%} of tokens agree{more}"


def _along(model: Any, prompts: Prompts, answers: Sequence[Ids], take: Callable[[int, Tensor], None]) -> None:
    """Run a model along answers; `take` gets the number of each, and the logits `[T, V]` that predict it."""
    pairs = list(zip(prompts.ids, answers, strict=True))
    if isinstance(model, Chain):
        rows = [(*prompt, *answer[:-1]) for prompt, answer in pairs]
        model.row_logits(rows, lambda number, logits_TV: take(number, logits_TV[-len(answers[number]) :]))
        return
    requests = [Request(context=prompt, continuation=answer) for prompt, answer in pairs]
    with evaluating(model), torch.inference_mode():
        batch_tokens = default_batch_tokens(next(model.parameters()).device)
        for batch in batches_of(requests, pack=False, batch_tokens=batch_tokens):
            numbers, lengths = batch.request_M.unique_consecutive(return_counts=True)
            for number, logits_TV in zip(
                numbers.tolist(), logits_of(model, batch.rows).split(lengths.tolist()), strict=True
            ):
                take(number, logits_TV)


def _loss(logits_TV: Tensor, answer: Ids) -> float:
    """The summed loss of an answer, in nats."""
    token_T = torch.tensor(answer, device=logits_TV.device)
    chosen_T = logits_TV.gather(1, token_T[:, None])[:, 0].float() - log_totals(logits_TV)
    return -float(chosen_T.cpu().double().sum())


def _counts(answers: Sequence[Ids]) -> Tensor:
    return torch.tensor([len(answer) for answer in answers], dtype=torch.float64)


def _ratio(sums_P: Tensor, counts_P: Tensor) -> Metric:
    """A mean over tokens, with its standard error over prompts; None for a single prompt."""
    value = float(sums_P.sum() / counts_P.sum())
    return Metric(value=value, stderr=ratio_stderr(sums_P, counts_P, value) if len(sums_P) > 1 else None)
