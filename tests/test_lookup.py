"""Looked-up drafts against a search by brute force for the longest suffix that occurred earlier."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import TableSession
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import LogitsProcessorList

from knn_ssd.sampling import Sampler
from knn_ssd.speculation import lookup, suffix_automaton
from knn_ssd.speculation.decode import FinishReason, decode
from knn_ssd.speculation.lookup import LookupDraft, Match
from knn_ssd.speculation.suffix_automaton import SuffixAutomaton, SuffixMatcher


def words(alphabet: int, longest: int = 40) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, alphabet - 1), max_size=longest)


def repetitive() -> st.SearchStrategy[list[int]]:
    """Texts of few tokens, and texts that repeat a part of themselves, in which matches are long and many."""
    repeated = st.tuples(words(3, 8), words(3, 5), words(3, 8)).map(lambda p: p[0] + p[1] * 3 + p[2] + p[0] + p[1])
    return st.one_of(words(1), words(2), words(3), repeated)


def ends_of(part: Sequence[int], text: Sequence[int]) -> list[int]:
    """The index after every occurrence of `part`."""
    size = len(part)
    return [start + size for start in range(len(text) - size + 1) if list(text[start : start + size]) == list(part)]


def longest_suffix(read: Sequence[int], text: Sequence[int], before: int | None = None) -> tuple[int, list[int]]:
    """The longest suffix of `read` that occurs in `text`, ending before an index; its length and all its ends."""
    for size in range(len(read), 0, -1):
        ends = [end for end in ends_of(read[-size:], text) if before is None or end < before]
        if ends:
            return size, ends
    return 0, [0]


def suffix_of_length(text: Any, length: int) -> Any:
    return text[len(text) - length :]


def scrambled(length: int, alphabet: int, seed: int = 1) -> list[int]:
    """A text without order, the same on every run."""
    state, text = seed, []
    for _ in range(length):
        state = state * 48_271 % 2_147_483_647
        text.append((state >> 8) % alphabet)
    return text


def periodic(text: Sequence[int], end: int, limit: int) -> list[int]:
    """What follows index `end` if the text goes on with a copy of what follows index `end`."""
    grown = list(text)
    for index in range(limit):
        grown.append(grown[end + index])
    return grown[len(text) :]


# The automaton


@given(repetitive())
def test_the_match_is_the_longest_suffix_that_ended_earlier(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for index, token in enumerate(text):
        automaton.extend(token)
        length, ends = longest_suffix(text[: index + 1], text[: index + 1], before=index + 1)
        assert automaton.match_length == length
        assert automaton.match_end in ends


@pytest.mark.parametrize("alphabet", [2, 3, 4, 6, 9])
def test_the_match_is_the_longest_in_longer_texts_too(alphabet: int) -> None:
    for seed in range(1, 30):
        text = bytes(scrambled(300, alphabet, seed))
        automaton = SuffixAutomaton()
        for size, token in enumerate(text, start=1):
            automaton.extend(token)
            length, read = automaton.match_length, text[:size]
            assert read[automaton.match_end - length : automaton.match_end] == suffix_of_length(read, length)
            assert automaton.match_end < size
            assert read.find(suffix_of_length(read, length + 1)) == size - length - 1  # nothing longer is earlier


@given(repetitive())
def test_without_a_bound_on_hops_the_occurrence_is_always_the_most_recent(text: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffix_automaton, "_HOPS", sys.maxsize)
        for index in range(len(text)):
            automaton = SuffixAutomaton(text[: index + 1])
            length, ends = longest_suffix(text[: index + 1], text[: index + 1], before=index + 1)
            assert automaton.match_end == (ends[-1] if length else 0)


def test_of_several_occurrences_the_most_recent_is_given() -> None:
    assert SuffixAutomaton([1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2]).match_end == 8


def test_an_automaton_of_nothing_matches_nothing() -> None:
    automaton = SuffixAutomaton()
    assert (len(automaton), automaton.num_states, automaton.match_length, automaton.match_end) == (0, 1, 0, 0)
    assert SuffixMatcher(automaton).continued() == (0, 0)


@pytest.mark.parametrize("token", [-2, -49_152])
def test_what_is_no_token_is_refused(token: int) -> None:
    with pytest.raises(AssertionError, match="not negative"):
        SuffixAutomaton([1, token])


# Matching


@given(repetitive(), words(4))
def test_a_matcher_finds_the_longest_suffix_that_occurs_in_the_text(text: list[int], read: list[int]) -> None:
    """Token 3 is in no text."""
    matcher = SuffixMatcher(SuffixAutomaton(text))
    for index, token in enumerate(read):
        matcher.extend(token)
        length, ends = longest_suffix(read[: index + 1], text)
        assert matcher.length == length
        assert matcher.end in ends
        length, ends = longest_suffix(read[: index + 1], text, before=len(text))
        assert matcher.continued()[0] == length
        assert matcher.continued()[1] in ends if length else matcher.continued() == (0, 0)


@pytest.mark.parametrize("alphabet", [2, 3, 5])
def test_a_matcher_stays_right_while_the_automaton_grows(alphabet: int) -> None:
    """What was added is found from the next token on; what it made longer in hindsight is not."""
    for seed in range(1, 60):
        steps = scrambled(120, 2 * alphabet, seed)
        automaton = SuffixAutomaton()
        matcher = SuffixMatcher(automaton)
        held: list[int] = []  # the match
        for grows, token in (divmod(step, alphabet) for step in steps):
            if grows:
                automaton.extend(token)
            else:
                matcher.extend(token)
                held = suffix_of_length([*held, token], longest_suffix([*held, token], automaton.tokens)[0])
            assert matcher.length == len(held)
            assert matcher.end in (ends_of(held, automaton.tokens) if held else [0])


def test_a_matcher_finds_later_occurrences() -> None:
    matcher = SuffixMatcher(SuffixAutomaton([0, 1]))
    matcher.extend(1)
    for token in (2, 1, 3):
        matcher.automaton.extend(token)
    assert matcher.end == 4


# Drafts from the context


@given(repetitive(), st.lists(st.integers(1, 7), max_size=12), st.integers(0, 12), st.integers(1, 4))
def test_a_draft_copies_what_followed_the_longest_match(
    text: list[int], pieces: list[int], limit: int, min_match: int
) -> None:
    """However the context grows between calls."""
    source = LookupDraft(min_match=min_match)
    lengths = [sum(pieces[: count + 1]) for count in range(len(pieces))]
    for length in [*(n for n in lengths if n < len(text)), len(text), len(text)]:
        context = text[:length]
        size, ends = longest_suffix(context, context, before=length)
        match, draft = source.match(context), source.propose(context, limit)
        if size < min_match:
            assert match is None
            assert draft.tokens == ()
            continue
        assert match is not None
        assert match.length == size
        assert match.end in ends
        assert list(draft.tokens) == periodic(context, match.end, limit)
        assert draft.probs is None
        if limit:
            assert (draft.drafter, draft.match_length) == ("lookup", size)


@given(repetitive(), words(3, 8), st.integers(0, 12), st.integers(0, 3))
def test_tokens_of_another_drafter_are_matched_and_forgotten(
    text: list[int], drafted: list[int], limit: int, others: int
) -> None:
    source, fresh = LookupDraft(min_match=1), LookupDraft(min_match=1)
    source.propose(text, limit)
    for count in range(others + 1):
        ahead = drafted[: len(drafted) - count]
        size, ends = longest_suffix(text + ahead, text, before=None if ahead else len(text))
        match = source.match(text, ahead)
        assert (match.length if match else 0) == size
        if match:
            assert match.end in ends
            assert list(source.propose(text, limit, ahead).tokens) == periodic(text + ahead, match.end, limit)
    for length in range(len(text), len(text) + 3):
        context = text + [0, 1, 0][: length - len(text)]
        assert source.match(context) == fresh.match(context)


def test_a_repeated_text_is_continued_for_as_long_as_is_asked() -> None:
    source = LookupDraft()
    assert source.propose([5, 1, 2, 3, 1, 2, 3], 8).tokens == (1, 2, 3, 1, 2, 3, 1, 2)
    assert source.propose([5, 1, 2, 3, 1, 2, 3], 2, drafted=[1, 2]).tokens == (3, 1)
    assert LookupDraft().propose([7, 7, 7], 4).tokens == (7, 7, 7, 7)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_zero_gives_no_draft(limit: int) -> None:
    assert LookupDraft().propose([1, 2, 1, 2, 1, 2], limit).tokens == ()
    assert LookupDraft().propose([1, 2, 1, 2], limit, drafted=[1, 2]).tokens == ()


def test_a_match_that_is_too_short_is_no_match() -> None:
    context = [1, 2, 3, 9, 1, 2]
    assert LookupDraft(min_match=3).match(context) is None
    assert LookupDraft(min_match=2).match(context) == Match(2, 2)
    assert LookupDraft().match([1, 9, 1]) is None
    with pytest.raises(ValueError, match="min_match=0"):
        LookupDraft(min_match=0)


@pytest.mark.parametrize("context", [[1, 2, 3], [], [1, 2, 3, 5], [9, 2, 3, 4], [1, 9, 3, 4, 5]])
def test_a_context_that_did_not_grow_from_the_last_one_is_refused(context: list[int]) -> None:
    source = LookupDraft()
    source.propose([1, 2, 3, 4], 4)
    with pytest.raises(AssertionError, match="was changed" if len(context) > 3 else "had 4 tokens and now has"):
        source.propose(context, 4)


def test_decoding_with_lookup_gives_the_plain_output_in_fewer_rounds() -> None:
    table = torch.roll(torch.eye(6), 1, dims=1)  # row t: certain of t + 1

    def decoded(source: LookupDraft | None) -> tuple[list[int], int]:
        context: list[int] = [0]

        def never(token: int) -> FinishReason | None:
            return None

        greedy = Sampler(LogitsProcessorList(), greedy=True)
        rounds = list(decode(TableSession(table, table, 1), context, table[0], source, greedy, 30, never))
        return context, len(rounds)

    plain, with_lookup = decoded(None), decoded(LookupDraft())
    assert with_lookup[0] == plain[0]
    assert with_lookup[1] < plain[1] / 2


# Cost


def steps(function: Callable[[], object]) -> int:
    """How many lines of the two modules run during a call."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in (lookup.__file__, suffix_automaton.__file__):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def fibonacci(length: int) -> list[int]:
    shorter, longer = [0], [0, 1]
    while len(longer) < length:
        shorter, longer = longer, longer + shorter
    return longer[:length]


SIZE = 3000
TEXTS = {
    "one token": [0] * SIZE,
    "one token, then another": [0] * (SIZE // 2) + [1] * (SIZE // 2),
    "almost one token": ([0] * 99 + [1]) * (SIZE // 100),
    "periodic": [0, 1, 2] * (SIZE // 3),
    "all different": list(range(SIZE)),
    "fibonacci": fibonacci(SIZE),
    "two tokens": scrambled(SIZE, 2),
    "a hundred tokens": scrambled(SIZE, 100),
    "one token before each of many": [
        token for pair in zip([0] * SIZE, range(1, SIZE), strict=False) for token in pair
    ],
}
every_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
MAX_STEPS = 90  # lines of Python for a token, over a whole text


@every_text
def test_reading_a_token_takes_constant_steps_over_a_text(text: list[int]) -> None:
    assert steps(lambda: SuffixAutomaton(text)) < MAX_STEPS * len(text)
    assert SuffixAutomaton(text).num_states <= 2 * len(text)


@every_text
@pytest.mark.parametrize("other", ["one token", "fibonacci", "two tokens"])
def test_matching_a_token_takes_constant_steps_over_a_text(text: list[int], other: str) -> None:
    matcher = SuffixMatcher(SuffixAutomaton(TEXTS[other]))

    def follow() -> None:
        for token in text:
            matcher.extend(token)
            matcher.continued()

    assert steps(follow) < MAX_STEPS * len(text)


@every_text
def test_a_proposal_takes_constant_steps_over_a_context(text: list[int]) -> None:
    source = LookupDraft()
    rounds = range(10, len(text), 10)
    context: list[int] = []

    def propose() -> None:
        for length in rounds:
            context.extend(text[len(context) : length])
            source.propose(context, 8)

    assert steps(propose) < 2 * MAX_STEPS * len(text)
