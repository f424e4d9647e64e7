"""The contract between a drafter and a round: what a drafter proposes, and what it learns of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens proposed to follow a context.

    Args:
        tokens: k drafted tokens, possibly none.
        probs: (m, V) the distributions that the first m tokens were drawn from. The tokens after them, or all where
            this is None, were not drawn: each counts as proposed with probability one.
        drafter: name of the drafter of all but the last `num_looked_up` tokens.
        num_looked_up: how many of the last tokens lookup appended to another drafter's draft.
        confidences: the draft's own top-1 probability of each self-drafted token.
        match_length: tokens of the context's suffix after whose earlier occurrence the looked-up tokens stood.
    """

    tokens: tuple[int, ...] = ()
    probs: torch.Tensor | None = None
    drafter: str = "none"
    num_looked_up: int = 0
    confidences: tuple[float, ...] = ()
    match_length: int = 0

    @property
    def drafters(self) -> tuple[str, ...]:
        """The name of each token's drafter."""
        own = len(self.tokens) - self.num_looked_up
        return (self.drafter,) * own + ("lookup",) * self.num_looked_up

    def proposal_probability(self, index: int) -> float:
        """The probability with which the token at `index` was proposed: q(x) in the acceptance rule."""
        if self.probs is None or index >= len(self.probs):
            return 1.0
        return float(self.probs[index, self.tokens[index]])


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verified draft.

    Args:
        draft: what was proposed.
        accepted: length of the prefix that was kept.
        draft_sec: seconds spent drafting.
        verify_sec: seconds spent verifying and accepting.
    """

    draft: Draft
    accepted: int
    draft_sec: float
    verify_sec: float


class Drafter(Protocol):
    """Proposes tokens that may follow a context."""

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        """Drafts at most `limit` tokens to follow `context`, the prompt and the output so far."""

    def learn(self, outcome: Outcome) -> None:
        """Receives what became of the last proposal."""
