"""Rounds: draft, verify, accept. Text, streams, the server, the benchmark and calibration all consume these.

Speculative decoding (arXiv 2211.17192): a drafter proposes k tokens, the target model runs them in one forward pass,
and the longest prefix that the acceptance rule accepts is kept, followed by one token of the target's own. In a round's
tokens, the kept draft tokens are *accepted*; the last token is *corrected* if a draft token was rejected, and *bonus*
if none was. Without a draft it is *plain*. The first token, from the prefill's logits, is *prefill*.

This module knows token ids and nothing of text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from knn_ssd.backends.base import Session
from knn_ssd.errors import ModelError
from knn_ssd.sampling import CertainRow, Probs, Row, Sampler, are_finite
from knn_ssd.speculation.drafter import Draft, Drafter, Outcome

if TYPE_CHECKING:
    import torch


class FinishReason(StrEnum):
    """The reason why an output ended."""

    EOS = "eos"  # an end-of-sequence token, which is part of the output
    STOP = "stop"  # a stop string or stopping criterion
    LENGTH = "length"  # max_new_tokens
    CONTEXT = "context"  # the model's context is full, or the memory where no limit was given


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one emitted token: the log-softmax of the target's logits, before temperature and penalties.

    Args:
        token: the emitted token.
        logprob: its log-probability.
        top: the most likely tokens at its position with their log-probabilities, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Round:
    """One draft–verify–accept cycle, as it reached the output.

    Args:
        tokens: the emitted tokens, at least one. The first round has the one token after the prompt.
        drafted: how many tokens were drafted.
        accepted: how many draft tokens are among `tokens`.
        drafters: the name of the drafter of each of the `drafted` tokens.
        neighbour: which of the request's neighbours retrieved tokens came from; None where none were drafted.
        draft_sec: seconds spent drafting.
        verify_sec: seconds spent verifying and accepting.
        finish_reason: why the output ends with this round; None if it goes on.
        logprobs: log-probabilities of each of `tokens`, if they were asked for.
        is_prefill: whether this is the first round.
    """

    tokens: tuple[int, ...]
    drafted: int = 0
    accepted: int = 0
    drafters: tuple[str, ...] = ()
    neighbour: int | None = None
    draft_sec: float = 0.0
    verify_sec: float = 0.0
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    is_prefill: bool = False

    @property
    def origins(self) -> tuple[str, ...]:
        """The origin of each of `tokens`: its drafter's name, `corrected`, `bonus`, `plain` or `prefill`."""
        if self.is_prefill:
            return ("prefill",)
        own = "corrected" if self.accepted < self.drafted else "bonus" if self.drafted else "plain"
        return (*self.drafters[: self.accepted], own)[: len(self.tokens)]


@dataclass(frozen=True, slots=True)
class Verification:
    """The target's predictions at k draft tokens and at the position after them.

    Args:
        logits: (k + 1, V) the target's logits.
        probs: (k + 1, V) the distributions p that the target's tokens are drawn from.
    """

    logits: torch.Tensor
    probs: Probs


@dataclass(frozen=True, slots=True)
class Verdict:
    """The acceptance rule's verdict on a draft.

    Args:
        accepted: length of the accepted prefix of the draft.
        token: the target's own token after it.
    """

    accepted: int
    token: int


def verify(session: Session, context: Sequence[int], draft: Draft, sampler: Sampler) -> Verification:
    """Runs the draft through the target in one forward pass, which gives its distributions at and after the draft."""
    logits = session.forward([context[-1], *draft.tokens])  # (k + 1, V)
    return Verification(logits, _checked_probs(logits, context, draft.tokens, sampler))


def _checked_probs(logits: torch.Tensor, context: Sequence[int], tokens: Sequence[int], sampler: Sampler) -> Probs:
    """The sampler's distributions. Raises a `ModelError` for NaN or infinite logits, which would accept any draft."""
    probs = sampler.probs(logits, context, tokens)
    if not are_finite(logits, probs):
        raise ModelError(
            "the model gave logits that are not finite",
            "Its weights may be damaged; or its activations overflow: load it in float32.",
        )
    return probs


def accept(target_probs: Probs, draft: Draft, sampler: Sampler) -> Verdict:
    """Accepts a prefix of a draft by rejection sampling (arXiv 2211.17192, algorithm 1).

    A draft token x is accepted with probability min(1, p(x) / q(x)). The first rejected token is replaced by one drawn
    from the residual distribution, the normalised max(0, p - q); after k accepted tokens one is drawn from p. So the
    emitted tokens are distributed as the target's own. A token that was not drawn has q(x) = 1. In greedy decoding p is
    1 at the target's choice: the longest agreeing prefix is accepted, and that choice follows.

    Args:
        target_probs: (k + 1, V) p at each position.
        draft: k tokens with their q.
        sampler: draws tokens, and gives the uniform random numbers.
    """
    uniforms = sampler.uniform(len(draft.tokens))
    for index, token in enumerate(draft.tokens):
        p, q_of_token = target_probs[index], draft.proposal_probability(index)  # (V,) and q(x)
        if uniforms[index] * q_of_token >= float(p[token]):
            return Verdict(index, sampler.pick(_residual(p, draft, index)))
    return Verdict(len(draft.tokens), sampler.pick(target_probs[-1]))


def _residual(p: Row, draft: Draft, index: int) -> Row:
    """The residual max(0, p - q), (V,), not normalised; p itself if that is zero, after a rejection by rounding."""
    if isinstance(p, CertainRow):
        return p  # certain of another token, since this one was rejected
    if draft.probs is not None and index < len(draft.probs):
        residual = (p - draft.probs[index]).clamp_(min=0)
    else:
        residual = p.clone()
        residual[draft.tokens[index]] = 0  # q is 1 at the draft token
    return residual if residual.any() else p


def decode(
    session: Session,
    context: list[int],
    first_logits: torch.Tensor,
    drafter: Drafter | None,
    sampler: Sampler,
    max_new_tokens: int,
    ends: Callable[[int], FinishReason | None],
    at_limit: FinishReason = FinishReason.LENGTH,
    clock: Callable[[], float] | None = None,
    logprobs: int | None = None,
) -> Iterator[Round]:
    """Yields rounds until the output ends, exactly where decoding token by token would end it.

    Args:
        session: holds the prompt.
        context: the prompt's token ids; the output is appended as it is emitted.
        first_logits: (V,) logits for the token after the prompt.
        drafter: proposes draft tokens; None is plain decoding.
        sampler: chooses tokens.
        max_new_tokens: the longest output, at least 1; the session has room for it.
        ends: receives every emitted token in order, and says whether the output ends with it, and why.
        at_limit: the finish reason if `max_new_tokens` ends the output.
        clock: gives seconds; None is `time.perf_counter`.
        logprobs: how many of the likeliest tokens to report with each token's log-probability; None reports neither.

    Raises:
        ModelError: the target's logits are NaN or infinite.
    """
    clock = clock or time.perf_counter
    started = clock()
    left = max_new_tokens

    def ending(token: int, room: int) -> FinishReason | None:
        return ends(token) or (at_limit if room == 0 else None)

    first = sampler.pick(_checked_probs(first_logits[None], context, (), sampler)[0])
    current = _emit(context, [first], left, ending, Round((), is_prefill=True))
    current = _scored(replace(current, verify_sec=clock() - started), first_logits[None], logprobs)
    while True:
        yield current
        left -= len(current.tokens)
        if current.finish_reason is not None:
            return
        started = clock()
        draft = drafter.propose(context, left - 1) if drafter is not None and left > 1 else Draft()
        drafted = clock()
        verification = verify(session, context, draft, sampler)
        verdict = accept(verification.probs, draft, sampler)
        session.commit(verdict.accepted + 1)
        if drafter is not None:
            drafter.learn(Outcome(draft, verdict.accepted, drafted - started, clock() - drafted))
        tokens = [*draft.tokens[: verdict.accepted], verdict.token]
        shape = Round((), len(draft.tokens), verdict.accepted, draft.drafters, draft.neighbour, drafted - started)
        current = replace(_emit(context, tokens, left, ending, shape), verify_sec=clock() - drafted)
        current = _scored(current, verification.logits, logprobs)


def _emit(
    context: list[int],
    tokens: list[int],
    left: int,
    ending: Callable[[int, int], FinishReason | None],
    shape: Round,
) -> Round:
    """Appends tokens to the context up to where the output ends, and returns the round with them."""
    emitted: list[int] = []
    reason = None
    for token in tokens:
        emitted.append(token)
        context.append(token)
        reason = ending(token, left - len(emitted))
        if reason is not None:
            break
    accepted = min(shape.accepted, len(emitted))
    return replace(shape, tokens=tuple(emitted), accepted=accepted, finish_reason=reason)


def _scored(current: Round, logits: torch.Tensor, most: int | None) -> Round:
    """The round with its tokens' log-probabilities, from logits (m, V) whose first n rows belong to its n tokens."""
    return current if most is None else replace(current, logprobs=token_logprobs(current.tokens, logits, most))


def token_logprobs(tokens: Sequence[int], logits: torch.Tensor, most: int) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of n tokens, from logits (m, V) whose first n rows belong to them, with the `most` likeliest
    tokens at each position.
    """
    logprobs = logits[: len(tokens)].float().log_softmax(dim=-1)
    values, likeliest = logprobs.topk(min(most, logprobs.shape[-1]))  # (n, most)
    tops = zip(likeliest.tolist(), values.tolist(), strict=True)
    return tuple(
        TokenLogprobs(token, float(row[token]), tuple(zip(*top, strict=True)))
        for token, row, top in zip(tokens, logprobs, tops, strict=True)
    )
