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
        probs: (k, V) the distributions they were drawn from; None where they were not drawn but determined, which
            counts as probability one on each token.
        source: who proposed them.
    """

    tokens: tuple[int, ...] = ()
    probs: torch.Tensor | None = None
    source: str = "none"


class DraftSource(Protocol):
    """Proposes what may follow."""

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        """At most `limit` tokens to follow `context`, prompt and output so far."""
