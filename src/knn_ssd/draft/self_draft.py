"""The target drafts for itself, with its sublayers as the plan has them (arXiv 2309.08168, section 3; 2505.16162)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from knn_ssd.draft.contract import Draft
from knn_ssd.plan import Plan
from knn_ssd.sampling import Sampler
from knn_ssd.target.contract import Session


class SelfDraft:
    """Drafts on the target's own session, which is rewound whatever happens.

    Args:
        session: holds all of the context but its last token.
        plan: the modes while drafting, and when to stop.
        sampler: greedy drafts take the most likely token; others are drawn from the draft's own distribution.
    """

    def __init__(self, session: Session, plan: Plan, sampler: Sampler) -> None:
        self._session = session
        self._plan = plan
        self._sampler = sampler

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        """Drafts until `limit`, the policy's longest draft, or a token whose own top probability is under the
        threshold.

        That last token stays in the draft: it is paid for, and often right.
        """
        start = self._session.length
        tokens: list[int] = []
        probs: list[torch.Tensor] = []  # (V,) each
        policy = self._plan.policy
        try:
            while len(tokens) < min(limit, policy.max_draft):
                logits = self._session.forward([tokens[-1] if tokens else context[-1]], self._plan)  # (1, V)
                self._session.commit(1)
                row = self._sampler.probs(logits, [*context, *tokens])[0]
                tokens.append(self._sampler.pick(row))
                probs.append(row)
                if top_probability(logits)[0] < policy.threshold:
                    break
        finally:
            self._session.rewind(start)
        drawn = torch.stack(probs) if probs and not self._sampler.greedy else None
        return Draft(tuple(tokens), drawn, "self")


def top_probability(logits: torch.Tensor) -> torch.Tensor:
    """The probability (n,) of the most likely token under logits (n, V), before any sampling settings."""
    scores = logits.float()
    return (scores.amax(dim=-1) - scores.logsumexp(dim=-1)).exp()
