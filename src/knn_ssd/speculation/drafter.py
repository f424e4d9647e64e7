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
        drafter: name of the drafter of all but the last `num_copied` tokens.
        num_copied: how many of the last tokens were copied, and appended to another drafter's draft.
        copied_by: name of the drafter that appended them.
        confidences: the draft's own top-1 probability of each self-drafted token.
        num_passes: how many forward passes the self-drafted tokens took.
        match_length: tokens of the context's suffix after whose earlier occurrence the copied tokens stood.
        neighbour: which of the request's neighbours retrieved tokens were copied from; None where none were.
    """

    tokens: tuple[int, ...] = ()
    probs: torch.Tensor | None = None
    drafter: str = "none"
    num_copied: int = 0
    copied_by: str = "lookup"
    confidences: tuple[float, ...] = ()
    num_passes: int = 0
    match_length: int = 0
    neighbour: int | None = None

    @property
    def drafters(self) -> tuple[str, ...]:
        """The name of each token's drafter."""
        own = len(self.tokens) - self.num_copied
        return (self.drafter,) * own + (self.copied_by,) * self.num_copied

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
