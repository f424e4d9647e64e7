"""The objective of the search: the speed-up of a plan over plain decoding, predicted, or its timed speed.

Predicted: teacher-forced scoring. One forward pass under the plan, over the target's own continuation, gives for many
positions at once whether the draft agrees and its confidence. From that trace and the cost profile, the rounds under
any draft policy are simulated without the model.
Timed: tokens per second of real rounds on real prompts, as in arXiv 2309.08168 and 2505.16162.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from knn_ssd.backends.base import Backend, Session
from knn_ssd.calibrate.continuations import Observation
from knn_ssd.plan import Plan, Policy
from knn_ssd.request import Request, end_at
from knn_ssd.sampling import Sampler, SamplingParams, most_likely
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.speculation.drafter_factory import DrafterFactory
from knn_ssd.speculation.self_draft import top_probability

RUN_LENGTH = 8  # tokens that a draft is scored on before its KV cache is that of the target again
POLICIES = tuple(Policy(k, p) for k, p in product((1, 2, 3, 4, 6, 8, 12), (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)))
_GIVE_UP_MARGIN = 0.1  # a plan this far below the best one so far is not scored on further continuations


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


class TimedDecoding:
    """Decodes prompts for real under one plan, as an engine of its own would: no other plan's drafts teach it.

    Args:
        backend: executes the target model.
        plan: how to draft.
        eos_token_ids: the tokens that end an output.
        cost: the cost profile; None is a typical one.
        agreement: the agreement of the plan's drafts in the search; None where it is unknown.
        adaptive: whether the controller decides, as in an engine by default; otherwise the plan's policy is followed.
    """

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        eos_token_ids: frozenset[int],
        cost: CostProfile | None = None,
        agreement: float | None = None,
        *,
        adaptive: bool = True,
    ) -> None:
        self._backend = backend
        self._plan = plan
        self._ends = end_at(eos_token_ids)
        self._drafters = DrafterFactory(backend, cost)
        self._agreement = agreement
        self._adaptive = adaptive

    def decode(self, prompt_ids: Sequence[int], new_tokens: int) -> tuple[int, float]:
        """Decodes up to `new_tokens` tokens; gives how many came, and the seconds that they took without prefill."""
        self._backend.prepare(self._plan)
        sampler = Sampler.from_params(SamplingParams(), self._backend.device)
        with Request(self._backend, prompt_ids, new_tokens, sampler, self._ends) as request:
            request.drafter = self._drafters.new_drafter(
                request.session, self._plan, sampler, agreement=self._agreement, adaptive=self._adaptive
            )
            started = time.perf_counter()
            tokens = sum(len(current.tokens) for current in request.rounds())
            return tokens, time.perf_counter() - started


def timed_tokens_per_sec(decoding: TimedDecoding, observations: Sequence[Observation]) -> float:
    """The published objective: total tokens over total time, on continuations of two tokens or more."""
    results = [decoding.decode(o.prompt_ids, len(o.token_ids)) for o in observations if len(o.token_ids) > 1]
    return sum(tokens for tokens, _ in results) / sum(seconds for _, seconds in results)
