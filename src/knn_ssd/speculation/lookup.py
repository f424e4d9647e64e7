"""Lookup drafts: tokens copied from what followed an earlier occurrence of the context's last tokens.

This is prompt lookup decoding (Saxena 2023) with the *longest* suffix that occurred before, rather than one of a fixed
length, found by a suffix automaton (SAM decoding, arXiv 2411.10666). No forward pass is needed. Reading a token takes
amortised constant time, and a proposal takes time proportional to its length.

This module knows token ids. It knows nothing of models, or whether a draft is worth its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knn_ssd.speculation.drafter import Draft, Outcome
from knn_ssd.speculation.suffix_automaton import SuffixAutomaton, SuffixMatcher

_TAIL = 8  # last tokens of the context read before that are compared with the new context


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier occurrence of the context's last tokens.

    Args:
        length: how many tokens match.
        end: index in the context of the token after it.
    """

    length: int
    end: int


class LookupDraft:
    """The lookup drafter of one request, whose context only ever grows.

    It drafts what followed the longest suffix of the context that occurred before. A copy that reaches the end of the
    context continues with its own beginning: "abcabc" is followed by "abcabc…", as further lookups would give if all
    its tokens were accepted.

    Args:
        min_match: the shortest match that gives a draft, in tokens.
    """

    def __init__(self, min_match: int = 2) -> None:
        if min_match < 1:
            raise ValueError(f"a match has at least 1 token, got min_match={min_match}")
        self._own = SuffixAutomaton()
        self._min_match = min_match

    def match(self, context: Sequence[int], drafted: Sequence[int] = ()) -> Match | None:
        """The longest match with a continuation; None if it is shorter than `min_match`.

        Args:
            context: the context of the last call, extended by any number of tokens.
            drafted: another drafter's tokens after the context; they are matched, but not kept.
        """
        self._read(context)
        own = SuffixMatcher.at_match(self._own)
        for token in drafted:
            own.extend(token)
        return Match(own.length, own.end) if own.length >= self._min_match else None

    def propose(self, context: Sequence[int], limit: int, drafted: Sequence[int] = ()) -> Draft:
        """At most `limit` tokens that followed the match of `context` extended by `drafted`; none without a match."""
        match = self.match(context, drafted)
        tokens = self._copy(match.end, drafted, max(limit, 0)) if match is not None else []
        if match is None or not tokens:
            return Draft()
        return Draft(tuple(tokens), drafter="lookup", match_length=match.length)

    def learn(self, outcome: Outcome) -> None:
        """Does nothing: the next context contains all there is to learn."""

    def _read(self, context: Sequence[int]) -> None:
        """Reads the new tokens of the context, after a check that the last few known ones are unchanged."""
        known = len(self._own)
        tail = self._own.tokens[-_TAIL:].tolist()
        assert len(context) >= known, f"the context had {known} tokens and now has {len(context)}"
        assert list(context[known - len(tail) : known]) == tail, f"the context was changed before token {known}"
        for token in context[known:]:
            self._own.extend(token)

    def _copy(self, end: int, drafted: Sequence[int], limit: int) -> list[int]:
        """`limit` tokens from index `end` of the context extended by `drafted`, repeated as often as needed."""
        tokens = self._own.tokens[end : end + limit].tolist()
        tokens.extend(drafted)
        while 0 < len(tokens) < limit:
            tokens.extend(tokens[: limit - len(tokens)])
        return tokens[:limit]
