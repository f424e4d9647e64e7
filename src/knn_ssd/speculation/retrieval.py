"""Retrieval drafts: tokens copied from the answers of the nearest earlier requests.

Similar earlier outputs as drafts are the idea of ToolSpec (arXiv 2604.13519). An answer is searched by the longest
suffix of this request's own output, and by position: while the output is the beginning of the answer, the whole of it
matches, so an answer drafts from the second token on, where lookup has nothing to find yet.

This module knows token ids. It knows nothing of models, or whether a draft is worth its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from knn_ssd.routing.answers import Answer, Neighbour
from knn_ssd.speculation.drafter import Draft, Outcome
from knn_ssd.speculation.suffix_automaton import SEPARATOR, SuffixAutomaton, SuffixMatcher

_START = SEPARATOR  # stands before an output and before each answer, so that their beginnings match
_PRIOR_TOKENS = 2.0  # that the acceptance of other requests counts for, beside what a neighbour's own tokens came to
_MAX_FAILURES = 2  # a neighbour whose drafts were rejected at their first token so often in a row is dropped
_MAX_SEARCHED = 4096  # first tokens of an answer that are searched
_AUTOMATA = 64  # of answers that are kept for the next requests; one takes about 130 bytes a token


@dataclass(frozen=True, slots=True)
class RetrievalMatch:
    """An occurrence of the output's last tokens in a neighbour's answer.

    Args:
        neighbour: which neighbour, nearest first.
        length: how many tokens match.
        end: index in the answer of the token after it.
        available: tokens of the answer from there on.
    """

    neighbour: int
    length: int
    end: int
    available: int


class _NeighbourText:
    """One neighbour's answer, and what became of the drafts from it in this request."""

    def __init__(self, answer: Answer) -> None:
        self.matcher = SuffixMatcher(_automaton(answer))
        self.matcher.extend(_START)
        self.accepted = self.observed = 0.0
        self.failures = 0  # in a row


class RetrievalDraft:
    """The retrieval drafter of one request.

    Args:
        neighbours: the nearest earlier requests, nearest first.
        prompt_length: tokens of this request's prompt, which are not matched.
        min_match: the shortest match that gives a draft, in tokens; the start of the output counts as one.
    """

    def __init__(self, neighbours: Sequence[Neighbour], prompt_length: int, min_match: int = 2) -> None:
        self._texts = {i: _NeighbourText(neighbour.answer) for i, neighbour in enumerate(neighbours)}
        self._known = prompt_length  # tokens of the context that were read
        self._min_match = min_match

    def matches(self, context: Sequence[int], drafted: Sequence[int] = ()) -> list[RetrievalMatch]:
        """The longest match in each neighbour's answer, nearest neighbour first; none where nothing follows it.

        Args:
            context: the context of the last call, extended by any number of tokens.
            drafted: another drafter's tokens after the context; they are matched, but not kept.
        """
        new, self._known = context[self._known :], len(context)
        found = []
        for i, text in self._texts.items():
            for token in new:
                text.matcher.extend(token)
            matcher = text.matcher.copy() if drafted else text.matcher
            for token in drafted:
                matcher.extend(token)
            length, end = matcher.continued()
            if length >= self._min_match:
                found.append(RetrievalMatch(i, length, end, len(matcher.automaton) - end))
        return found

    def rate(self, match: RetrievalMatch, prior: float) -> float:
        """The expected acceptance rate of a match's tokens.

        Args:
            match: one of this request's matches.
            prior: the rate of matches of such a length in other requests.
        """
        text = self._texts[match.neighbour]
        return (text.accepted + _PRIOR_TOKENS * prior) / (text.observed + _PRIOR_TOKENS)

    def copy(self, match: RetrievalMatch, limit: int) -> Draft:
        """At most `limit` tokens that followed a match."""
        tokens = self._texts[match.neighbour].matcher.automaton.tokens[match.end : match.end + max(limit, 0)]
        return Draft(
            tuple(tokens), drafter="retrieval", match_length=match.length, neighbour=match.neighbour if tokens else None
        )

    def learn(self, outcome: Outcome) -> None:
        """Notes what became of retrieved tokens, and drops a neighbour that misleads."""
        draft = outcome.draft
        own = len(draft.tokens) - draft.drafters.count("retrieval")  # before the retrieved tokens
        if draft.neighbour not in self._texts or outcome.accepted < own:
            return  # nothing retrieved was compared with the target
        text = self._texts[draft.neighbour]
        accepted = outcome.accepted - own
        text.accepted += accepted
        text.observed += min(accepted + 1, len(draft.tokens) - own)
        text.failures = 0 if accepted else text.failures + 1
        if text.failures >= _MAX_FAILURES:
            del self._texts[draft.neighbour]


@lru_cache(maxsize=_AUTOMATA)
def _automaton(answer: Answer) -> SuffixAutomaton:
    return SuffixAutomaton([_START, *answer.token_ids[:_MAX_SEARCHED].tolist()])
