"""What a plan is worth: the speed-up over plain decoding that it would bring, foretold or timed.

Foretold: one pass over the target's own continuation tells for many positions at once whether the draft agrees and
how sure it is of itself. From that record and the cost profile the rounds of any policy can be played through without
the model.
Timed: real rounds on real prompts, as in arXiv 2309.08168 and 2505.16162, against plain decoding between them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from scipy.stats import t as student_t

from knn_ssd.backends.base import Backend, Session
from knn_ssd.calibrate.continuations import Observation
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.request import Request, end_at
from knn_ssd.sampling import Sampler, SamplingParams, most_likely
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.speculation.drafter_factory import DrafterFactory
from knn_ssd.speculation.self_draft import top_probability

RUN_LENGTH = 8  # drafts are rehearsed in runs of this many tokens
POLICIES = tuple(Policy(k, p) for k, p in product((1, 2, 3, 4, 6, 8, 12), (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)))
_HOPELESS = 0.1  # a plan this far under the best one so far is not looked at further
_FEWEST_PAIRS, _MOST_PAIRS = 6, 48  # of decodings, until the clock says that a plan is faster or gives it up
# Of Student's t, at each look. Over all looks a plan no faster gets there in about 4 of 1000 cases, by chance, and one
# that is 1.16 times as fast in 95 of 100 even where pairs scatter by 0.2 (simulated).
_CHANCE = 0.0003
_MOST_GAIN = 0.25  # of one pair, either way: what else the machine had to do shall not weigh more
WORTH_HAVING = 1.02  # a plan must be this much faster than plain decoding by the clock
_MISSED = 0.01  # the chance that a plan worth that is given up for gaining too little
_BEATEN = 5  # a plan that lost so many pairs more than it won is given up


@dataclass(frozen=True, slots=True)
class DraftTrace:
    """How a draft fared along one continuation of n + 1 tokens.

    Args:
        agrees: n of them, whether the draft's most likely token is the target's next.
        sure: n of them, the draft's own top probability.
    """

    agrees: tuple[bool, ...]
    confidences: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """A plan's worth.

    Args:
        plan: with the policy that suits it best.
        speedup: expected tokens per second over plain decoding's.
        agreement: share of the positions at which the draft agrees.
        positions: how many were looked at.
    """

    plan: Plan
    speedup: float
    agreement: float
    positions: int


class TeacherForcedScorer:
    """The continuations of one domain, kept in sessions so that any number of plans can be rehearsed on them.

    Args:
        target: the model.
        observations: with continuations; those of fewer than two tokens tell nothing and are passed over.
        cost: of the machine.
    """

    def __init__(self, backend: Backend, observations: Sequence[Observation], cost: CostProfile) -> None:
        self._backend = backend
        self._cost = cost
        self._observations = [o for o in observations if len(o.token_ids) > 1]
        self._sessions: list[Session] = []

    def __enter__(self) -> TeacherForcedScorer:
        for observation in self._observations:
            session = self._backend.open(len(observation.prompt_ids) + len(observation.token_ids))
            self._sessions.append(session)
            session.prefill(list(observation.prompt_ids))
            session.forward(list(observation.token_ids[:-1]))
        return self

    def __exit__(self, *_: object) -> None:
        for session in self._sessions:
            session.close()
        self._sessions = []

    def score(self, plan: Plan, best: float = 0.0, policies: Sequence[Policy] = POLICIES) -> Score:
        """The expected speed-up of a plan under its best policy.

        Args:
            plan: its modes; its own policy does not matter.
            best: the best speed-up known; a plan that stays clearly under it is judged on fewer continuations.
            policies: to choose from.
        """
        records: list[DraftTrace] = []
        result: Score | None = None
        for observation, session in zip(self._observations, self._sessions, strict=True):
            records.append(self._trace_draft(plan, observation, session))
            policy, speedup = max(
                ((policy, predicted_speedup(records, plan, policy, self._cost)) for policy in policies),
                key=lambda pair: pair[1],
            )
            agrees = [agree for record in records for agree in record.agrees]
            result = Score(plan.with_policy(policy), speedup, sum(agrees) / len(agrees), len(agrees))
            if speedup < best - _HOPELESS:
                break
        return result or Score(Plan.plain(plan.num_layers), 1.0, 0.0, 0)

    def _trace_draft(self, plan: Plan, observation: Observation, session: Session) -> DraftTrace:
        tokens = observation.token_ids
        logits = session.teacher_forced_logits(list(tokens[:-1]), plan, RUN_LENGTH)  # (n, V)
        agrees = [best == after for best, after in zip(most_likely(logits), tokens[1:], strict=True)]
        return DraftTrace(tuple(agrees), tuple(top_probability(logits).tolist()))


def predicted_speedup(records: Sequence[DraftTrace], plan: Plan, policy: Policy, cost: CostProfile) -> float:
    """Plays the rounds of a policy through the records; tokens per second over plain decoding's."""
    step_sec = cost.draft_step_sec(plan)
    tokens, seconds = 0, 0.0
    for record in records:
        at = 0
        while at < len(record.agrees):
            drafted, accepted = _play_round(record, at, policy)
            seconds += drafted * step_sec + cost.verification_sec(drafted + 1)
            tokens += accepted + 1
            at += accepted + 1
    return tokens / seconds * cost.verification_sec(1)


def _play_round(record: DraftTrace, start: int, policy: Policy) -> tuple[int, int]:
    """Tokens drafted and accepted in a round that begins at `start`."""
    drafted = accepted = 0
    agreeing = True
    for agrees, confidences in zip(record.agrees[start:], record.confidences[start:], strict=True):
        if drafted == policy.max_draft:
            break
        drafted += 1
        agreeing = agreeing and agrees
        accepted += agreeing
        if confidences < policy.threshold:
            break
    return drafted, accepted


@dataclass(slots=True)
class Timing:
    """A plan against plain decoding by the clock, in pairs of decodings of the same prompt.

    Args:
        gains: of each pair, the logarithm of the plan's speed over plain decoding's, within `_MOST_GAIN`.
        fastest: by prompt, the fastest seconds of plain decoding and of the plan.
    """

    gains: list[float] = field(default_factory=list)
    fastest: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, prompt: int, plain_sec: float, plan_sec: float) -> None:
        """One more pair."""
        known_plain, known_plan = self.fastest.get(prompt, (plain_sec, plan_sec))
        self.fastest[prompt] = (min(known_plain, plain_sec), min(known_plan, plan_sec))
        self.gains.append(max(-_MOST_GAIN, min(_MOST_GAIN, math.log(plain_sec / plan_sec))))

    @property
    def speedup(self) -> float:
        """Tokens per second over plain decoding's: total tokens over total time."""
        plain, plan = (sum(times) for times in zip(*self.fastest.values(), strict=True)) if self.fastest else (1.0, 1.0)
        return plain / plan

    @property
    def proven(self) -> bool:
        """Whether it is faster by more than chance explains."""
        return len(self.gains) >= _FEWEST_PAIRS and statistics.mean(self.gains) > self._doubt(_CHANCE)

    @property
    def beaten(self) -> bool:
        """Whether it lost so often, or gains so little, that more pairs would be a waste."""
        count, won = len(self.gains), sum(gain > 0 for gain in self.gains)
        if count >= _FEWEST_PAIRS and statistics.mean(self.gains) + self._doubt(_MISSED) < math.log(WORTH_HAVING):
            return True
        return count - 2 * won >= _BEATEN

    def _doubt(self, chance: float) -> float:
        """How far the mean gain is off with this probability, on one side."""
        count = len(self.gains)
        return float(student_t.isf(chance, count - 1)) * statistics.stdev(self.gains) / math.sqrt(count)


class Clock:
    """Decodes for real: the same prompts under each plan, prompt by prompt in turn, prefill apart.

    Args:
        target: the model.
        observations: whose prompts are decoded, as many new tokens as each one's continuation has.
        eos_token_ids: end an output.
        cost: what passes cost; None is what is typical.
    """

    def __init__(
        self,
        backend: Backend,
        observations: Sequence[Observation],
        eos_token_ids: frozenset[int],
        cost: CostProfile | None = None,
    ) -> None:
        self._backend = backend
        self._observations = [o for o in observations if len(o.token_ids) > 1]
        self._ends = end_at(eos_token_ids)
        self._drafters = DrafterFactory(backend, cost)
        self._agreement: dict[tuple[Mode, ...], float | None] = {}

    def compare(self, plans: Sequence[Plan], agreements: Sequence[float | None] = ()) -> list[Timing]:
        """Times each plan against plain decoding, pair by pair, until it is proven or beaten, or behind a proven one.

        One decoding tells little on a machine that has other things to do. So both decode the same prompt shortly
        after each other, time and again, and of each prompt the fastest times count.
        """
        self._agreement = {plan.modes: agreement for plan, agreement in zip(plans, agreements, strict=False)}
        plain = Plan.plain(self._backend.num_layers)
        timings = [Timing() for _ in plans]
        if self._observations:  # the warm-up
            self.seconds(self._observations[0], plain)
        for turn in range(_MOST_PAIRS if self._observations else 0):
            best = max((timing.speedup for timing in timings if timing.proven), default=0.0)
            undecided = [i for i, t in enumerate(timings) if not (t.proven or t.beaten) and t.speedup > best]
            if not undecided:
                break
            place = turn % len(self._observations)
            observation = self._observations[place]
            candidates = [plain, *(plans[i] for i in undecided)]
            seconds = [0.0] * len(candidates)
            for step in range(len(candidates)):
                index = (step + turn) % len(candidates)
                seconds[index] = self.seconds(observation, candidates[index])
            for i, taken in zip(undecided, seconds[1:], strict=True):
                timings[i].add(place, seconds[0], taken)
        return timings

    def tokens_per_sec(self, plan: Plan) -> float:
        """The published objective: total tokens over total time under the plan's own policy, without a baseline."""
        tokens = sum(len(o.token_ids) for o in self._observations)
        return tokens / sum(self.seconds(o, plan, adaptive=False) for o in self._observations)

    def seconds(self, observation: Observation, plan: Plan, adaptive: bool = True) -> float:
        """Time to decode one continuation after its prompt."""
        self._backend.prepare(plan)
        sampler = Sampler.from_params(SamplingParams(), self._backend.device)
        with Request(self._backend, observation.prompt_ids, len(observation.token_ids), sampler, self._ends) as request:
            agreement = self._agreement.get(plan.modes)
            request.drafter = self._drafters.new_drafter(
                request.session, plan, sampler, agreement=agreement, adaptive=adaptive
            )
            started = time.perf_counter()
            for _round in request.rounds():
                pass
            return time.perf_counter() - started
