"""Requests with different plans share draft passes where that is predicted to be faster."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from knn_ssd.plan import Mode, Plan
from knn_ssd.speculation.cost_model import CostModel, typical_profile
from knn_ssd.vllm_plugin.draft_groups import DraftGroup, common_plan, group_drafts

LAYERS = 6
KEEPING = Plan.skipping(LAYERS)
modes = st.lists(st.sampled_from(list(Mode)), min_size=LAYERS, max_size=LAYERS).map(tuple)
plans = st.builds(Plan, modes, modes, st.sampled_from([Mode.KEEP, Mode.LOW]))


def cost_model() -> CostModel:
    return CostModel(typical_profile(LAYERS))


@given(plans, plans)
def test_what_two_plans_have_in_common_is_no_cheaper_than_either(first: Plan, second: Plan) -> None:
    both = common_plan(first, second)
    order = [Mode.KEEP, Mode.LOW, Mode.SKIP]
    pairs = zip((*both.modes, both.head), (*first.modes, first.head), (*second.modes, second.head), strict=True)
    assert all(order.index(mine) <= min(order.index(a), order.index(b)) for mine, a, b in pairs)
    assert common_plan(first, first).modes == first.modes
    assert both.modes == common_plan(second, first).modes


@given(st.lists(st.tuples(plans, st.integers(0, 5)), max_size=8))
def test_every_request_that_may_draft_is_in_one_group(wanted: list[tuple[Plan, int]]) -> None:
    groups = group_drafts([(row, plan, length) for row, (plan, length) in enumerate(wanted)], cost_model())
    rows = sorted(row for each in groups for row in each.rows)
    assert rows == [row for row, (_, length) in enumerate(wanted) if length]
    for each in groups:
        assert each.length == max(wanted[row][1] for row in each.rows)
        for row in each.rows:
            assert common_plan(each.plan, wanted[row][0]).modes == each.plan.modes


@given(st.lists(st.tuples(plans, st.integers(1, 5)), min_size=1, max_size=6))
def test_merging_never_costs_more_than_not_merging(wanted: list[tuple[Plan, int]]) -> None:
    alone: dict[object, DraftGroup] = {}
    for row, (plan, length) in enumerate(wanted):
        key = (plan.modes, plan.head)
        known = alone.get(key, DraftGroup(plan, (), 0))
        alone[key] = DraftGroup(plan, (*known.rows, row), max(known.length, length))
    merged = group_drafts([(row, plan, length) for row, (plan, length) in enumerate(wanted)], cost_model())
    seconds = [sum(each.seconds(cost_model()) for each in groups) for groups in (alone.values(), merged)]
    assert seconds[1] <= seconds[0] + 1e-9


def test_plans_that_save_little_are_merged_and_cheap_ones_kept_apart() -> None:
    little = [Plan.skipping(LAYERS, [layer]) for layer in range(3)]
    assert len(group_drafts([(row, plan, 4) for row, plan in enumerate(little)], cost_model())) == 1
    cheap = Plan.skipping(LAYERS, range(5), range(6))
    groups = group_drafts([(0, cheap, 4), (1, KEEPING, 1)], cost_model())
    assert sorted(each.plan.num_skipped for each in groups) == [0, 11]


def test_modes_meet_in_the_middle() -> None:
    order = [Mode.KEEP, Mode.LOW, Mode.SKIP]
    for first, second in product(order, order):
        plans = [Plan((mode,), (Mode.KEEP,)) for mode in (first, second)]
        assert common_plan(*plans).attention == (min(first, second, key=order.index),)
