"""The target drafts for itself, with its sublayers as the plan has them (arXiv 2309.08168, section 3; 2505.16162)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from knn_ssd.draft.contract import Draft, Outcome
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

    def propose(self, context: Sequence[int], limit: int, go_on: Callable[[float], bool] | None = None) -> Draft:
        """Drafts until `limit`, the policy's longest draft, or a token after which to stop.

        That last token stays in the draft: it is paid for, and often right.

        Args:
            context: prompt and output so far.
            limit: the most tokens.
            go_on: told the draft's own top probability at each token, says whether to draft another one; None goes on
                while it is not under the policy's threshold.
        """
        start = self._session.length
        tokens: list[int] = []
        probs: list[torch.Tensor] = []  # (V,) each, of drawn tokens
        sure: list[float] = []
        policy = self._plan.policy
        go_on = go_on or (lambda top: top >= policy.threshold)
        try:
            while len(tokens) < min(limit, policy.max_draft):
                logits = self._session.forward([tokens[-1] if tokens else context[-1]], self._plan)  # (1, V)
                self._session.commit(1)
                row = self._sampler.probs(logits, [*context, *tokens])[0]
                tokens.append(self._sampler.pick(row))
                if isinstance(row, torch.Tensor):
                    probs.append(row)
                sure.append(float(top_probability(logits)[0]))
                if not go_on(sure[-1]):
                    break
        finally:
            self._session.rewind(start)
        return Draft(tuple(tokens), torch.stack(probs) if probs else None, "self", sure=tuple(sure))

    def learn(self, outcome: Outcome) -> None:
        """A fixed policy learns nothing."""


def top_probability(logits: torch.Tensor) -> torch.Tensor:
    """The probability (n,) of the most likely token under logits (n, V), before any sampling settings."""
    scores = logits.float()
    return (scores.amax(dim=-1) - scores.logsumexp(dim=-1)).exp()
