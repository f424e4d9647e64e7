"""How often drafted tokens are accepted, by drafter, confidence and match length, and when to try a drafter again.

Statistics are moving averages that start at a prior. This module knows nothing of costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from knn_ssd.plan import Plan
from knn_ssd.speculation.drafter import Draft

COPYING_DRAFTERS = ("lookup", "retrieval")
_DECAY, _PRIOR_DECAY = 0.985, 0.95  # of the weight of observations, and of the prior, with every new observation
_PRIOR_STRENGTH = 6.0  # observations that the prior stands for
_PASS_RATE = 0.1  # how fast the number of tokens that a draft pass gives is believed to change
_CONFIDENCE_EDGES = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
_MATCH_EDGES = (3, 4, 6, 9, 17)  # tokens
_MATCH_PRIORS = (0.3, 0.45, 0.6, 0.75, 0.85, 0.9)
_PRIOR_LOW, _PRIOR_SKIP = 0.85, 0.6  # acceptance rate of self-drafts whose plan has no evidence
_PRIOR_FORCED = 0.98  # of tokens that a grammar forces: a model may write the same bytes in other tokens
_FIRST_INTERVAL, _MAX_INTERVAL = 16, 128  # rounds between two tries of a drafter that does not pay
_CHEAPER = 0.95  # a relative cost below this share of the one at the last try is worth another try soon


class AcceptanceRate:
    """A moving acceptance rate that starts at a prior.

    Args:
        prior: the rate before anything was observed, in [0, 1].
    """

    def __init__(self, prior: float) -> None:
        self._prior, self._strength = prior, _PRIOR_STRENGTH
        self._accepted = self._observed = 0.0

    @property
    def mean(self) -> float:
        """The expected rate, in [0, 1]."""
        return (self._accepted + self._prior * self._strength) / (self._observed + self._strength)

    def record(self, accepted: bool) -> None:
        """Adds one observation."""
        self._accepted = self._accepted * _DECAY + accepted
        self._observed = self._observed * _DECAY + 1.0
        self._strength *= _PRIOR_DECAY


@dataclass
class RetryBackoff:
    """When a drafter that does not pay is tried again: at exponentially growing intervals.

    Attributes:
        waited: rounds since the last try.
        interval: rounds until the next one.
        relative_cost: expected seconds per token over plain decoding's at the last try.
    """

    waited: int = 0
    interval: int = _FIRST_INTERVAL
    relative_cost: float = 0.0

    def is_due(self, relative_cost: float = 0.0) -> bool:
        """Counts one round without the drafter, and says whether it is to be tried in this one."""
        self.waited += 1
        if self.waited < self.interval:
            return False
        self.waited, self.interval, self.relative_cost = 0, min(2 * self.interval, _MAX_INTERVAL), relative_cost
        return True

    def record(self, relative_cost: float) -> None:
        """Resets the interval where the drafter now looks clearly cheaper than at the last try."""
        if relative_cost < _CHEAPER * self.relative_cost:
            self.waited, self.interval, self.relative_cost = 0, _FIRST_INTERVAL, relative_cost


@dataclass
class AcceptanceStats:
    """Acceptance of drafts so far, shared by all requests of a domain under one plan.

    Args:
        prior: acceptance rate of a self-drafted token before any was observed.

    Attributes:
        self_draft: the rate of self-drafted tokens.
        by_confidence: the same by the draft's own top-1 probability.
        tokens_per_pass: moving average of the tokens that a forward pass of a self-draft gives.
        by_match: the rate of copied tokens by drafter, which is lookup or retrieval, and match length. That of tokens
            which a grammar forces stands among them, and is one for all lengths.
    """

    prior: float
    self_draft: AcceptanceRate = field(init=False)
    by_confidence: list[AcceptanceRate] = field(init=False)
    by_match: dict[str, list[AcceptanceRate]] = field(init=False)
    tokens_per_pass: float = 1.0
    self_draft_retry: RetryBackoff = field(default_factory=RetryBackoff)
    copy_retry: RetryBackoff = field(default_factory=RetryBackoff)

    def __post_init__(self) -> None:
        self.self_draft = AcceptanceRate(self.prior)
        edges = zip((0.0, *_CONFIDENCE_EDGES), (*_CONFIDENCE_EDGES, 1.0), strict=True)
        middles = [(low + high) / 2 for low, high in edges]
        # A good draft is right even where its confidence is low.
        self.by_confidence = [AcceptanceRate(middle ** (2 * (1 - self.prior))) for middle in middles]
        self.by_match = {name: [AcceptanceRate(prior) for prior in _MATCH_PRIORS] for name in COPYING_DRAFTERS}
        self.by_match["grammar"] = [AcceptanceRate(_PRIOR_FORCED)] * len(_MATCH_PRIORS)

    def at_confidence(self, probability: float) -> AcceptanceRate:
        """The rate of self-drafted tokens of such a top-1 probability."""
        return self.by_confidence[sum(probability >= edge for edge in _CONFIDENCE_EDGES)]

    def at_match(self, drafter: str, length: int) -> AcceptanceRate:
        """The rate of tokens that a drafter copied after a match of so many tokens."""
        return self.by_match[drafter][sum(length >= edge for edge in _MATCH_EDGES)]

    def record(self, draft: Draft, accepted: int) -> None:
        """Adds a verified draft of which the first `accepted` tokens were kept.

        Tokens after the first rejected one were never compared with the target, and count for nothing.
        """
        if draft.num_passes:
            self.tokens_per_pass += _PASS_RATE * (len(draft.confidences) / draft.num_passes - self.tokens_per_pass)
        for index, drafter in enumerate(draft.drafters[: accepted + 1]):
            kept = index < accepted
            if index < len(draft.confidences):
                self.self_draft.record(kept)
                self.at_confidence(draft.confidences[index]).record(kept)
            else:
                self.at_match(drafter, draft.match_length).record(kept)


def initial_acceptance(plan: Plan, agreement: float | None = None) -> AcceptanceStats:
    """Statistics before anything was observed.

    Args:
        plan: of the self-drafts.
        agreement: the acceptance rate that calibration measured for the plan; None where it did not.
    """
    if agreement is None:
        agreement = _PRIOR_SKIP if plan.num_skipped else _PRIOR_LOW
    return AcceptanceStats(agreement)
