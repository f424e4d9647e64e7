"""Self-drafts: the target under a plan drafts for itself (arXiv 2309.08168, section 3; arXiv 2505.16162)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from knn_ssd.backends.base import Session
from knn_ssd.plan import Plan
from knn_ssd.sampling import Sampler
from knn_ssd.speculation.drafter import Draft, Outcome


class SelfDraft:
    """Drafts on the target's own session, which is rewound whatever happens.

    Args:
        session: holds all of the context except its last token.
        plan: the modes while drafting, and when to stop.
        sampler: greedy drafts take the most likely token; others are drawn from the draft's own distribution.
    """

    def __init__(self, session: Session, plan: Plan, sampler: Sampler) -> None:
        self._session = session
        self._plan = plan
        self._sampler = sampler

    def propose(self, context: Sequence[int], limit: int, go_on: Callable[[float], bool] | None = None) -> Draft:
        """Drafts until `limit`, the policy's longest draft, or the stop rule.

        The token at which the rule stops stays in the draft: its cost is paid, and it is often right.

        Args:
            context: prompt and output so far.
            limit: the most tokens to draft.
            go_on: the stop rule: takes a token's confidence and says whether to draft another token. None goes on
                while the confidence is at least the policy's threshold.
        """
        start = self._session.length
        tokens: list[int] = []
        probs: list[torch.Tensor] = []  # (V,) for each drawn token
        confidences: list[float] = []
        policy = self._plan.policy
        go_on = go_on or (lambda confidence: confidence >= policy.threshold)
        try:
            while len(tokens) < min(limit, policy.max_draft):
                logits = self._session.forward([tokens[-1] if tokens else context[-1]], self._plan)  # (1, V)
                self._session.commit(1)
                row = self._sampler.probs(logits, [*context, *tokens])[0]
                tokens.append(self._sampler.pick(row))
                if isinstance(row, torch.Tensor):
                    probs.append(row)
                confidences.append(float(top_probability(logits)[0]))
                if not go_on(confidences[-1]):
                    break
        finally:
            self._session.rewind(start)
        return Draft(tuple(tokens), torch.stack(probs) if probs else None, "self", confidences=tuple(confidences))

    def learn(self, outcome: Outcome) -> None:
        """Does nothing: a self-draft does not change."""


def top_probability(logits: torch.Tensor) -> torch.Tensor:
    """The probability (n,) of the most likely token under logits (n, V), before any sampling settings."""
    scores = logits.float()
    if len(scores) == 1 and scores.device.type == "cpu":  # torch would use threads, which then spin beside the kernels'
        row = scores[0].numpy()
        return torch.tensor([1.0 / float(np.exp(row - row.max()).sum())])
    return (scores.amax(dim=-1) - scores.logsumexp(dim=-1)).exp()
