"""What a source of drafts gives to a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens proposed to follow a context.

    Args:
        tokens: k of them, perhaps none.
        probs: (m, V) the distributions that the first m of them were drawn from; those after them, or all where this
            is None, were not drawn but determined, which counts as probability one on each token.
        source: who proposed them.
        looked_up: how many of the last tokens look-up appended to another source's draft.
        sure: for each token, how likely its source holds it to be right, where it can tell.
        match: length of the context's suffix whose earlier occurrence looked-up tokens were copied from.
    """

    tokens: tuple[int, ...] = ()
    probs: torch.Tensor | None = None
    source: str = "none"
    looked_up: int = 0
    sure: tuple[float, ...] = ()
    match: int = 0

    @property
    def sources(self) -> tuple[str, ...]:
        """Who proposed each token."""
        own = len(self.tokens) - self.looked_up
        return (self.source,) * own + ("lookup",) * self.looked_up

    def chance(self, index: int) -> float:
        """The probability with which the token at `index` was proposed: q of the acceptance rule."""
        if self.probs is None or index >= len(self.probs):
            return 1.0
        return float(self.probs[index, self.tokens[index]])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a draft.

    Args:
        draft: which.
        accepted: length of the prefix that was kept.
        draft_sec: seconds spent drafting.
        verify_sec: seconds spent verifying and accepting.
    """

    draft: Draft
    accepted: int
    draft_sec: float
    verify_sec: float


class DraftSource(Protocol):
    """Proposes what may follow, and hears what became of it."""

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        """At most `limit` tokens to follow `context`, prompt and output so far."""

    def learn(self, outcome: Outcome) -> None:
        """The last proposal was verified."""
