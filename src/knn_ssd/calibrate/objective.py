"""The objective of the search: the speed-up of a plan over plain decoding, predicted or timed.

Predicted: teacher-forced scoring. One forward pass under the plan, over the target's own continuation, gives for many
positions at once whether the draft agrees and its confidence. From that trace and the cost profile, the rounds under
any draft policy are simulated without the model.
Timed: real rounds on real prompts, as in arXiv 2309.08168 and 2505.16162, in alternation with plain decoding.
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

RUN_LENGTH = 8  # tokens that a draft is scored on before its KV cache is that of the target again
POLICIES = tuple(Policy(k, p) for k, p in product((1, 2, 3, 4, 6, 8, 12), (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)))
_GIVE_UP_MARGIN = 0.1  # a plan this far below the best one so far is not scored on further continuations
_MIN_PAIRS, _MAX_PAIRS = 6, 48  # pairs of decodings until a plan is proven faster or given up
# One-sided significance level of Student's t after each pair. In simulation, over all pairs, a plan that is no faster
# is proven in about 4 of 1000 cases, and one that is 1.16 times as fast in 95 of 100, even where pairs scatter by 0.2.
_SIGNIFICANCE = 0.0003
_MAX_GAIN = 0.25  # bound on one pair's gain or loss, so that other load on the machine counts for no more than that
MIN_SPEEDUP = 1.02  # a plan is chosen only if it was timed to be this much faster than plain decoding
_FALSE_REJECTION = 0.01  # probability that a plan with that speed-up is given up
_MAX_LOSSES = 5  # a plan that lost so many more pairs than it won is given up


@dataclass(frozen=True, slots=True)
class DraftTrace:
    """What a draft would have proposed along one continuation of n + 1 tokens.

    Args:
        agrees: (n,) whether the draft's most likely token is the target's next token.
        confidences: (n,) the draft's own top-1 probability.
    """

    agrees: tuple[bool, ...]
    confidences: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """The score of a plan.

    Args:
        plan: the plan, with its best draft policy.
        speedup: predicted tokens per second over those of plain decoding.
        agreement: share of positions at which the draft agrees.
        positions: number of positions scored.
    """

    plan: Plan
    speedup: float
    agreement: float
    positions: int


class TeacherForcedScorer:
    """Scores plans on the continuations of one domain, which stay in the KV caches of open sessions.

    Args:
        backend: executes the target model.
        observations: prompts with continuations; those shorter than two tokens are left out.
        cost: the cost profile of this machine.
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
        """Predicts the speed-up of a plan under its best draft policy.

        Args:
            plan: the plan; its own policy is ignored.
            best: the best speed-up so far; a plan clearly below it is scored on fewer continuations.
            policies: the draft policies to choose from.
        """
        traces: list[DraftTrace] = []
        result: Score | None = None
        for observation, session in zip(self._observations, self._sessions, strict=True):
            traces.append(self._trace_draft(plan, observation, session))
            policy, speedup = max(
                ((policy, predicted_speedup(traces, plan, policy, self._cost)) for policy in policies),
                key=lambda pair: pair[1],
            )
            agrees = [agree for trace in traces for agree in trace.agrees]
            result = Score(plan.with_policy(policy), speedup, sum(agrees) / len(agrees), len(agrees))
            if speedup < best - _GIVE_UP_MARGIN:
                break
        return result or Score(Plan.plain(plan.num_layers), 1.0, 0.0, 0)

    def _trace_draft(self, plan: Plan, observation: Observation, session: Session) -> DraftTrace:
        tokens = observation.token_ids
        logits = session.teacher_forced_logits(list(tokens[:-1]), plan, RUN_LENGTH)  # (n, V)
        agrees = [best == after for best, after in zip(most_likely(logits), tokens[1:], strict=True)]
        return DraftTrace(tuple(agrees), tuple(top_probability(logits).tolist()))


def predicted_speedup(traces: Sequence[DraftTrace], plan: Plan, policy: Policy, cost: CostProfile) -> float:
    """Simulates the rounds of a policy along draft traces; predicts tokens per second over those of plain decoding."""
    step_sec = cost.draft_step_sec(plan)
    tokens, seconds = 0, 0.0
    for trace in traces:
        start = 0
        while start < len(trace.agrees):
            drafted, accepted = _simulate_round(trace, start, policy)
            seconds += drafted * step_sec + cost.verification_sec(drafted + 1)
            tokens += accepted + 1
            start += accepted + 1
    return tokens / seconds * cost.verification_sec(1)


def _simulate_round(trace: DraftTrace, start: int, policy: Policy) -> tuple[int, int]:
    """Numbers of tokens drafted and accepted in a round that begins at `start`."""
    drafted = accepted = 0
    agreeing = True
    for agrees, confidence in zip(trace.agrees[start:], trace.confidences[start:], strict=True):
        if drafted == policy.max_draft:
            break
        drafted += 1
        agreeing = agreeing and agrees
        accepted += agreeing
        if confidence < policy.threshold:
            break
    return drafted, accepted


@dataclass(slots=True)
class Timing:
    """Timings of a plan against plain decoding, in pairs of decodings of the same prompt.

    Args:
        gains: for each pair, the logarithm of the plan's speed over that of plain decoding, within `_MAX_GAIN`.
        fastest: by prompt, the fewest seconds that plain decoding and the plan took.
    """

    gains: list[float] = field(default_factory=list)
    fastest: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, prompt: int, plain_sec: float, plan_sec: float) -> None:
        """Adds a pair."""
        known_plain, known_plan = self.fastest.get(prompt, (plain_sec, plan_sec))
        self.fastest[prompt] = (min(known_plain, plain_sec), min(known_plan, plan_sec))
        self.gains.append(max(-_MAX_GAIN, min(_MAX_GAIN, math.log(plain_sec / plan_sec))))

    @property
    def speedup(self) -> float:
        """Tokens per second over those of plain decoding: total tokens over total time."""
        plain, plan = (sum(times) for times in zip(*self.fastest.values(), strict=True)) if self.fastest else (1.0, 1.0)
        return plain / plan

    @property
    def proven(self) -> bool:
        """Whether the plan is faster by more than chance explains."""
        return len(self.gains) >= _MIN_PAIRS and statistics.mean(self.gains) > self._margin_of_error(_SIGNIFICANCE)

    @property
    def beaten(self) -> bool:
        """Whether the plan lost so often, or gains so little, that it is given up."""
        count, won = len(self.gains), sum(gain > 0 for gain in self.gains)
        if count >= _MIN_PAIRS and statistics.mean(self.gains) + self._margin_of_error(_FALSE_REJECTION) < math.log(
            MIN_SPEEDUP
        ):
            return True
        return count - 2 * won >= _MAX_LOSSES

    def _margin_of_error(self, significance: float) -> float:
        """One-sided margin of error of the mean gain."""
        count = len(self.gains)
        return float(student_t.isf(significance, count - 1)) * statistics.stdev(self.gains) / math.sqrt(count)


class PairedTimer:
    """Times plans against plain decoding on the same prompts, prompt by prompt in turn. Prefill is not timed.

    Args:
        backend: executes the target model.
        observations: the prompts to decode; each output is as long as the prompt's continuation.
        eos_token_ids: the tokens that end an output.
        cost: the cost profile; None is a typical one.
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
        """Times each plan against plain decoding, pair by pair, until it is proven, beaten, or behind a proven one.

        A single decoding is no evidence on a machine with other load. So both decode the same prompt one shortly after
        the other, repeatedly, and for each prompt the fastest times count.

        Args:
            plans: the plans to time.
            agreements: the agreement of each plan's drafts in the search; None where it is unknown.
        """
        self._agreement = {plan.modes: agreement for plan, agreement in zip(plans, agreements, strict=False)}
        plain = Plan.plain(self._backend.num_layers)
        timings = [Timing() for _ in plans]
        if self._observations:  # the warm-up
            self.seconds(self._observations[0], plain)
        for turn in range(_MAX_PAIRS if self._observations else 0):
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
        """The published objective: total tokens over total time under the plan's own fixed policy, without baseline."""
        tokens = sum(len(o.token_ids) for o in self._observations)
        return tokens / sum(self.seconds(o, plan, adaptive=False) for o in self._observations)

    def seconds(self, observation: Observation, plan: Plan, adaptive: bool = True) -> float:
        """Seconds to decode one continuation after its prompt."""
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
