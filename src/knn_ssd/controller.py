"""Chooses each round who drafts and how far, by expected tokens per second; nobody, where that is slower than plain.

What a round costs comes from the cost profile, corrected by every round that is run. What it brings comes from the
acceptance seen so far, kept per label and source, from a prior until there is enough of it. A self-draft of k tokens
whose tokens are accepted with probability a each brings 1 + a + … + aᵏ tokens (arXiv 2211.17192, equation 1) and takes
k draft steps and one verification of k + 1 rows; the best k of each source is compared. While a self-draft runs, it
goes on as long as the next token's chance of being accepted, by the draft's own top probabilities so far, is worth more
time than it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from knn_ssd.atlas import CostProfile
from knn_ssd.draft.contract import Draft, Outcome
from knn_ssd.draft.lookup import LookupDraft
from knn_ssd.draft.self_draft import SelfDraft
from knn_ssd.plan import Mode, Plan

_GAIN = 0.98  # a draft must be foretold to take this share of plain decoding's time per token, or less
_LONGEST_LOOKUP = 15
_PATIENCE = 16  # rounds without a source before it is tried again; doubled each time in vain
_MOST_PATIENCE = 128
_NEARER = 0.95  # of a price
_LEVEL_RATE, _RATE = 0.1, 0.02  # of corrections of all costs and of one kind's; the first of a kind go faster
_STALE = 12  # passes after which what was seen of a kind does not slow its correction
_HOPE, _DISAPPOINTMENT = 0.02, 0.15  # how fast all are thought to draft again, and those who did not to stay away
_FIRST_PLAIN, _PLAIN_EVERY = 8, 64  # passes without one of a single row until one is wanted, doubled from the first on
_MOST_ROWS = 32  # beyond that, costs are corrected as for so many
_LIKENESS = 0.95  # of a block's cost to that of one with a row more
_MOST_RATIO = 2.0  # one observation counts as no more than this much off, but for the first
_MEMORY = 0.985  # what is left of an observation's weight at the next one
_PRIOR_MEMORY = 0.95  # and of the prior's
_SURE_EDGES = (0.3, 0.5, 0.7, 0.85, 0.95, 0.99)
_MATCH_EDGES = (3, 4, 6, 9, 17)
_MATCH_PRIORS = (0.3, 0.45, 0.6, 0.75, 0.85, 0.9)
_PRIOR_LOW, _PRIOR_SKIP = 0.85, 0.6  # acceptance of drafts whose plan has no evidence


class Costs:
    """Seconds of passes: a profile's shape, corrected by what is seen. Shared by all requests of an engine.

    Attributes:
        company: how many requests share each pass; its cost is what one of them bears of it, all asking for as much.
        by_pass: whether somebody else tells what each pass took; rounds do not know it of passes that they share.
    """

    def __init__(self, profile: CostProfile) -> None:
        self.company = 1
        self.by_pass = False
        self._profile = profile
        self._drafters = 1.0  # how many of the company drafted together lately
        self._level: float | None = None  # of the whole profile on this machine now
        self._by_rows = [1.0] * (_MOST_ROWS + 1)
        self._by_modes: dict[tuple[Mode, ...], list[float]] = {}  # and rows
        self._seen: dict[object, tuple[int, int]] = {}  # by rows, or modes and rows: how often, and when last
        self._passes = self._plain_passes = 0

    def verification(self, rows: int) -> float:
        """Of one request's rows."""
        return self._block(rows * self.company) / self.company

    def step(self, plan: Plan) -> float:
        """Of one request's draft by a token. All wait for it, so those who draft bear the whole pass."""
        drafters = max(1, min(self.company, round(self._drafters)))
        return self.drafting_pass(plan, drafters) / drafters

    def drafting_pass(self, plan: Plan, rows: int) -> float:
        """A whole pass that drafts one token for each of so many requests."""
        more = self._block(rows) - self._block(1)  # arithmetic, mostly
        known = self._profile.draft_step_sec(plan) * (self._level or 1.0) + max(0.0, more)
        return known * self._steps(plan)[min(rows, _MOST_ROWS)]

    def saw_verification(self, rows: int, seconds: float) -> None:
        """What a pass took."""
        factor = self._correction(rows, seconds / max(self._block(rows), 1e-9))
        if rows == 1:
            self._plain_passes += 1
        self._drafters += _HOPE * (self.company - self._drafters)
        _correct(self._by_rows, rows, factor)

    def saw_steps(self, plan: Plan, count: int, seconds: float, rows: int = 1) -> None:
        """What so many drafting passes, each of so many rows, took together."""
        self._drafters += _DISAPPOINTMENT * (rows - self._drafters)
        key = (plan.modes, rows)
        factor = self._correction(key, seconds / max(count * self.drafting_pass(plan, rows), 1e-9))
        _correct(self._steps(plan), rows, factor)

    @property
    def wants_plain(self) -> bool:
        """Whether a pass of one row has not been seen for so long that nobody knows what plain decoding takes."""
        if self.company > 1:
            return False  # no pass would be of one row
        _, when = self._seen.get(1, (0, 0))
        return self._passes - when >= min(_FIRST_PLAIN << self._plain_passes, _PLAIN_EVERY)

    def _steps(self, plan: Plan) -> list[float]:
        """Factors of a plan's drafting passes, by rows."""
        return self._by_modes.setdefault(plan.modes, [1.0] * (_MOST_ROWS + 1))

    def _block(self, rows: int) -> float:
        known = self._profile.verification_sec(rows) * self._by_rows[min(rows, _MOST_ROWS)]
        return known * (self._level or 1.0)

    def _correction(self, key: object, ratio: float) -> float:
        """What a key's factor is multiplied by; the first observation of all only sets the level.

        Most of what makes a machine slower for a while makes all passes slower, so the level follows first. Were it the
        factors of what is run then, what is not run would look cheap, or what is not run any more would stay dear.
        """
        self._passes += 1
        seen, when = self._seen.get(key, (0, self._passes))
        seen = min(seen, 1) + 1 if self._passes - when > _STALE else seen + 1
        self._seen[key] = (seen, self._passes)
        if self._level is None:
            self._level = ratio
            return 1.0
        ratio = min(max(ratio, 1 / _MOST_RATIO), _MOST_RATIO)
        self._level *= ratio**_LEVEL_RATE
        return float(ratio ** max(_RATE, 0.5 / seen))


def _correct(factors: list[float], rows: int, factor: float) -> None:
    """Corrects what is thought of a pass. What is learned of one with several rows holds nearly as well for one of a
    few rows more. Else passes that were never run would keep what the profile says, and look dear beside those that
    turned out cheap.
    """
    if rows == 1:
        factors[1] *= factor
        return
    for other in range(2, len(factors)):
        factors[other] *= factor ** (_LIKENESS ** abs(other - rows))


def typical_profile(num_layers: int) -> CostProfile:
    """What passes cost relative to one plain token where nothing was measured: two cores, weights read from memory."""
    attention, mlp, head = 0.2 / num_layers, 0.6 / num_layers, 0.2
    return CostProfile(
        step_sec=1.0,
        attention_sec=attention,
        mlp_sec=mlp,
        verify_sec=(1.0, 1.05, 1.1, 1.15, 1.25, 1.4, 1.5, 1.65, 1.9, 2.1, 2.3, 2.5, 2.7),
        low_attention_sec=0.5 * attention,
        low_mlp_sec=0.5 * mlp,
        low_head_sec=0.5 * head,
    )


class Chance:
    """How often something was accepted: a prior that stands for a few observations, and observations; both fade."""

    def __init__(self, prior: float, strength: float = 6.0) -> None:
        self._prior, self._strength = prior, strength
        self._hits = self._trials = 0.0

    @property
    def mean(self) -> float:
        return (self._hits + self._prior * self._strength) / (self._trials + self._strength)

    def saw(self, accepted: bool) -> None:
        self._hits = self._hits * _MEMORY + accepted
        self._trials = self._trials * _MEMORY + 1.0
        self._strength *= _PRIOR_MEMORY


@dataclass
class Trying:
    """When a source that is not worth it was tried last, and how long to wait until the next time.

    Attributes:
        price: seconds per token, over plain decoding's, that the source was foretold when it was tried last.
    """

    waited: int = 0
    patience: int = _PATIENCE
    price: float = 0.0

    def is_due(self, price: float = 0.0) -> bool:
        self.waited += 1
        if self.waited < self.patience:
            return False
        self.waited, self.patience, self.price = 0, min(2 * self.patience, _MOST_PATIENCE), price
        return True

    def saw(self, price: float) -> None:
        """A price much below the one at the last try is worth another try soon."""
        if price < _NEARER * self.price:
            self.waited, self.patience, self.price = 0, _PATIENCE, price


@dataclass
class Experience:
    """The acceptance of a label's drafts so far. Shared by all its requests.

    Args:
        prior: acceptance of a self-draft's token before any was seen.
    """

    prior: float
    own: Chance = field(init=False)
    by_sure: list[Chance] = field(init=False)
    by_match: list[Chance] = field(init=False)
    self_trying: Trying = field(default_factory=Trying)
    lookup_trying: Trying = field(default_factory=Trying)

    def __post_init__(self) -> None:
        self.own = Chance(self.prior)
        middles = [(low + high) / 2 for low, high in zip((0.0, *_SURE_EDGES), (*_SURE_EDGES, 1.0), strict=True)]
        self.by_sure = [Chance(middle ** (2 * (1 - self.prior))) for middle in middles]  # a good draft is right unsure
        self.by_match = [Chance(prior) for prior in _MATCH_PRIORS]

    def sure(self, probability: float) -> Chance:
        return self.by_sure[sum(probability >= edge for edge in _SURE_EDGES)]

    def match(self, length: int) -> Chance:
        return self.by_match[sum(length >= edge for edge in _MATCH_EDGES)]


def new_experience(plan: Plan, agreement: float | None = None) -> Experience:
    """Before anything was seen; `agreement` is what calibration measured of the plan's drafts."""
    if agreement is None:
        agreement = _PRIOR_SKIP if plan.num_skipped else _PRIOR_LOW
    return Experience(agreement)


@dataclass(frozen=True, slots=True)
class Option:
    """A way to run a round.

    Args:
        length: tokens to draft.
        sec_per_token: expected seconds over expected tokens.
    """

    length: int
    sec_per_token: float


def best_option(costs: Costs, chance: float, longest: int, step: float) -> Option:
    """The best length of a draft whose tokens take `step` seconds and are accepted with this chance each."""
    best = Option(0, float("inf"))
    tokens = power = 1.0
    for length in range(1, longest + 1):
        power *= chance
        tokens += power
        sec_per_token = (length * step + costs.verification(length + 1)) / tokens
        if sec_per_token >= best.sec_per_token:
            break
        best = Option(length, sec_per_token)
    return best


def pays(costs: Costs, option: Option) -> bool:
    """Whether an option is foretold to be faster than plain decoding."""
    return option.sec_per_token < _GAIN * costs.verification(1)


@dataclass
class GoingOn:
    """Whether a self-draft goes on: told the top probability of each of its tokens, says if the next is worth its time.

    Args:
        costs: of the machine, now.
        experience: of the label.
        step: seconds that a token's drafting takes.
        sec_per_token: what the round is expected to come to.

    Attributes:
        survival: the chance that all tokens so far are accepted.
    """

    costs: Costs
    experience: Experience
    step: float
    sec_per_token: float
    survival: float = 1.0
    _length: int = 0

    def __post_init__(self) -> None:
        self._next_chance = self.experience.own.mean

    def __call__(self, sure: float) -> bool:
        self.survival *= self.experience.sure(sure).mean
        self._length += 1
        rows = self._length + 1
        extra = self.step + self.costs.verification(rows + 1) - self.costs.verification(rows)
        return self.survival * self._next_chance * self.sec_per_token > extra


class Controller:
    """A source of drafts that chooses among others.

    Args:
        plan: its policy bounds what may be done: the longest self-draft, and whether to look up.
        costs: of the machine, now.
        experience: of the label.
        self_draft: None where the plan cheapens nothing.
        lookup: None where the policy has none.
    """

    def __init__(
        self,
        plan: Plan,
        costs: Costs,
        experience: Experience,
        self_draft: SelfDraft | None,
        lookup: LookupDraft | None,
    ) -> None:
        self._plan = plan
        self._costs = costs
        self._experience = experience
        self._self_draft = self_draft
        self._lookup = lookup

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        """The best source's draft; an empty one where plain decoding is best, or has to be timed again."""
        if self._costs.wants_plain:
            return Draft()
        plain = self._costs.verification(1)
        looked = self._look_up_option(context, limit)
        drafted = self._self_option(limit)
        if looked is not None and looked.sec_per_token < min(
            _GAIN * plain, drafted.sec_per_token if drafted else plain
        ):
            assert self._lookup is not None
            return self._lookup.propose(context, looked.length)
        if drafted is not None:
            self._experience.self_trying.saw(drafted.sec_per_token / plain)
        if drafted is not None and pays(self._costs, drafted):
            return self._draft(context, limit, drafted.sec_per_token)
        if looked is not None and self._experience.lookup_trying.is_due():
            assert self._lookup is not None
            return self._lookup.propose(context, min(2, limit))
        if drafted is not None and self._experience.self_trying.is_due(drafted.sec_per_token / plain):
            return self._draft(context, 1, plain)
        return Draft()

    def learn(self, outcome: Outcome) -> None:
        """Corrects costs and acceptance."""
        draft, experience = outcome.draft, self._experience
        own = len(draft.sure)
        if not self._costs.by_pass:
            self._costs.saw_verification(len(draft.tokens) + 1, outcome.verify_sec)
            if own:
                self._costs.saw_steps(self._plan, own, outcome.draft_sec)
        for index in range(min(outcome.accepted + 1, len(draft.tokens))):
            kept = index < outcome.accepted
            if index < own:
                experience.own.saw(kept)
                experience.sure(draft.sure[index]).saw(kept)
            else:
                experience.match(draft.match).saw(kept)

    def _draft(self, context: Sequence[int], limit: int, sec_per_token: float) -> Draft:
        assert self._self_draft is not None
        going_on = GoingOn(self._costs, self._experience, self._costs.step(self._plan), sec_per_token)
        draft = self._self_draft.propose(context, limit, going_on)
        return self._extend(draft, context, limit, going_on.survival, sec_per_token)

    def _extend(self, draft: Draft, context: Sequence[int], limit: int, survival: float, sec_per_token: float) -> Draft:
        """What look-up finds after a self-draft, as far as verifying it too is worth the time."""
        match = self._lookup.match(context, draft.tokens) if self._lookup is not None else None
        if match is None or self._lookup is None:
            return draft
        own, chance, length = len(draft.tokens), self._experience.match(match.length).mean, 0
        while own + length < limit and length < _LONGEST_LOOKUP:
            survival *= chance
            rows = own + length + 1
            if survival * sec_per_token <= self._costs.verification(rows + 1) - self._costs.verification(rows):
                break
            length += 1
        more = self._lookup.propose(context, length, draft.tokens).tokens
        return replace(draft, tokens=draft.tokens + more, looked_up=len(more), match=match.length)

    def _self_option(self, limit: int) -> Option | None:
        if self._self_draft is None or limit < 1:
            return None
        longest = min(limit, self._plan.policy.max_draft)
        return best_option(self._costs, self._experience.own.mean, longest, self._costs.step(self._plan))

    def _look_up_option(self, context: Sequence[int], limit: int) -> Option | None:
        if self._lookup is None or limit < 1:
            return None
        match = self._lookup.match(context)
        if match is None:
            return None
        chance = self._experience.match(match.length).mean
        return best_option(self._costs, chance, min(limit, _LONGEST_LOOKUP), 0.0)


class FixedPolicy:
    """Drafts as a plan's policy says, without regard to what it costs: look-up where its match is long, else a
    self-draft.
    """

    _LONG_MATCH = 4

    def __init__(self, plan: Plan, self_draft: SelfDraft | None, lookup: LookupDraft | None) -> None:
        self._plan = plan
        self._self_draft = self_draft
        self._lookup = lookup

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        if self._lookup is not None:
            match = self._lookup.match(context)
            shortest = self._LONG_MATCH if self._self_draft is not None else 1
            if match is not None and match.length >= shortest:
                return self._lookup.propose(context, min(limit, self._plan.policy.max_draft))
        return self._self_draft.propose(context, limit) if self._self_draft is not None else Draft()

    def learn(self, outcome: Outcome) -> None:
        """A fixed policy learns nothing."""
