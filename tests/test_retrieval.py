"""Retrieval drafts: what is copied from neighbours' answers, and that output stays that of plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_ssd import Engine, Plan
from knn_ssd.backends.base import Exactness
from knn_ssd.owner import Owner
from knn_ssd.plan import Policy
from knn_ssd.routing.answers import Answer, AnswerStore, Neighbour
from knn_ssd.routing.plan_choice import general_plan
from knn_ssd.sampling import Sampler, SamplingParams
from knn_ssd.speculation.drafter import Draft, Outcome
from knn_ssd.speculation.retrieval import RetrievalDraft
from knn_ssd.speculation.self_draft import SelfDraft
from knn_ssd.testing import tiny_model

texts = st.lists(st.integers(0, 3), min_size=1, max_size=24)


def neighbours_of(*answers: Sequence[int]) -> list[Neighbour]:
    empty = np.empty(0, np.int32)
    return [Neighbour(Answer(i, empty, np.array(each, np.int32)), 0.1 * i) for i, each in enumerate(answers)]


def longest_match(output: Sequence[int], answer: Sequence[int]) -> int:
    """Length of the longest suffix of the output that occurs in the answer with a token after it, by brute force.

    Both begin with a start mark, which counts as a token.
    """
    read, text = [-1, *output], [-1, *answer]
    for size in range(len(read), 0, -1):
        if any(text[i : i + size] == read[-size:] for i in range(len(text) - size)):
            return size
    return 0


@given(texts, texts, texts)
def test_the_longest_suffix_of_the_output_is_found_in_each_answer(
    output: list[int], one: list[int], other: list[int]
) -> None:
    prompt = [3, 3, 3]
    source = RetrievalDraft(neighbours_of(one, other), len(prompt), min_match=1)
    for length in range(len(output) + 1):
        found = {match.neighbour: match for match in source.matches(prompt + output[:length])}
        for i, answer in enumerate((one, other)):
            expected = longest_match(output[:length], answer)
            assert (found[i].length if i in found else 0) == expected
            if i in found:
                tokens = source.copy(found[i], 5).tokens
                text = [-1, *answer]
                assert tokens == tuple(text[found[i].end : found[i].end + 5])
                assert found[i].available == len(text) - found[i].end > 0
                read = [-1, *output[:length]]
                assert text[found[i].end - expected : found[i].end] == read[len(read) - expected :]


def test_the_first_tokens_are_drafted_by_position() -> None:
    source = RetrievalDraft(neighbours_of([5, 6, 7, 8], [5, 9, 9, 9]), prompt_length=2)
    matches = source.matches([1, 2, 5])  # one token of output
    assert [source.copy(match, 3).tokens for match in matches] == [(6, 7, 8), (9, 9, 9)]
    assert not RetrievalDraft(neighbours_of([4, 5, 6]), prompt_length=2).matches([1, 2, 5])  # another beginning


def test_tokens_of_another_drafter_are_matched_and_forgotten() -> None:
    source = RetrievalDraft(neighbours_of([5, 6, 7, 8]), prompt_length=1)
    (match,) = source.matches([1, 5], drafted=[6, 7])
    assert source.copy(match, 4).tokens == (8,)
    (match,) = source.matches([1, 5])
    assert source.copy(match, 4).tokens == (6, 7, 8)


def test_each_neighbour_earns_its_own_acceptance_and_one_that_misleads_is_dropped() -> None:
    source = RetrievalDraft(neighbours_of([5, 6, 7, 8] * 4, [5, 6, 9, 9] * 4), prompt_length=0)
    for _ in range(2):
        first, second = source.matches([5, 6])
        source.learn(Outcome(source.copy(first, 4), 4, 0.0, 0.0))
        source.learn(Outcome(source.copy(second, 4), 0, 0.0, 0.0))
    (left,) = source.matches([5, 6])
    assert left.neighbour == 0
    assert source.rate(left, 0.5) > 0.85
    own = Draft((1, 5), drafter="self", num_copied=1, copied_by="retrieval", neighbour=0)
    source.learn(
        Outcome(own, 0, 0.0, 0.0)
    )  # the self-drafted token was rejected: nothing of the neighbour's was compared
    assert source.rate(left, 0.5) > 0.85


# In the engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


def owner_with(engine: Engine, prompt: list[int], *answers: Sequence[int]) -> Owner:
    """An owner whose store has a request with this prompt's vector for each answer."""
    store = AnswerStore()
    session = engine.backend.open(len(prompt))
    vector = session.prefill(prompt).mean.numpy()
    session.close()
    for answer in answers:
        store.add(vector, prompt, answer)
    return Owner(store)


PROMPT = [5, 6, 7, 8, 9]


def test_the_second_of_two_equal_requests_copies_the_first_one_s_answer(engine: Engine) -> None:
    owner = Owner(AnswerStore())
    expected = engine.generate(PROMPT, max_new_tokens=40, plain=True).token_ids
    first = engine.generate(PROMPT, max_new_tokens=40, owner=owner)
    second = engine.generate(PROMPT, max_new_tokens=40, owner=owner)
    assert first.token_ids == second.token_ids == expected
    assert not first.neighbours
    assert [near.answer.token_ids.tolist() for near in second.neighbours] == [list(expected)]
    assert second.neighbours[0].distance == pytest.approx(0.0, abs=1e-6)
    assert second.stats.by_drafter["retrieval"].accepted > 0
    assert "retrieval" not in first.stats.by_drafter


def test_rounds_name_the_neighbour_whose_tokens_were_drafted(engine: Engine) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=40, plain=True).token_ids
    owner = owner_with(engine, PROMPT, expected)
    rounds = [chunk.round for chunk in engine.stream(PROMPT, max_new_tokens=40, owner=owner)]
    assert any("retrieval" in each.origins for each in rounds)
    assert all((each.neighbour == 0) == ("retrieval" in each.drafters) for each in rounds)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=60), min_size=1, max_size=8), st.data())
def test_output_is_that_of_plain_decoding_whatever_the_store_holds(
    engine: Engine, hostile: list[list[int]], data: st.DataObject
) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=30, plain=True).token_ids
    cut = data.draw(st.integers(0, 29))
    near_misses = [[*expected[:cut], *(t % engine.backend.vocab_size for t in each)] for each in hostile]
    owner = owner_with(engine, PROMPT, *hostile, *near_misses)
    for _ in range(2):
        assert engine.generate(PROMPT, max_new_tokens=30, owner=owner).token_ids == expected


def test_answers_with_tokens_that_the_model_does_not_have_are_no_neighbours(engine: Engine) -> None:
    owner = owner_with(engine, PROMPT, [engine.backend.vocab_size], [1, 2])
    near = engine.generate(PROMPT, max_new_tokens=4, owner=owner).neighbours
    assert [each.answer.token_ids.tolist() for each in near] == [[1, 2]]


@pytest.mark.parametrize(
    "options",
    [
        {"plain": True},
        {"temperature": 1.0, "seed": 1},
        {"plan": Plan.skipping(4, [1])},
        {"store": False},
    ],
    ids=["plain", "seed", "own plan", "store=False"],
)
def test_what_neither_reads_the_store_nor_adds_to_it(engine: Engine, options: dict[str, Any]) -> None:
    """With a seed the output must depend on the request alone, and a store changes what is drawn."""
    expected = engine.generate(PROMPT, max_new_tokens=20, plain=True).token_ids
    owner = owner_with(engine, PROMPT, expected)
    assert owner.answers is not None
    if "plan" in options:
        options = {"plan": Plan.skipping(engine.backend.num_layers, [1])}
    result = engine.generate(PROMPT, max_new_tokens=20, owner=owner, **options)
    alone = engine.generate(PROMPT, max_new_tokens=20, owner=Owner(), **options)
    assert result.token_ids == alone.token_ids
    assert not result.neighbours
    assert "retrieval" not in result.stats.by_drafter
    assert len(owner.answers) == 1


def test_sampling_without_a_seed_keeps_the_distribution_of_the_target(engine: Engine) -> None:
    """A retrieved token is proposed with certainty; what replaces a rejected one comes from the residual."""
    first = engine.generate(PROMPT, max_new_tokens=1, plain=True).token_ids[0]
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 3, "max_new_tokens": 2}
    plain = [engine.generate(PROMPT, plain=True, **options).token_ids for _ in range(300)]
    owner = owner_with(engine, PROMPT, [first, first, first], [plain[0][0], plain[0][1], 3])
    drafted = [engine.generate(PROMPT, owner=owner, **options).token_ids for _ in range(300)]
    for outcome in {*plain, *drafted}:
        ours, theirs = drafted.count(outcome) / 300, plain.count(outcome) / 300
        assert abs(ours - theirs) < 0.17  # over four standard errors


def test_an_engine_without_a_store_keeps_nothing(engine: Engine) -> None:
    without = Engine(engine.model, engine.tokenizer, answers=False)
    assert without.owner.answers is None
    for _ in range(2):
        assert not without.generate(PROMPT, max_new_tokens=8).neighbours


def test_what_came_of_answers_is_credited_and_an_abandoned_request_is_not_kept(engine: Engine) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=40, plain=True).token_ids
    owner = owner_with(engine, PROMPT, expected)
    store = owner.answers
    assert store is not None
    stream = engine.stream(PROMPT, max_new_tokens=40, owner=owner)
    next(stream)
    stream.close()
    assert len(store) == 1
    accepted = engine.generate(PROMPT, max_new_tokens=40, owner=owner).stats.by_drafter["retrieval"].accepted
    assert store._entries[0].accepted == accepted > 0


# Guesses that ride along in a self-draft


@pytest.fixture(scope="module")
def exact_engine() -> Engine:
    """Rows of its forward passes have the same bits alone and together."""
    engine = Engine(tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32))
    if engine.exactness is not Exactness.BITWISE:
        pytest.skip("without the kernels rows of a block differ in their last bits")
    return engine


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=0, max_size=12),
    st.integers(0, 12),
    st.sampled_from([{}, {"temperature": 1.0, "seed": 3}]),
)
def test_guesses_change_the_passes_of_a_self_draft_and_nothing_else(
    exact_engine: Engine, wrong: list[int], right: int, sampling: dict[str, Any]
) -> None:
    backend = exact_engine.backend
    plan = general_plan(backend).with_policy(Policy(12, 0.0))

    def drafted(guess: Callable[[Sequence[int]], Sequence[int]] | None) -> Draft:
        sampler = Sampler.from_params(SamplingParams(**sampling), backend.device)
        session = backend.open(len(PROMPT) + 20)
        session.prefill(PROMPT[:-1])
        draft = SelfDraft(session, plan, sampler).propose(PROMPT, 12, guess=guess)
        assert session.length == len(PROMPT) - 1
        session.close()
        return draft

    alone = drafted(None)
    truth = [*alone.tokens[:right], *wrong]
    guessed = drafted(lambda tokens: truth[len(tokens) :])
    assert guessed.tokens == alone.tokens
    assert guessed.confidences == alone.confidences
    if alone.probs is not None:
        assert guessed.probs is not None
        assert torch.equal(guessed.probs, alone.probs)
    assert alone.num_passes == 12
    assert guessed.num_passes <= 12 - right + -(-right // 4)  # four tokens a pass as long as the guesses are right
