"""Rounds: draft, verify, accept. Text, streams, the server, the benchmark and calibration all consume these.

Speculative decoding (arXiv 2211.17192): a source drafts k tokens, the target runs them in one pass, and the longest
prefix that the acceptance rule lets through is kept, with one token of the target's own after it. In a round's
tokens, the drafted ones that were kept are *accepted*; the last is *corrected* where a drafted token was rejected and
*bonus* where none was. Without a draft it is *plain*, and the token that the prompt's own pass gave is *prefill*.

This module knows token ids and nothing of text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from knn_ssd.backends.base import Session
from knn_ssd.sampling import CertainRow, Probs, Row, Sampler
from knn_ssd.speculation.drafter import Draft, Drafter, Outcome

if TYPE_CHECKING:
    import torch


class FinishReason(StrEnum):
    """Why the output ended."""

    EOS = "eos"  # an end-of-sequence token, which is part of the output
    STOP = "stop"  # a stop string or stopping criterion
    LENGTH = "length"  # max_new_tokens
    CONTEXT = "context"  # the model's context is full


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the target holds of one emitted token: the log-softmax of its raw logits, before temperature and penalties.

    Args:
        token: the emitted one.
        logprob: its own.
        top: the most likely tokens at its place with theirs, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Round:
    """One draft–verify–accept cycle, as it reached the output.

    Args:
        tokens: what was emitted, at least one token. The first round is the prefill's one token.
        drafted: how many tokens were drafted.
        accepted: how many of the drafted ones are among `tokens`.
        drafters: the name of the drafter of each of the `drafted` tokens.
        draft_sec: seconds spent drafting.
        verify_sec: seconds spent verifying and accepting.
        finish_reason: why the output ends with this round, None where it goes on.
        logprobs: of each of `tokens`, where they were asked for.
        is_prefill: whether this is the first round.
    """

    tokens: tuple[int, ...]
    drafted: int = 0
    accepted: int = 0
    drafters: tuple[str, ...] = ()
    draft_sec: float = 0.0
    verify_sec: float = 0.0
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    is_prefill: bool = False

    @property
    def origins(self) -> tuple[str, ...]:
        """Where each of `tokens` came from: who drafted it, `corrected`, `bonus`, `plain` or `prefill`."""
        if self.is_prefill:
            return ("prefill",)
        own = "corrected" if self.accepted < self.drafted else "bonus" if self.drafted else "plain"
        return (*self.drafters[: self.accepted], own)[: len(self.tokens)]


@dataclass(frozen=True, slots=True)
class Verified:
    """What the target makes of k drafted positions and the one after them.

    Args:
        logits: (k + 1, V), as the model gave them.
        probs: (k + 1, V), what tokens are drawn from.
    """

    logits: torch.Tensor
    probs: Probs


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the acceptance rule made of a draft.

    Args:
        accepted: length of the drafted prefix that is kept.
        token: the target's own token after it.
    """

    accepted: int
    token: int


def verify(session: Session, context: Sequence[int], draft: Draft, sampler: Sampler) -> Verified:
    """The target's distributions at the drafted positions and after them, in one pass."""
    logits = session.forward([context[-1], *draft.tokens])  # (k + 1, V)
    return Verified(logits, sampler.probs(logits, context, draft.tokens))


def accept(target_probs: Probs, draft: Draft, sampler: Sampler) -> Verdict:
    """The rejection rule of arXiv 2211.17192, algorithm 1: what is emitted is distributed as the target's own.

    A drafted token x is kept with probability min(1, p(x) / q(x)); at the first that is not, the token comes from the
    normalised max(0, p - q). A determined token has q = 1 on itself. Greedy decoding is the case where p is one on
    the target's choice: the longest agreeing prefix, then that choice.

    Args:
        target_probs: (k + 1, V).
        draft: k tokens.
        sampler: draws, and gives the random numbers.
    """
    chances = sampler.uniform(len(draft.tokens))
    for index, token in enumerate(draft.tokens):
        p = target_probs[index]  # (V,)
        if chances[index] * draft.proposal_probability(index) >= float(p[token]):
            return Verdict(index, sampler.pick(_residual(p, draft, index)))
    return Verdict(len(draft.tokens), sampler.pick(target_probs[-1]))


def _residual(p: Row, draft: Draft, index: int) -> Row:
    """max(0, p - q), (V,), not normalised; p itself where rounding alone rejected and nothing is left."""
    if isinstance(p, CertainRow):
        return p  # of another token, or it would not have been rejected
    if draft.probs is not None and index < len(draft.probs):
        rest = (p - draft.probs[index]).clamp_(min=0)
    else:
        rest = p.clone()
        rest[draft.tokens[index]] = 0
    return rest if rest.any() else p


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
    """Rounds until the output ends, exactly where decoding token by token would end it.

    Args:
        session: holds the prompt.
        context: the prompt's token ids; the output is appended as it is emitted.
        first_logits: (V,) for the token after the prompt.
        source: who drafts; None is plain decoding.
        sampler: chooses tokens.
        max_new_tokens: the longest output, at least 1; the session has room for it.
        ends: told every emitted token in order, says whether the output ends with it.
        at_limit: the reason given where `max_new_tokens` ends it.
        clock: in seconds; None is the machine's own.
        logprobs: for each token, tell its logarithmic probability and those of so many likeliest; None is neither.
    """
    clock = clock or time.perf_counter
    started = clock()
    left = max_new_tokens

    def ending(token: int, room: int) -> FinishReason | None:
        return ends(token) or (at_limit if room == 0 else None)

    first = sampler.pick(sampler.probs(first_logits[None], context)[0])
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
        verified = verify(session, context, draft, sampler)
        verdict = accept(verified.probs, draft, sampler)
        session.commit(verdict.accepted + 1)
        if drafter is not None:
            drafter.learn(Outcome(draft, verdict.accepted, drafted - started, clock() - drafted))
        tokens = [*draft.tokens[: verdict.accepted], verdict.token]
        shape = Round((), len(draft.tokens), verdict.accepted, draft.drafters, drafted - started)
        current = replace(_emit(context, tokens, left, ending, shape), verify_sec=clock() - drafted)
        current = _scored(current, verified.logits, logprobs)


def _emit(
    context: list[int],
    tokens: list[int],
    left: int,
    ending: Callable[[int, int], FinishReason | None],
    shape: Round,
) -> Round:
    """Appends tokens to the context up to where the output ends, and gives the round that they make."""
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
    """The round with its tokens' logarithmic probabilities, from logits (n, V) that begin with their rows."""
    if most is None:
        return current
    logprobs = logits[: len(current.tokens)].float().log_softmax(dim=-1)
    values, tokens = logprobs.topk(min(most, logprobs.shape[-1]))  # (n, most)
    tops = zip(tokens.tolist(), values.tolist(), strict=True)
    scored = (
        TokenLogprobs(token, float(row[token]), tuple(zip(*top, strict=True)))
        for token, row, top in zip(current.tokens, logprobs, tops, strict=True)
    )
    return replace(current, logprobs=tuple(scored))
