"""Judges the plans that a search found on prompts that it has not seen, against the plan that is used without an atlas.

The best of many scores on few prompts is partly luck. So the best plans of a search decode other prompts, in turn with
the general plan and with plain decoding, and a plan is chosen only if it is faster by more than chance explains.
Prompts differ from each other more than the repeats of one prompt do: each prompt counts once, whatever its repeats.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student_t

from knn_ssd.backends.base import Backend
from knn_ssd.calibrate.continuations import Observation
from knn_ssd.calibrate.objective import TimedDecoding
from knn_ssd.plan import Plan
from knn_ssd.speculation.cost_model import CostProfile

GENERAL, PLAIN, SEARCH = "general plan", "plain decoding", "search"  # where a plan comes from, as evidence has it
MIN_PROMPTS = 4  # with fewer, nothing is judged
MIN_SPEEDUP = 1.02  # a plan that is less than this much faster is not chosen
# One-sided significance level of Student's t over prompts, for each plan. Two plans of the search are judged, so one
# of no effect is chosen in at most 2 of 100 cases; a plan 1.15 times as fast is found in about 3 of 4, with 8 prompts.
_SIGNIFICANCE = 0.01
_GIVE_UP = 0.05  # probability that a plan is given up that would have been chosen at the end
_MAX_GAIN = 0.25  # bound on the gain or loss of one prompt, so that other load on the machine counts for no more


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two plans on the same prompts, with one number for each prompt.

    Args:
        baseline_sec: seconds per token of the plan to compare with, by prompt.
        plan_sec: those of the plan; shorter if the plan was given up before the last prompt.
    """

    baseline_sec: Sequence[float]
    plan_sec: Sequence[float]

    @property
    def gains(self) -> list[float]:
        """By prompt, the logarithm of the plan's speed over the baseline's, within `_MAX_GAIN`."""
        pairs = zip(self.baseline_sec, self.plan_sec, strict=False)
        return [max(-_MAX_GAIN, min(_MAX_GAIN, math.log(baseline / plan))) for baseline, plan in pairs]

    @property
    def speedup(self) -> float:
        """Tokens per second over those of the baseline, every prompt with as many tokens; 1 without prompts."""
        return sum(self.baseline_sec[: len(self.plan_sec)]) / sum(self.plan_sec) if self.plan_sec else 1.0

    @property
    def is_faster(self) -> bool:
        """Whether the plan is faster by more than chance explains, and by enough to choose it."""
        gains = self.gains
        if len(gains) < MIN_PROMPTS or self.speedup < MIN_SPEEDUP:
            return False
        return statistics.mean(gains) > _smallest_significant(statistics.stdev(gains), len(gains))

    def is_hopeless(self, num_prompts: int) -> bool:
        """Whether the plan can hardly be chosen any more: what the remaining prompts would have to gain is unlikely."""
        gains = self.gains
        count, remaining = len(gains), num_prompts - len(gains)
        if count < MIN_PROMPTS or not remaining:
            return False
        mean, scatter = statistics.mean(gains), statistics.stdev(gains)
        wanted = max(_smallest_significant(scatter, num_prompts), math.log(MIN_SPEEDUP))
        wanted_of_remaining = (num_prompts * wanted - count * mean) / remaining
        error = scatter * math.sqrt(1 / count + 1 / remaining)
        return wanted_of_remaining > mean + _quantile(_GIVE_UP, count - 1) * error


def _smallest_significant(scatter: float, count: int) -> float:
    """The mean gain over `count` prompts from which on chance does not explain it."""
    return _quantile(_SIGNIFICANCE, count - 1) * scatter / math.sqrt(count)


@functools.cache
def _quantile(significance: float, degrees_of_freedom: int) -> float:
    """What Student's t exceeds with this probability."""
    return float(student_t.isf(significance, degrees_of_freedom))


def time_in_turn(
    seconds: Callable[[int, int], float], num_plans: int, num_prompts: int, repeats: int
) -> list[list[float]]:
    """Times plans prompt by prompt, in rotating order; those that cannot beat the first one are given up early.

    Args:
        seconds: measures the seconds per token of a plan on a prompt, given both by number.
        num_plans: number of plans; the first one is the baseline.
        num_prompts: number of prompts.
        repeats: how often each plan decodes each prompt.

    Returns:
        For each plan, the median of its repeats on each prompt that it decoded.
    """
    timed: list[list[float]] = [[] for _ in range(num_plans)]
    for prompt in range(num_prompts):
        wanted = [i for i in range(1, num_plans) if not Comparison(timed[0], timed[i]).is_hopeless(num_prompts)]
        if not wanted:
            break
        plans = [0, *wanted]
        taken: dict[int, list[float]] = {plan: [] for plan in plans}
        for turn in range(repeats):
            start = (prompt + turn) % len(plans)
            for plan in (*plans[start:], *plans[:start]):
                taken[plan].append(seconds(plan, prompt))
        for plan, own in taken.items():
            timed[plan].append(statistics.median(own))
    return timed


@dataclass(frozen=True, slots=True)
class Judgement:
    """What judging came to.

    Args:
        plans: the general plan, plain decoding, and the plans of the search.
        timed: seconds per token of each plan, by prompt.
        repeats: how often each plan decoded each prompt.
    """

    plans: Sequence[Plan]
    timed: Sequence[Sequence[float]]
    repeats: int

    @property
    def baseline(self) -> int:
        """The plan that those of the search have to beat: 1, plain decoding, if that beats the general plan; else 0."""
        return int(self._compared(0, 1).is_faster)

    @property
    def chosen(self) -> int:
        """The fastest of the search's plans that beat the baseline; the baseline if none does."""
        better = [i for i in range(2, len(self.plans)) if self._compared(self.baseline, i).is_faster]
        return max(better, key=lambda i: self._compared(self.baseline, i).speedup, default=self.baseline)

    @property
    def plan(self) -> Plan:
        """The chosen plan."""
        return self.plans[self.chosen]

    def to_json(self) -> dict[str, Any]:
        """What was compared with what, on how many prompts, for the atlas's evidence."""
        rows = [(0, 1), *((self.baseline, i) for i in range(2, len(self.plans)))]
        return {
            "chosen": _source(self.chosen),
            "speedup_over_general": self._speedup_over(0),
            "speedup_over_plain": self._speedup_over(1),
            "held_out_prompts": max(map(len, self.timed)),
            "decodings_per_prompt": self.repeats,
            "comparisons": [self._row(baseline, plan) for baseline, plan in rows],
        }

    def _speedup_over(self, plan: int) -> float | None:
        """The chosen plan's tokens per second over those of a plan; None where nothing was judged."""
        other, chosen = self.timed[plan], self.timed[self.chosen][: len(self.timed[plan])]
        return Comparison(other, chosen).speedup if other else None

    def _row(self, baseline: int, plan: int) -> dict[str, Any]:
        compared = self._compared(baseline, plan)
        return {
            "plan": self.plans[plan].to_json(),
            "plan_from": _source(plan),
            "compared_with": _source(baseline),
            "prompts": len(compared.gains),
            "speedup": compared.speedup if compared.gains else None,
            "faster_beyond_chance": compared.is_faster,
        }

    def _compared(self, baseline: int, plan: int) -> Comparison:
        return Comparison(self.timed[baseline], self.timed[plan])


def _source(plan: int) -> str:
    return (GENERAL, PLAIN)[plan] if plan < 2 else SEARCH


def judge(
    backend: Backend,
    plans: Sequence[Plan],
    agreements: Sequence[float | None],
    observations: Sequence[Observation],
    new_tokens: int,
    decodings: int,
    eos_token_ids: frozenset[int],
    cost: CostProfile,
) -> Judgement:
    """Decodes prompts under the general plan, plainly, and under the plans of a search, for real.

    Args:
        backend: executes the target model.
        plans: the general plan, then those of the search.
        agreements: the agreement of each plan's drafts in the search; None where it is unknown.
        observations: the prompts, none of which the search has seen.
        new_tokens: the longest output.
        decodings: how often each plan decodes, all prompts together; each prompt at least once.
        eos_token_ids: the tokens that end an output.
        cost: the cost profile.
    """
    plain = Plan.plain(backend.num_layers)
    every = [plans[0], plain, *plans[1:]]
    if len(observations) < MIN_PROMPTS:
        return Judgement(every, [[] for _ in every], 0)
    ways = [
        TimedDecoding(backend, plan, eos_token_ids, cost, agreement)
        for plan, agreement in zip(every, (agreements[0], None, *agreements[1:]), strict=True)
    ]

    def seconds(plan: int, prompt: int) -> float:
        ids = observations[prompt].prompt_ids
        tokens, taken = ways[plan].decode(ids, min(new_tokens, backend.context_length - len(ids)))
        return taken / tokens

    for plan in range(len(every)):  # the warm-up
        seconds(plan, 0)
    repeats = max(1, decodings // len(observations))
    return Judgement(every, time_in_turn(seconds, len(every), len(observations), repeats), repeats)
