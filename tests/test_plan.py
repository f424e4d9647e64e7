"""A plan is a value: it holds one mode for every sublayer, and is the same after a trip through JSON."""

from __future__ import annotations

import json

import pytest
from helpers import plans, policies
from hypothesis import given
from hypothesis import strategies as st

from knn_ssd.errors import UsageError
from knn_ssd.plan import Mode, Plan, Policy


@st.composite
def any_plans(draw: st.DrawFn) -> Plan:
    """Plans of any size with every mode in them."""
    num_layers = draw(st.integers(1, 12))
    modes = st.lists(st.sampled_from(Mode), min_size=num_layers, max_size=num_layers).map(tuple)
    head = draw(st.sampled_from([Mode.KEEP, Mode.LOW]))
    policy = Policy(draw(st.integers(0, 40)), draw(st.floats(0, 1)), draw(st.booleans()))
    return Plan(draw(modes), draw(modes), head, policy)


@given(any_plans())
def test_a_plan_survives_a_trip_through_json(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(any_plans())
def test_modes_are_listed_layer_by_layer(plan: Plan) -> None:
    assert plan.modes[0::2] == plan.attention
    assert plan.modes[1::2] == plan.mlp
    assert plan.num_skipped == plan.modes.count(Mode.SKIP)
    assert plan.uses_low == (Mode.LOW in (*plan.modes, plan.head))


@given(st.sets(st.integers(0, 6)), st.sets(st.integers(0, 6)))
def test_skipping_skips_what_was_named_and_keeps_the_rest(attention: set[int], mlp: set[int]) -> None:
    plan = Plan.skipping(7, attention, mlp)
    assert set(plan.skipped_attention) == attention
    assert set(plan.skipped_mlp) == mlp
    assert plan.modes.count(Mode.KEEP) == 14 - len(attention) - len(mlp)


@given(plans(), policies())
def test_another_policy_leaves_the_modes_alone(plan: Plan, policy: Policy) -> None:
    changed = plan.with_policy(policy)
    assert changed.policy == policy
    assert changed.modes == plan.modes


@given(any_plans())
def test_a_description_is_one_line_that_names_what_is_skipped(plan: Plan) -> None:
    description = plan.describe()
    assert "\n" not in description
    assert plan.is_plain or ("skip attention" in description) == bool(plan.skipped_attention)
    assert plan.is_plain or ("lookup" in description) == plan.policy.lookup


FULL, LOW = Plan.skipping(28, policy=Policy(8, 0.6)), Plan.low(28, Policy(12, 0.4, lookup=True))


def changed(plan: Plan, attention: dict[int, Mode], mlp: dict[int, Mode], head: Mode | None = None) -> Plan:
    """A plan with other modes in some layers."""
    return Plan(
        tuple(attention.get(layer, mode) for layer, mode in enumerate(plan.attention)),
        tuple(mlp.get(layer, mode) for layer, mode in enumerate(plan.mlp)),
        plan.head if head is None else head,
        plan.policy,
    )


@pytest.mark.parametrize(
    ("plan", "description"),
    [
        (LOW, "4-bit"),
        (changed(LOW, {}, {13: Mode.SKIP, 27: Mode.SKIP}), "4-bit, but skip MLP 13 and 27"),
        (changed(LOW, {}, {}, Mode.KEEP), "4-bit, but LM head in full"),
        (changed(LOW, {9: Mode.KEEP}, {13: Mode.SKIP}), "4-bit, but skip MLP 13, with attention 9 in full"),
        (
            changed(LOW, {2: Mode.SKIP}, {13: Mode.KEEP}, Mode.KEEP),
            "4-bit, but skip attention 2, with MLP 13 and LM head in full",
        ),
        (FULL, "full model"),
        (changed(FULL, {}, {}, Mode.LOW), "full model, but LM head in 4 bits"),
        (changed(FULL, {4: Mode.LOW}, {}), "full model, but attention 4 in 4 bits"),
        (Plan.skipping(8, [5, 3], [7]), "skip attention 3, 5 and MLP 7"),
        (Plan.skipping(28, [*range(3, 10), 12]), "skip attention 3-9 and 12"),
        (Plan.skipping(28, [1, 2], [5, 6, 7, 20]), "skip attention 1, 2, MLP 5-7 and 20"),
        (Plan.skipping(4, range(4), range(4)), "skip attention 0-3 and MLP 0-3"),
        (
            changed(FULL, {3: Mode.SKIP, 4: Mode.LOW}, {}, Mode.LOW),
            "skip attention 3, with attention 4 and LM head in 4 bits",
        ),
    ],
)
def test_modes_are_described_by_their_exceptions(plan: Plan, description: str) -> None:
    assert plan.describe_modes() == description
    assert plan.describe() == f"{description}; {plan.describe_policy()}"


def test_a_description_reads_like_this() -> None:
    plan = Plan.skipping(8, attention=[5, 3], mlp=[7], policy=Policy(8, 0.6))
    assert plan.describe() == "skip attention 3, 5 and MLP 7; drafts up to 8 while confidence >= 0.6"
    assert Plan.low(8, Policy(12, 0.7, True)).describe() == "4-bit; drafts up to 12 while confidence >= 0.7; lookup"
    assert Plan.low(8, Policy(12, 0.0)).describe() == "4-bit; drafts up to 12"
    assert Plan.skipping(8, policy=Policy(4, 0.25)).describe() == "full model; drafts up to 4 while confidence >= 0.25"
    assert Plan.skipping(8, policy=Policy(4, 0.25, True)).describe() == "full model; drafts up to 4 by lookup"
    assert Plan.plain(8).describe() == "plain decoding"


@st.composite
def found_plans(draw: st.DrawFn) -> Plan:
    """Plans of 28 layers as a search finds them: the full model or 4-bit weights, with a few exceptions."""
    some = st.dictionaries(st.integers(0, 27), st.sampled_from(Mode), max_size=6)
    policy = Policy(draw(st.integers(1, 40)), draw(st.sampled_from([0.0, 0.2, 0.25, 0.4, 0.9])), draw(st.booleans()))
    base = draw(st.sampled_from([Plan.low(28, policy), Plan.skipping(28, policy=policy)]))
    return changed(base, draw(some), draw(some), draw(st.sampled_from([None, Mode.KEEP, Mode.LOW])))


@given(found_plans())
def test_a_description_is_read_at_a_glance(plan: Plan) -> None:
    assert len(plan.describe()) <= 200


@given(found_plans(), found_plans())
def test_different_modes_and_policies_have_different_descriptions(one: Plan, other: Plan) -> None:
    assert (one.describe_modes() == other.describe_modes()) == ((one.modes, one.head) == (other.modes, other.head))
    if one.cheapens and other.cheapens:
        assert (one.describe() == other.describe()) == (one == other)


def test_json_is_readable_by_a_person() -> None:
    assert Plan.skipping(3, attention=[1], mlp=[0, 2]).to_json() == {
        "num_layers": 3,
        "skip": {"attention": [1], "mlp": [0, 2]},
        "low": {"attention": [], "mlp": []},
        "head": "keep",
        "policy": {"max_draft": 12, "threshold": 0.8, "lookup": False},
    }


def test_the_default_policy_is_the_published_one() -> None:
    assert Policy() == Policy(max_draft=12, threshold=0.8, lookup=False)


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda: Policy(max_draft=-1), "max_draft must be 0 or more, got -1"),
        (lambda: Policy(threshold=1.01), r"threshold must be in \[0, 1\], got 1.01"),
        (lambda: Policy(threshold=float("nan")), "threshold must be in"),
        (lambda: Plan((), ()), "at least one, got 0 and 0"),
        (lambda: Plan((Mode.KEEP,), (Mode.KEEP, Mode.KEEP)), "got 1 and 2"),
        (lambda: Plan((Mode.KEEP,), (Mode.KEEP,), head=Mode.SKIP), "head cannot be skipped"),
        (lambda: Plan.skipping(4, attention=[4]), r"attention layer must be in \[0, 4\), got 4"),
        (lambda: Plan.skipping(4, mlp=[-1]), r"mlp layer must be in \[0, 4\), got -1"),
        (lambda: Plan.skipping(4, mlp=[2, 2]), "mlp layer 2 is given twice"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_value(make: object, fact: str) -> None:
    with pytest.raises(UsageError, match=fact):
        make()


def test_a_layer_cannot_have_two_modes() -> None:
    data = Plan.skipping(3, attention=[1]).to_json()
    data["low"]["attention"] = [1]
    with pytest.raises(UsageError, match="attention layer 1 is given twice"):
        Plan.from_json(data)
