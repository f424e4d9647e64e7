"""The controller: it drafts where that is faster, stops where it is not, and retries at growing intervals."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_ssd.plan import Plan, Policy
from knn_ssd.speculation.acceptance import AcceptanceRate, initial_acceptance
from knn_ssd.speculation.controller import Controller, FixedPolicy, SelfDraftChoice
from knn_ssd.speculation.cost_model import CostModel, CostProfile, PlainTiming, typical_profile
from knn_ssd.speculation.drafter import Draft, Outcome
from knn_ssd.speculation.lookup import Match

CHEAP = CostProfile(1.0, 0.0, 0.0, tuple(1.0 + 0.05 * i for i in range(13)), 0.35 / 4, 0.35 / 4)
DEAR = CostProfile(1.0, 0.0, 0.0, tuple(1.0 + 0.05 * i for i in range(13)))
PLAN = Plan.low(4, Policy(max_draft=8, threshold=0.0, lookup=True))


class Drafts:
    """A stand-in for a self-draft, with given confidences."""

    def __init__(self, chance: float, confidences: Callable[[], float] = lambda: 0.9) -> None:
        self.chance, self._confidences = chance, confidences
        self.asked = 0

    def is_ready(self) -> bool:
        return True

    def propose(
        self,
        context: Sequence[int],
        limit: int,
        go_on: Callable[[float], bool] | None = None,
        guess: Callable[[Sequence[int]], Sequence[int]] | None = None,
    ) -> Draft:
        self.asked += 1
        confidences: list[float] = []
        while len(confidences) < min(limit, PLAN.policy.max_draft):
            confidences.append(self._confidences())
            if go_on is not None and not go_on(confidences[-1]):
                break
        return Draft(
            (7,) * len(confidences), drafter="self", confidences=tuple(confidences), num_passes=len(confidences)
        )


class Lookups:
    """A stand-in for lookup: a match of some length, or none."""

    def __init__(self, length: int | None) -> None:
        self.length = length

    def match(self, context: Sequence[int], drafted: Sequence[int] = ()) -> Match | None:
        return None if self.length is None else Match(self.length, 0)

    def propose(self, context: Sequence[int], limit: int, drafted: Sequence[int] = ()) -> Draft:
        return Draft((9,) * limit, drafter="lookup", match_length=self.length or 0)


def play(
    controller: Controller, chance: dict[str, float], cost: CostProfile, rounds: int, step: float, speed: float = 1.0
) -> tuple[float, list[Draft]]:
    """Seconds per token of so many rounds on a machine of these costs, and the drafts."""
    chooser, seconds, tokens, drafts = random.Random(0), 0.0, 0, []
    for _ in range(rounds):
        draft = controller.propose([1, 2, 3], 50)
        accepted = 0
        for drafter in draft.drafters:
            if chooser.random() >= chance[drafter]:
                break
            accepted += 1
        verify_sec, draft_sec = (
            speed * cost.verification_sec(len(draft.tokens) + 1),
            speed * step * len(draft.confidences),
        )
        controller.learn(Outcome(draft, accepted, draft_sec, verify_sec))
        seconds += verify_sec + draft_sec
        tokens += accepted + 1
        drafts.append(draft)
    return seconds / tokens, drafts


def controller_of(drafts: Drafts | None, lookups: Lookups | None, cost: CostProfile, prior: float = 0.85) -> Controller:
    return Controller(PLAN, CostModel(cost), initial_acceptance(PLAN, prior), drafts, lookups)  # type: ignore[arg-type]


@pytest.mark.parametrize("chance", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize(("cost", "step"), [(CHEAP, 0.3), (DEAR, 1.0), (typical_profile(4), 0.35)])
@pytest.mark.parametrize("speed", [1.0, 0.002, 300.0])
def test_it_is_never_slower_and_fast_where_drafts_are_good(
    chance: float, cost: CostProfile, step: float, speed: float
) -> None:
    controller = controller_of(Drafts(chance), Lookups(2), cost)
    taken, _ = play(controller, {"self": chance, "lookup": 0.05}, cost, 1500, step, speed)
    assert taken / speed < 1 / 0.98
    if chance >= 0.9 and step < 0.5:
        assert taken / speed < 0.66  # the best fixed length gets 0.59 to 0.65 at a chance of 0.9


def test_it_stops_drafting_where_drafts_are_bad_and_retries_at_growing_intervals() -> None:
    drafts = Drafts(0.05)
    play(controller_of(drafts, None, CHEAP), {"self": 0.05}, CHEAP, 4000, 0.3)
    assert 0 < drafts.asked < 50


def test_it_comes_back_when_drafts_become_good() -> None:
    drafts = Drafts(0.05)
    controller = controller_of(drafts, None, CHEAP)
    play(controller, {"self": 0.05}, CHEAP, 200, 0.3)
    taken, _ = play(controller, {"self": 0.98}, CHEAP, 2500, 0.3)
    assert taken < 0.75


def test_a_wrong_prior_and_a_wrong_profile_are_corrected() -> None:
    controller = controller_of(Drafts(0.2), None, CHEAP, prior=0.99)
    taken, drafts = play(controller, {"self": 0.2}, DEAR, 800, 1.0)  # a draft step takes as long as a plain one
    assert taken < 1 / 0.97
    assert sum(bool(draft.tokens) for draft in drafts[-200:]) < 10


def test_plain_decoding_is_timed_even_where_all_rounds_would_draft() -> None:
    """The profile has rows for less than they cost: after a block, a plain step looks dear until it is run."""
    for rows_cost in (0.1, 0.2):
        cost = CostProfile(1.0, 0.0, 0.0, tuple(1.0 + rows_cost * i for i in range(13)))
        taken, _ = play(controller_of(Drafts(0.9), None, CHEAP), {"self": 0.9}, cost, 1500, 1.0)
        assert taken < 1 / 0.98


@pytest.mark.parametrize("rounds", [3, 30, 300])
@pytest.mark.parametrize("what", ["all", "drafts", "blocks"])
def test_it_comes_back_after_the_machine_was_slow_for_a_while(rounds: int, what: str) -> None:
    """However long that took, and whatever was slow: after the next try, which is at most 128 rounds away."""
    controller = controller_of(Drafts(0.9), None, CHEAP)
    play(controller, {"self": 0.9}, CHEAP, 200, 0.4)
    slow = replace(CHEAP, verify_sec=tuple(sec * (1 if what == "drafts" else 3) for sec in CHEAP.verify_sec))
    if what == "blocks":
        slow = replace(slow, verify_sec=(1.0, *slow.verify_sec[1:]))
    play(controller, {"self": 0.9}, slow, rounds, 0.4 if what == "blocks" else 1.2)
    _, drafts = play(controller, {"self": 0.9}, CHEAP, 300, 0.4)
    assert sum(bool(draft.tokens) for draft in drafts[200:]) > 90


def test_the_better_drafter_is_chosen() -> None:
    for own, looked, expected in ((0.95, 0.1, "self"), (0.2, 0.97, "lookup")):
        controller = controller_of(Drafts(own), Lookups(5), CHEAP)
        _, drafts = play(controller, {"self": own, "lookup": looked}, CHEAP, 400, 0.3)
        sources = [draft.drafter for draft in drafts[-100:] if draft.tokens]
        assert sources.count(expected) > 90


def test_good_lookups_extend_a_self_draft() -> None:
    cost = CostProfile(1.0, 0.0, 0.0, CHEAP.verify_sec, 0.95 / 8, 0.95 / 8)
    controller = controller_of(Drafts(0.98), Lookups(2), cost)
    for _ in range(300):  # short matches turn out to be right three times in four: too seldom to go first
        controller.acceptance.at_match("lookup", 2).record(True)
        controller.acceptance.at_match("lookup", 2).record(True)
        controller.acceptance.at_match("lookup", 2).record(True)
        controller.acceptance.at_match("lookup", 2).record(False)
    _, drafts = play(controller, {"self": 0.98, "lookup": 0.75}, cost, 20, 0.05)
    assert any(draft.num_copied and draft.drafter == "self" for draft in drafts)


def test_a_draft_goes_on_while_its_confidence_is_high() -> None:
    lengths = {}
    for confidences in (0.995, 0.4):
        controller = controller_of(Drafts(0.9, lambda confidences=confidences: confidences), None, CHEAP)  # type: ignore[misc]
        lengths[confidences] = len(controller.propose([1], 50).tokens)
    assert lengths[0.995] == PLAN.policy.max_draft
    assert 1 <= lengths[0.4] < 4


@settings(max_examples=60)
@given(limit=st.integers(0, 6), match=st.none() | st.integers(1, 40), chance=st.floats(0, 1))
def test_no_more_is_drafted_than_asked_for(limit: int, match: int | None, chance: float) -> None:
    controller = controller_of(Drafts(chance), Lookups(match), CHEAP, prior=chance)
    for _ in range(40):
        assert len(controller.propose([1, 2], limit).tokens) <= limit


def test_an_acceptance_rate_starts_at_its_prior_and_forgets() -> None:
    chance = AcceptanceRate(0.8)
    assert chance.mean == pytest.approx(0.8)
    for _ in range(500):
        chance.record(False)
    assert chance.mean < 0.1
    for _ in range(500):
        chance.record(True)
    assert chance.mean > 0.9


def test_costs_follow_the_machine() -> None:
    cost_model = CostModel(CHEAP)
    for _ in range(200):
        cost_model.record_verification(1, 0.02)
        cost_model.record_verification(5, 0.05)
        cost_model.record_draft_steps(PLAN, 4, 0.04)
    assert cost_model.verification_sec(1) == pytest.approx(0.02, rel=0.05)
    assert cost_model.verification_sec(5) == pytest.approx(0.05, rel=0.05)
    assert cost_model.draft_step_sec(PLAN) == pytest.approx(0.01, rel=0.05)


def test_its_own_cost_is_small() -> None:
    """Under 0.5 % of a round of 15 ms, the fastest that a plain step of the embedded model was measured at."""
    controller = controller_of(Drafts(0.9), Lookups(5), CHEAP)
    durations = []
    for _ in range(300):
        started = time.perf_counter()
        controller.learn(Outcome(controller.propose([1, 2, 3], 50), 1, 0.01, 0.02))
        durations.append(time.perf_counter() - started)
    assert sorted(durations)[len(durations) // 4] < 0.005 * 0.015 * 4  # the slack is for busy machines


def test_a_fixed_policy_looks_up_where_the_match_is_long_and_drafts_else() -> None:
    drafts, lookups = Drafts(0.9), Lookups(3)
    fixed = FixedPolicy(PLAN, drafts, lookups)  # type: ignore[arg-type]
    assert fixed.propose([1], 20).drafter == "self"
    lookups.length = 4
    assert fixed.propose([1], 20) == Draft((9,) * PLAN.policy.max_draft, drafter="lookup", match_length=4)
    assert FixedPolicy(PLAN, None, lookups).propose([1], 3).tokens == (9, 9, 9)  # type: ignore[arg-type]
    lookups.length = None
    assert FixedPolicy(PLAN, None, lookups).propose([1], 3) == Draft()  # type: ignore[arg-type]


def test_what_is_learned_of_some_rows_holds_for_a_few_more() -> None:
    cost_model = CostModel(CostProfile(1.0, 0.02, 0.02, (1.0, *(2.0,) * 12)))
    for _ in range(60):
        cost_model.record_verification(1, 1.0)
        cost_model.record_verification(4, 1.2)
    assert cost_model.verification_sec(1) == pytest.approx(1.0, rel=0.02)
    assert cost_model.verification_sec(4) == pytest.approx(1.2, rel=0.02)
    assert cost_model.verification_sec(5) - cost_model.verification_sec(4) < 0.1, (
        "or drafts would stay at three tokens for ever"
    )


@pytest.mark.parametrize(("rate", "lengths"), [(0.9, {8}), (0.05, {0, 1})])
def test_a_self_draft_may_be_as_long_as_asked_for_or_a_retry_or_nothing(rate: float, lengths: set[int]) -> None:
    acceptance = initial_acceptance(PLAN, rate)
    allowed = [SelfDraftChoice(CostModel(CHEAP), acceptance, 8, 0.3).allowed_length() for _ in range(300)]
    assert set(allowed) == lengths
    assert rate > 0.5 or [step for step, length in enumerate(allowed) if length] == [15, 47, 111, 239]


def test_plain_steps_are_timed_first_and_then_at_an_interval() -> None:
    timing = PlainTiming(lambda timed: 0 if timed < 2 else 5)
    steps = []
    for _ in range(20):
        steps.append(timing.is_due)
        if steps[-1]:
            timing.record_plain()
        else:
            timing.count_step()
    assert [step for step, plain in enumerate(steps) if plain] == [0, 1, 7, 13, 19]
