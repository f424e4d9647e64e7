"""Accepting and decoding by hand-written distributions: no model, so every number can be followed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers import TableSession
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import LogitsProcessorList

from knn_ssd.plan import Plan, Policy
from knn_ssd.sampling import Sampler, SamplingParams
from knn_ssd.speculation.decode import FinishReason, Round, Verdict, accept, decode
from knn_ssd.speculation.drafter import Draft, Outcome
from knn_ssd.speculation.self_draft import SelfDraft

CPU = torch.device("cpu")
VOCABULARY = 6
GREEDY = Sampler(LogitsProcessorList(), greedy=True)


def drawing(seed: int) -> Sampler:
    return Sampler.from_params(SamplingParams(temperature=1.0, seed=seed), CPU)


class Scripted(Sampler):
    """A sampler whose random numbers are written down: it picks the most likely of what it is given."""

    def __init__(self, *uniforms: float) -> None:
        super().__init__(LogitsProcessorList(), greedy=False)
        self._uniforms = list(uniforms)

    def uniform(self, count: int) -> list[float]:
        return [self._uniforms.pop(0) for _ in range(count)]

    def pick(self, probs: torch.Tensor) -> int:
        return int(probs.argmax())


def rows(*probs: Sequence[float]) -> torch.Tensor:
    return torch.tensor(probs)


# --- Greedy


def one_hot(*tokens: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), VOCABULARY).float()


@pytest.mark.parametrize(
    ("drafted", "target", "verdict"),
    [
        ((), (3,), Verdict(0, 3)),
        ((1, 2), (1, 2, 5), Verdict(2, 5)),  # always
        ((1, 2), (0, 2, 5), Verdict(0, 0)),  # never
        ((1, 2, 4), (1, 3, 4, 5), Verdict(1, 3)),  # sometimes; what agrees after the first rejection does not count
        ((1, 1, 1), (1, 1, 0, 1), Verdict(2, 0)),
    ],
)
def test_greedy_keeps_the_longest_agreeing_prefix_and_adds_its_own(
    drafted: tuple[int, ...], target: tuple[int, ...], verdict: Verdict
) -> None:
    assert accept(one_hot(*target), Draft(drafted), GREEDY) == verdict


@given(st.data())
def test_greedy_acceptance_is_the_plain_loop_over_both(data: st.DataObject) -> None:
    token = st.integers(0, 2)
    drafted = tuple(data.draw(st.lists(token, max_size=6)))
    target = data.draw(st.lists(token, min_size=len(drafted) + 1, max_size=len(drafted) + 1))
    agreeing = 0
    while agreeing < len(drafted) and drafted[agreeing] == target[agreeing]:
        agreeing += 1
    assert accept(one_hot(*target), Draft(drafted), GREEDY) == Verdict(agreeing, target[agreeing])


# --- Sampling: never, always, sometimes


@pytest.mark.parametrize("probs", [None, rows([0.1, 0.9, 0.0])])
@pytest.mark.parametrize("seed", range(20))
def test_a_token_of_target_probability_zero_is_never_accepted(probs: torch.Tensor | None, seed: int) -> None:
    target = rows([0.5, 0.0, 0.5], [1.0, 0.0, 0.0])
    verdict = accept(target, Draft((1,), probs), drawing(seed))
    assert verdict.accepted == 0
    assert verdict.token in {0, 2}


@pytest.mark.parametrize("seed", range(20))
def test_a_token_is_always_accepted_where_p_is_at_least_q(seed: int) -> None:
    target = rows([0.2, 0.7, 0.1], [0.0, 0.3, 0.7], [0.0, 0.0, 1.0])
    draft = Draft((1, 2), rows([0.4, 0.6, 0.0], [0.3, 0.0, 0.7]))
    assert accept(target, draft, drawing(seed)) == Verdict(2, 2)


@pytest.mark.parametrize("seed", range(20))
def test_a_certain_token_is_always_accepted_when_it_was_determined(seed: int) -> None:
    assert accept(rows([0.0, 1.0], [1.0, 0.0]), Draft((1,)), drawing(seed)) == Verdict(1, 0)


@pytest.mark.parametrize(
    ("probs", "chance", "verdict"),
    [
        # Drawn: kept below p / q = 0.3 / 0.6, otherwise the most likely of max(0, p - q).
        (rows([0.4, 0.6, 0.0]), 0.49, Verdict(1, 0)),
        (rows([0.4, 0.6, 0.0]), 0.51, Verdict(0, 2)),
        # Determined: kept below p = 0.3, otherwise the most likely of the others.
        (None, 0.29, Verdict(1, 0)),
        (None, 0.31, Verdict(0, 0)),
    ],
)
def test_a_token_is_kept_with_probability_p_over_q(probs: torch.Tensor | None, chance: float, verdict: Verdict) -> None:
    target = rows([0.45, 0.3, 0.25], [1.0, 0.0, 0.0])
    assert accept(target, Draft((1,), probs), Scripted(chance)) == verdict


def test_tokens_after_a_rejected_one_are_ignored() -> None:
    target = rows([0.0, 1.0], [0.0, 1.0], [1.0, 0.0])
    assert accept(target, Draft((0, 1)), Scripted(0.5, 0.0)) == Verdict(0, 1)


def test_where_rounding_alone_rejects_the_target_still_answers() -> None:
    target = rows([0.5, 0.5], [1.0, 0.0])
    draft = Draft((1,), rows([0.5, 0.5]) * (1 + 1e-6))
    assert accept(target, draft, Scripted(1 - 1e-9)) == Verdict(0, 0)


def test_the_target_and_the_draft_are_left_as_they_are() -> None:
    target, probs = rows([0.2, 0.3, 0.5], [0.1, 0.2, 0.7]), rows([0.1, 0.9, 0.0])
    before = target.clone(), probs.clone()
    accept(target, Draft((1,), probs), Scripted(0.99))
    accept(target, Draft((1,)), Scripted(0.99))
    assert torch.equal(target, before[0])
    assert torch.equal(probs, before[1])


def test_a_seed_reproduces_and_another_one_differs() -> None:
    target = torch.full((5, VOCABULARY), 1 / VOCABULARY)
    draft = Draft((1, 2, 3, 4))

    def run(seed: int) -> list[Verdict]:
        sampler = drawing(seed)
        return [accept(target, draft, sampler) for _ in range(20)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_tokens_beyond_the_drawn_ones_were_determined() -> None:
    """As where lookup extends a self-draft."""
    target, draft = rows([0.5, 0.5], [0.4, 0.6], [1.0, 0.0]), Draft((1, 0), rows([0.5, 0.5]), num_copied=1)
    assert accept(target, draft, Scripted(0.99, 0.39)) == Verdict(2, 0)
    assert accept(target, draft, Scripted(0.99, 0.41)) == Verdict(1, 1)
    assert draft.drafters == ("none", "lookup")


def test_the_drafter_learns_the_outcome_of_its_draft() -> None:
    drafter, session = ScriptedSource([(2, 3, 0), (5,)]), counting_session(1)
    list(decode(session, [0], session.target[0], drafter, GREEDY, 7, lambda _token: None))
    assert drafter.outcomes == [((2, 3, 0), 2), ((5,), 1), ((), 0)]


# --- Decoding, with a target whose next token is the last one plus one


class ScriptedSource:
    """Drafts given tokens, and notes the limits of the calls."""

    def __init__(self, drafts: Sequence[Sequence[int]]) -> None:
        self._drafts = list(drafts)
        self.limits: list[int] = []
        self.outcomes: list[tuple[tuple[int, ...], int]] = []

    def propose(self, context: Sequence[int], limit: int) -> Draft:
        self.limits.append(limit)
        draft = self._drafts.pop(0)[:limit] if self._drafts else ()
        return Draft(tuple(draft), drafter="script")

    def learn(self, outcome: Outcome) -> None:
        self.outcomes.append((outcome.draft.tokens, outcome.accepted))


def counting_session(length: int) -> TableSession:
    successor = torch.roll(torch.eye(VOCABULARY), 1, dims=1)  # row t: certain of t + 1
    return TableSession(successor, successor, length)


def run(
    drafts: Sequence[Sequence[int]] | None, max_new_tokens: int, end: int | None = None
) -> tuple[list[Round], list[int], list[int], TableSession]:
    """The rounds, the context after them, the tokens that the end was asked of, and the session."""
    context = [0]
    session = counting_session(len(context))
    reported: list[int] = []

    def ends(token: int) -> FinishReason | None:
        reported.append(token)
        return FinishReason.EOS if token == end else None

    drafter = None if drafts is None else ScriptedSource(drafts)
    first_logits = session.target[0]
    rounds = list(decode(session, context, first_logits, drafter, GREEDY, max_new_tokens, ends))
    return rounds, context, reported, session


def test_rounds_say_what_was_drafted_and_accepted() -> None:
    rounds, *_ = run([(2, 3, 4), (), (2, 0)], max_new_tokens=9)
    assert [(r.tokens, r.drafted, r.accepted, r.drafters) for r in rounds] == [
        ((1,), 0, 0, ()),  # the prompt's own
        ((2, 3, 4, 5), 3, 3, ("script",) * 3),  # all accepted, and the bonus
        ((0,), 0, 0, ()),  # nothing drafted
        ((1,), 2, 0, ("script",) * 2),  # the first rejected
        ((2,), 0, 0, ()),
        ((3,), 0, 0, ()),  # one token left: the drafter is not asked
    ]
    assert [r.finish_reason for r in rounds] == [None] * 5 + [FinishReason.LENGTH]


@settings(max_examples=200)
@given(
    drafts=st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=5), max_size=12),
    max_new_tokens=st.integers(1, 20),
    end=st.none() | st.integers(0, VOCABULARY - 1),
)
def test_no_draft_changes_the_output_or_where_it_ends(
    drafts: list[list[int]], max_new_tokens: int, end: int | None
) -> None:
    plain, plain_context, _, _ = run(None, max_new_tokens, end)
    rounds, context, reported, session = run(drafts, max_new_tokens, end)
    assert context == plain_context
    assert [token for r in rounds for token in r.tokens] == context[1:] == reported
    assert all(r.tokens for r in rounds)
    assert rounds[-1].finish_reason == plain[-1].finish_reason
    assert all(r.finish_reason is None for r in rounds[:-1])
    assert all(0 <= r.accepted <= min(r.drafted, len(r.tokens)) for r in rounds)
    if rounds[-1].finish_reason is FinishReason.LENGTH:
        assert session.length == len(context) - 1, "all but the last token is committed"


def test_no_more_is_drafted_than_can_be_emitted() -> None:
    drafter = ScriptedSource([(2, 3), (), ()])
    session = counting_session(1)
    context = [0]
    list(decode(session, context, session.target[0], drafter, GREEDY, 6, lambda _token: None))
    assert drafter.limits == [4, 1], "6 tokens less the first one, less the target's own; then 2 less one"


def test_a_round_is_computed_only_when_it_is_asked_for() -> None:
    drafter = ScriptedSource([])
    session = counting_session(1)
    rounds = decode(session, [0], session.target[0], drafter, GREEDY, 6, lambda _token: None)
    next(rounds)
    assert drafter.limits == []
    next(rounds)
    assert drafter.limits == [4]


# --- A self-draft, on a target whose drafts are less and less certain


def fading_session(length: int) -> TableSession:
    """Whose draft says t + 1 after t, with probability 0.9, 0.8, 0.7, …"""
    chances = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])[:, None]
    successor = torch.roll(torch.eye(VOCABULARY), 1, dims=1)
    probs = successor * chances + (1 - successor) * (1 - chances) / (VOCABULARY - 1)
    return TableSession(probs.log(), probs.log(), length)


@pytest.mark.parametrize(
    ("max_draft", "threshold", "limit", "tokens"),
    [
        (6, 0.0, 9, (1, 2, 3, 4, 5, 0)),  # as long as the policy allows
        (6, 0.0, 3, (1, 2, 3)),  # as long as the round allows
        (6, 0.75, 9, (1, 2, 3)),  # the first token under the threshold stays, and is the last
        (6, 0.95, 9, (1,)),
        (1, 0.0, 9, (1,)),
        (6, 0.0, 0, ()),
    ],
)
def test_a_self_draft_stops_where_its_policy_says(
    max_draft: int, threshold: float, limit: int, tokens: tuple[int, ...]
) -> None:
    session = fading_session(length=7)
    drafter = SelfDraft(session, Plan.skipping(1, [0], policy=Policy(max_draft, threshold)), GREEDY)
    draft = drafter.propose([3, 0], limit)
    assert (draft.tokens, draft.drafter) == (tokens, "self")
    assert draft.probs is None, "a greedy draft is determined, not drawn"
    assert session.length == 7, "the session is rewound"


def test_a_drawn_self_draft_brings_the_distributions_it_was_drawn_from() -> None:
    session = fading_session(length=7)
    sampler = Sampler.from_params(SamplingParams(temperature=0.5, seed=4), CPU)
    draft = SelfDraft(session, Plan.skipping(1, [0], policy=Policy(4, 0.0)), sampler).propose([3, 0], 9)
    before = [0, *draft.tokens[:-1]]
    assert draft.probs is not None
    torch.testing.assert_close(draft.probs, (session.draft[before] / 0.5).softmax(dim=-1))


def test_a_failing_self_draft_rewinds_the_session() -> None:
    session = fading_session(length=7)

    def fail(_token_ids: Sequence[int], _plan: Plan | None = None) -> torch.Tensor:
        if session.length == 9:
            raise KeyboardInterrupt
        return session.draft[[0]]

    session.forward = fail
    with pytest.raises(KeyboardInterrupt):
        SelfDraft(session, Plan.skipping(1, [0], policy=Policy(6, 0.0)), GREEDY).propose([3, 0], 9)
    assert session.length == 7
