"""Chooses for each round which drafter drafts, and how far, by expected tokens per second; none where plain is faster.

A self-draft of k tokens, each accepted with probability a, brings 1 + a + … + aᵏ tokens (arXiv 2211.17192, equation 1)
and takes k draft steps and one verification of k + 1 rows. The best k of each drafter is compared with plain decoding.
While a self-draft runs, it goes on as long as the next token's chance of acceptance is worth more time than it takes.

What passes cost is known to `cost_model.py`, how often drafts are accepted to `acceptance.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from knn_ssd.plan import Plan
from knn_ssd.speculation.acceptance import AcceptanceStats
from knn_ssd.speculation.cost_model import CostModel
from knn_ssd.speculation.drafter import Draft, Outcome
from knn_ssd.speculation.grammar_draft import GrammarDraft
from knn_ssd.speculation.lookup import LookupDraft
from knn_ssd.speculation.retrieval import RetrievalDraft
from knn_ssd.speculation.self_draft import MAX_GUESSES, SelfDraft

_MIN_GAIN = 0.98  # a draft is made if it is expected to take at most this share of plain decoding's time per token
_MAX_COPIED = 15  # tokens
_TRIAL_COPIED = 2  # tokens copied to try again a drafter that did not pay
_LONG_MATCH = 4  # tokens of a match that a fixed policy prefers to a self-draft


@dataclass(frozen=True, slots=True)
class DraftOption:
    """A draft that could be made in this round.

    Args:
        length: tokens to draft.
        sec_per_token: expected seconds of the round over expected tokens.
    """

    length: int
    sec_per_token: float


@dataclass(frozen=True, slots=True)
class _Copy:
    """Tokens that could be copied.

    Args:
        rate: their expected acceptance rate.
        available: how many there are.
        take: gives at most so many of them.
    """

    rate: float
    available: int
    take: Callable[[int], Draft]


def best_draft_length(cost_model: CostModel, acceptance_rate: float, longest: int, step_sec: float) -> DraftOption:
    """The best length of a draft whose tokens each take `step_sec` and are accepted at this rate."""
    best = DraftOption(0, float("inf"))
    tokens = power = 1.0
    for length in range(1, longest + 1):
        power *= acceptance_rate
        tokens += power
        sec_per_token = (length * step_sec + cost_model.verification_sec(length + 1)) / tokens
        if sec_per_token >= best.sec_per_token:
            break
        best = DraftOption(length, sec_per_token)
    return best


@dataclass
class DraftStopRule:
    """Decides after each token of a self-draft whether drafting another one is worth its time.

    Args:
        cost_model: expected costs.
        acceptance: of the request's domain.
        step_sec: seconds of drafting one token.
        sec_per_token: what the round is expected to come to.

    Attributes:
        survival: probability that all tokens drafted so far are accepted.
    """

    cost_model: CostModel
    acceptance: AcceptanceStats
    step_sec: float
    sec_per_token: float
    survival: float = 1.0
    _length: int = 0

    def __post_init__(self) -> None:
        self._next_rate = self.acceptance.self_draft.mean

    def __call__(self, confidence: float) -> bool:
        """Takes the newest token's confidence, and says whether to draft another token."""
        self.survival *= self.acceptance.at_confidence(confidence).mean
        self._length += 1
        rows = self._length + 1
        extra_row = self.cost_model.verification_sec(rows + 1) - self.cost_model.verification_sec(rows)
        return self.survival * self._next_rate * self.sec_per_token > self.step_sec + extra_row


class SelfDraftChoice:
    """Whether a self-draft is worth its time in this round, and where it stops.

    Args:
        cost_model: expected costs.
        acceptance: of the request's domain.
        longest: the most tokens that may be drafted.
        step_sec: seconds of drafting one token.

    Attributes:
        sec_per_token: expected seconds of the round over expected tokens, at the best length.
    """

    def __init__(self, cost_model: CostModel, acceptance: AcceptanceStats, longest: int, step_sec: float) -> None:
        self._cost_model = cost_model
        self._acceptance = acceptance
        self._longest = longest
        self._step_sec = step_sec
        self._plain_sec = cost_model.verification_sec(1)
        self.sec_per_token = best_draft_length(cost_model, acceptance.self_draft.mean, longest, step_sec).sec_per_token

    def is_faster_than_plain(self) -> bool:
        """Whether it is expected to be faster than plain decoding, by a margin; asked once in a round."""
        self._acceptance.self_draft_retry.record(self.sec_per_token / self._plain_sec)
        return self.sec_per_token < _MIN_GAIN * self._plain_sec

    def is_retry_due(self) -> bool:
        """Whether it is tried although it does not pay; asked once in a round in which it does not."""
        return self._acceptance.self_draft_retry.is_due(self.sec_per_token / self._plain_sec)

    def allowed_length(self) -> int:
        """How many tokens may be drafted in this round: as many as asked for, one as a retry, or none."""
        return self._longest if self.is_faster_than_plain() else int(self.is_retry_due())

    def stop_rule(self) -> DraftStopRule:
        """The rule that ends the draft."""
        return DraftStopRule(self._cost_model, self._acceptance, self._step_sec, self.sec_per_token)


@dataclass
class Controller:
    """A drafter that chooses among others.

    Args:
        plan: its policy bounds what may be done: the longest self-draft, and whether to look up.
        cost_model: expected costs.
        acceptance: of the request's domain.
        self_draft: None where the plan saves nothing.
        lookup: None where the policy has no lookup.
        retrieval: None where there are no neighbours.
        grammar: None where the output is free text.
    """

    plan: Plan
    cost_model: CostModel
    acceptance: AcceptanceStats
    self_draft: SelfDraft | None
    lookup: LookupDraft | None
    retrieval: RetrievalDraft | None = None
    grammar: GrammarDraft | None = None

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        """The best drafter's draft; an empty one where plain decoding is best, or has to be timed again."""
        if self.cost_model.needs_plain_timing or limit < 1:
            return Draft()
        draft = self._propose(context, limit)
        return draft if self.grammar is None else self.grammar.without_refused(context, draft)

    def _propose(self, context: Sequence[int], limit: int) -> Draft:
        copy = self._best_copy(context)
        plain_sec = self.cost_model.verification_sec(1)
        self_draft = self._self_draft_choice(limit)
        if copy is not None:
            best = best_draft_length(self.cost_model, copy.rate, min(limit, _MAX_COPIED, copy.available), 0.0)
            other_sec = self_draft.sec_per_token if self_draft else plain_sec
            if best.sec_per_token < min(_MIN_GAIN * plain_sec, other_sec):
                return self._copied(copy, best, context, limit)
        if self_draft is not None and self_draft.is_faster_than_plain():
            return self._draft(context, limit, self_draft)
        if copy is not None and self.acceptance.copy_retry.is_due():
            return copy.take(min(_TRIAL_COPIED, limit))
        if self_draft is not None and self_draft.is_retry_due():
            return self._draft(context, 1, self_draft)
        return Draft()

    def learn(self, outcome: Outcome) -> None:
        """Corrects expected costs and acceptance by a verified draft."""
        draft = outcome.draft
        if self.cost_model.learns_from_rounds:
            self.cost_model.record_verification(len(draft.tokens) + 1, outcome.verify_sec)
            if draft.confidences:
                self.cost_model.record_draft_steps(self.plan, draft.num_passes, outcome.draft_sec)
        self.acceptance.record(draft, outcome.accepted)
        if self.retrieval is not None:
            self.retrieval.learn(outcome)

    def _draft(self, context: Sequence[int], limit: int, choice: SelfDraftChoice) -> Draft:
        assert self.self_draft is not None
        go_on = choice.stop_rule()
        draft = self.self_draft.propose(context, limit, go_on, partial(self._guess, context))
        return self._extend(draft, context, limit, go_on.survival, choice.sec_per_token)

    def _copied(self, copy: _Copy, best: DraftOption, context: Sequence[int], limit: int) -> Draft:
        """The copied tokens; after tokens that the grammar forces goes on what can be copied there."""
        draft = copy.take(best.length)
        if draft.drafter != "grammar":
            return draft
        return self._extend(draft, context, limit, copy.rate**best.length, best.sec_per_token)

    def _guess(self, context: Sequence[int], drafted: Sequence[int]) -> Sequence[int]:
        """What may follow a self-draft, for its next pass to check: what can be copied there."""
        copy = self._best_copy(context, drafted)
        most = MAX_GUESSES // self.cost_model.batch_size  # a pass of many rows is no longer as cheap as one of one
        return copy.take(most).tokens if copy is not None and most else ()

    def _extend(self, draft: Draft, context: Sequence[int], limit: int, survival: float, sec_per_token: float) -> Draft:
        """Appends what can be copied after a draft, as far as verifying it too is worth the time."""
        copy = self._best_copy(context, draft.tokens)
        if copy is None:
            return draft
        own, length = len(draft.tokens), 0
        while own + length < limit and length < min(_MAX_COPIED, copy.available):
            survival *= copy.rate
            rows = own + length + 1
            extra_row = self.cost_model.verification_sec(rows + 1) - self.cost_model.verification_sec(rows)
            if survival * sec_per_token <= extra_row:
                break
            length += 1
        more = copy.take(length)
        return replace(
            draft,
            tokens=draft.tokens + more.tokens,
            num_copied=len(more.tokens),
            copied_by=more.drafter,
            match_length=more.match_length,
            neighbour=more.neighbour,
        )

    def _self_draft_choice(self, limit: int) -> SelfDraftChoice | None:
        longest = min(limit, self.plan.policy.max_draft)
        if self.self_draft is None or longest < 1 or not self.self_draft.is_ready():
            return None
        step_sec = self.cost_model.draft_step_sec(self.plan) / self.acceptance.tokens_per_pass
        return SelfDraftChoice(self.cost_model, self.acceptance, longest, step_sec)

    def _best_copy(self, context: Sequence[int], drafted: Sequence[int] = ()) -> _Copy | None:
        """The tokens that are likeliest to be accepted of those that could be copied after context and draft."""
        return max(self._copies(context, drafted), key=lambda copy: copy.rate, default=None)  # the first of equal ones

    def _copies(self, context: Sequence[int], drafted: Sequence[int]) -> Iterator[_Copy]:
        """What the grammar forces, then from the request's own context, then from its neighbours, nearest first."""
        if self.grammar is not None and (forced := self.grammar.forced(context, drafted)):
            rate = self.acceptance.at_match("grammar", 0).mean
            yield _Copy(rate, len(forced), partial(self.grammar.copy, forced))
        match = self.lookup.match(context, drafted) if self.lookup is not None else None
        if match is not None and self.lookup is not None:
            take = partial(self.lookup.propose, context, drafted=drafted)
            yield _Copy(self.acceptance.at_match("lookup", match.length).mean, _MAX_COPIED, take)
        if self.retrieval is None:
            return
        for found in self.retrieval.matches(context, drafted):
            rate = self.retrieval.rate(found, self.acceptance.at_match("retrieval", found.length).mean)
            yield _Copy(rate, found.available, partial(self.retrieval.copy, found))


class FixedPolicy:
    """A drafter that follows a plan's policy to the letter, whatever it costs.

    It looks up where the match is long, and self-drafts otherwise.

    Args:
        plan: whose policy is followed.
        self_draft: None where only lookup drafts.
        lookup: None where the policy has no lookup.
        grammar: drafts what it forces before the others; None where the output is free text.
    """

    def __init__(
        self,
        plan: Plan,
        self_draft: SelfDraft | None,
        lookup: LookupDraft | None,
        grammar: GrammarDraft | None = None,
    ) -> None:
        self._plan = plan
        self._self_draft = self_draft
        self._lookup = lookup
        self._grammar = grammar

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        """The draft that the policy asks for."""
        if self._grammar is not None and (forced := self._grammar.propose(context, limit)).tokens:
            return forced
        if self._lookup is not None:
            match = self._lookup.match(context)
            shortest = _LONG_MATCH if self._self_draft is not None else 1
            if match is not None and match.length >= shortest:
                return self._lookup.propose(context, min(limit, self._plan.policy.max_draft))
        return self._self_draft.propose(context, limit) if self._self_draft is not None else Draft()

    def learn(self, outcome: Outcome) -> None:
        """Does nothing: a fixed policy does not change."""
