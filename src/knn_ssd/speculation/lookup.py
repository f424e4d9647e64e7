"""Lookup drafts: tokens copied from what followed an earlier occurrence of the context's last tokens.

The earlier occurrence is in the context itself (prompt lookup decoding, Saxena 2023) or in a corpus of earlier prompts
and outputs of the same domain (arXiv 2304.04487). A suffix automaton finds the *longest* suffix that occurred before,
rather than one of a fixed length (SAM decoding, arXiv 2411.10666). No forward pass is needed.

Cost: reading a token takes amortised constant time, in the context and in the corpus alike, and a proposal takes time
proportional to its length. The corpus is two automata over many texts each, one growing and one full. When the growing
one is full, it replaces the full one, which is dropped with the oldest texts. So a context is matched in two automata
however many texts there are, adding a text costs its own length, and nothing is ever rebuilt. (With an automaton for
each text every context would cost as many steps as there are texts; a single automaton cannot forget.)

This module knows token ids. It knows nothing of models, domains, or whether a draft is worth its time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from knn_ssd.speculation.drafter import Draft, Outcome
from knn_ssd.speculation.suffix_automaton import SEPARATOR, SuffixAutomaton, SuffixMatcher

MIN_CORPUS_TOKENS = 4
_TAIL = 8  # last tokens of the context read before that are compared with the new context


class LookupCorpus:
    """Earlier prompts and outputs of one domain, shared by requests and threads; the oldest are forgotten.

    A lock is held while a text is added (about as long as a request takes to read as many tokens of its own) and
    while a request reads its newest tokens.

    Args:
        capacity: the most tokens to hold. Many texts are forgotten at once, and at least half the capacity stays. Of a
            text longer than half the capacity, the end is kept. A token takes about 130 bytes in code and prose, and
            at most some 220; a running request holds on to forgotten texts until its next round.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        if capacity < MIN_CORPUS_TOKENS:
            raise ValueError(f"a lookup corpus holds at least {MIN_CORPUS_TOKENS} tokens, got {capacity}")
        self._half = capacity // 2
        self._lock = threading.Lock()
        self._texts = SuffixAutomaton(), SuffixAutomaton()  # the newer, which grows, first

    def __len__(self) -> int:
        """How many tokens are held, including one separator for each text."""
        with self._lock:
            return sum(len(text) for text in self._texts)

    def add(self, tokens: Sequence[int]) -> None:
        """Adds a text: a prompt with its output, or either."""
        kept = tokens[-(self._half - 1) :]
        if min(kept, default=0) < 0:
            raise ValueError(f"token ids are not negative, got {min(kept)}")
        if not kept:
            return
        with self._lock:
            if len(self._texts[0]) + len(kept) + 1 > self._half:
                self._texts = SuffixAutomaton(), self._texts[0]
            for token in kept:
                self._texts[0].extend(token)
            self._texts[0].extend(SEPARATOR)

    def reader(self) -> CorpusReader:
        """A new reader for one request, which has read nothing yet."""
        return CorpusReader(self)


class CorpusReader:
    """Matches one request's context in a corpus. Several readers can share a corpus, each in its own thread."""

    def __init__(self, corpus: LookupCorpus) -> None:
        self._corpus = corpus
        self._texts: tuple[SuffixAutomaton, ...] = ()
        self._matchers: list[SuffixMatcher] = []

    def read(self, tokens: Sequence[int]) -> None:
        """Reads the next tokens of the context."""
        with self._corpus._lock:
            self._sync()
            for matcher in self._matchers:
                for token in tokens:
                    matcher.extend(token)

    def find(self, drafted: Sequence[int], limit: int) -> tuple[int, int, list[int]]:
        """The longest match of the context extended by `drafted`: its length, its end, and at most `limit` tokens
        that followed it.
        """
        best: tuple[int, int, list[int]] = (0, 0, [])
        with self._corpus._lock:
            self._sync()
            for matcher in self._matchers:
                ahead = matcher.copy() if drafted else matcher
                for token in drafted:
                    ahead.extend(token)
                length, end = ahead.continued()
                if length > best[0]:
                    tokens = ahead.automaton.tokens[end : end + limit].tolist()
                    best = (length, end, tokens[: tokens.index(SEPARATOR)] if SEPARATOR in tokens else tokens)
        return best

    def _sync(self) -> None:
        """Follows the corpus where it has dropped an automaton and started a new one."""
        if self._texts is not self._corpus._texts:
            self._texts = self._corpus._texts
            known = {id(matcher.automaton): matcher for matcher in self._matchers}
            self._matchers = [known.get(id(text)) or SuffixMatcher(text) for text in self._texts]


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier occurrence of the context's last tokens.

    Args:
        length: how many tokens match.
        text: the text that contains it: the context itself or the corpus.
        end: index of the token after it, in the context or in the automaton of the corpus that contains it.
    """

    length: int
    text: Literal["context", "corpus"]
    end: int


class LookupDraft:
    """The lookup drafter of one request, whose context only ever grows.

    It drafts what followed the longest suffix of the context that occurred before, in the context or, if that has a
    longer one, in the corpus. A copy that reaches the end of the context continues with its own beginning: "abcabc" is
    followed by "abcabc…", as further lookups would give if all its tokens were accepted. A copy from the corpus ends
    with its text.

    Args:
        corpus: texts to search besides the context; None searches the context alone. Nothing is added to it here.
        min_match: the shortest match that gives a draft, in tokens.
    """

    def __init__(self, corpus: LookupCorpus | None = None, min_match: int = 2) -> None:
        if min_match < 1:
            raise ValueError(f"a match has at least 1 token, got min_match={min_match}")
        self._own = SuffixAutomaton()
        self._reader = None if corpus is None else corpus.reader()
        self._min_match = min_match

    def match(self, context: Sequence[int], drafted: Sequence[int] = ()) -> Match | None:
        """The longest match with a continuation; None if it is shorter than `min_match`.

        Args:
            context: the context of the last call, extended by any number of tokens.
            drafted: another drafter's tokens after the context; they are matched, but not kept.
        """
        return self._find(context, drafted, 0)[0]

    def propose(self, context: Sequence[int], limit: int, drafted: Sequence[int] = ()) -> Draft:
        """At most `limit` tokens that followed the match of `context` extended by `drafted`; none without a match."""
        match, tokens = self._find(context, drafted, max(limit, 0))
        if match is None or not tokens:
            return Draft()
        return Draft(tuple(tokens), drafter="lookup", match_length=match.length)

    def learn(self, outcome: Outcome) -> None:
        """Does nothing: the next context contains all there is to learn."""

    def _find(self, context: Sequence[int], drafted: Sequence[int], limit: int) -> tuple[Match | None, list[int]]:
        """The match, and at most `limit` tokens that followed it."""
        self._read(context)
        own = SuffixMatcher.at_match(self._own)
        for token in drafted:
            own.extend(token)
        length, end, copied = self._reader.find(drafted, limit) if self._reader is not None else (0, 0, [])
        if max(length, own.length) < self._min_match:
            return None, []
        if length > own.length:
            return Match(length, "corpus", end), copied
        return Match(own.length, "context", own.end), self._copy(own.end, drafted, limit)

    def _read(self, context: Sequence[int]) -> None:
        """Reads the new tokens of the context, after a check that the last few known ones are unchanged."""
        known = len(self._own)
        tail = self._own.tokens[-_TAIL:].tolist()
        assert len(context) >= known, f"the context had {known} tokens and now has {len(context)}"
        assert list(context[known - len(tail) : known]) == tail, f"the context was changed before token {known}"
        new = context[known:]
        for token in new:
            self._own.extend(token)
        if self._reader is not None:
            self._reader.read(new)

    def _copy(self, end: int, drafted: Sequence[int], limit: int) -> list[int]:
        """`limit` tokens from index `end` of the context extended by `drafted`, repeated as often as needed."""
        tokens = self._own.tokens[end : end + limit].tolist()
        tokens.extend(drafted)
        while 0 < len(tokens) < limit:
            tokens.extend(tokens[: limit - len(tokens)])
        return tokens[:limit]
