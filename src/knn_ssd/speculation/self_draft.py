"""Self-drafts: the target under a plan drafts for itself (arXiv 2309.08168, section 3; arXiv 2505.16162)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from knn_ssd.backends.base import Session
from knn_ssd.plan import Plan
from knn_ssd.sampling import Row, Sampler
from knn_ssd.speculation.drafter import Draft, Outcome

MAX_GUESSES = 3  # tokens; four rows on 4-bit weights take about as long as one


class SelfDraft:
    """Drafts on the target's own session, which is rewound whatever happens.

    Guesses of what the draft will be may ride along: a forward pass runs them after the last token, and as long as a
    guess is what the draft itself chose, the next row is as good as another pass. They change nothing but the time.

    Args:
        session: holds all of the context except its last token.
        plan: the modes while drafting, and when to stop.
        sampler: greedy drafts take the most likely token; others are drawn from the draft's own distribution.
        is_ready: whether passes under the plan can run at once.
    """

    def __init__(
        self, session: Session, plan: Plan, sampler: Sampler, is_ready: Callable[[], bool] = lambda: True
    ) -> None:
        self.is_ready = is_ready
        self._session = session
        self._plan = plan
        self._sampler = sampler

    def propose(
        self,
        context: Sequence[int],
        limit: int,
        go_on: Callable[[float], bool] | None = None,
        guess: Callable[[Sequence[int]], Sequence[int]] | None = None,
    ) -> Draft:
        """Drafts until `limit`, the policy's longest draft, or the stop rule.

        The token at which the rule stops stays in the draft: its cost is paid, and it is often right.

        Args:
            context: prompt and output so far.
            limit: the most tokens to draft.
            go_on: the stop rule: takes a token's confidence and says whether to draft another token. None goes on
                while the confidence is at least the policy's threshold.
            guess: takes the tokens drafted so far, and gives a guess of the next ones; None guesses nothing.
        """
        start = self._session.length
        policy = self._plan.policy
        draft = _Drafted(go_on or (lambda confidence: confidence >= policy.threshold))
        longest, passes = min(limit, policy.max_draft), 0
        try:
            while len(draft.tokens) < longest and not draft.has_stopped:
                room = min(MAX_GUESSES, longest - len(draft.tokens) - 1)
                guesses = list(guess(draft.tokens))[:room] if guess is not None and room > 0 else []
                self._run(context, guesses, draft)
                passes += 1
        finally:
            self._session.rewind(start)
        probs = torch.stack(draft.probs) if draft.probs else None
        confidences = tuple(draft.confidences)
        return Draft(tuple(draft.tokens), probs, "self", confidences=confidences, num_passes=passes)

    def _run(self, context: Sequence[int], guesses: list[int], draft: _Drafted) -> None:
        """One forward pass, which drafts a token, and another one for each guess that turns out right."""
        last = draft.tokens[-1] if draft.tokens else context[-1]
        logits = self._session.forward([last, *guesses], self._plan)  # (1 + guesses, V)
        for row in range(len(logits)):
            before = [*context, *draft.tokens]
            own = self._sampler.masked(logits[row : row + 1], before)
            probs = self._sampler.probs(own, before, is_masked=True)[0]
            draft.add(self._sampler.pick(probs), probs, float(top_probability(own)[0]))
            if draft.has_stopped or row == len(guesses) or guesses[row] != draft.tokens[-1]:
                self._session.commit(row + 1)
                return

    def learn(self, outcome: Outcome) -> None:
        """Does nothing: a self-draft does not change."""


@dataclass(slots=True)
class _Drafted:
    """The draft so far; `has_stopped` once the stop rule has ended it."""

    go_on: Callable[[float], bool]
    tokens: list[int] = field(default_factory=list)
    probs: list[torch.Tensor] = field(default_factory=list)  # (V,) for each drawn token
    confidences: list[float] = field(default_factory=list)
    has_stopped: bool = False

    def add(self, token: int, probs: Row, confidence: float) -> None:
        self.tokens.append(token)
        if isinstance(probs, torch.Tensor):
            self.probs.append(probs)
        self.confidences.append(confidence)
        self.has_stopped = not self.go_on(confidence)


def top_probability(logits: torch.Tensor) -> torch.Tensor:
    """The probability (n,) of the most likely token under logits (n, V), before any sampling settings."""
    scores = logits.float()
    if len(scores) == 1 and scores.device.type == "cpu":  # torch would use threads, which then spin beside the kernels'
        row = scores[0].numpy()
        return torch.tensor([1.0 / float(np.exp(row - row.max()).sum())])
    return (scores.amax(dim=-1) - scores.logsumexp(dim=-1)).exp()
