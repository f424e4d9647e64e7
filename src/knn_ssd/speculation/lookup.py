"""Drafts copied from where the context's last tokens stood before: in the context itself, or in what the same domain
was asked and answered earlier. They cost no pass of a model.

Copying from a reference: arXiv 2304.04487; from the prompt: Saxena's prompt look-up decoding; with a suffix automaton,
which finds the *longest* suffix that occurred before rather than one of a fixed length: SAM decoding, arXiv 2411.10666.

What it costs. Reading a token takes amortised constant time, in the context and in the memory alike, and a proposal
takes time in proportion to its length. The memory is two automata over many texts each, one growing and one full: a
context follows two, however many texts there are, a new text costs its own length, nothing is ever rebuilt, and the
oldest goes when the growing one is full, becomes the full one, and the full one is dropped. (An automaton for each
text would cost every context as many steps as there are texts; one automaton cannot forget.) Transitions are kept in
flat arrays of integers, with a dictionary for those few states alone that have more than one.

This module knows token ids, and nothing of models, domains or of whether a draft pays.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from knn_ssd.speculation.drafter import Draft, Outcome
from knn_ssd.speculation.suffix_automaton import SEPARATOR, Follower, SuffixAutomaton

MIN_CORPUS_TOKENS = 4  # tokens
_TAIL = 8  # how many tokens of what was read before are compared with a context


class LookupCorpus:
    """Earlier prompts and outputs of one domain, for all requests and threads; the oldest are forgotten.

    A lock is held while a text is added (about as long as a request takes to read as many tokens of its own) and
    while a request reads its last few.

    Args:
        capacity: the most tokens to hold. Texts are forgotten many at once, so that at least half as many stay. Of a
            text that is longer than half, the end is kept. A token takes about 130 bytes in code and prose, at
            most some 220; a request under way holds on to forgotten ones until its next round.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        if capacity < MIN_CORPUS_TOKENS:
            raise ValueError(f"a memory holds at least {MIN_CORPUS_TOKENS} tokens, got {capacity}")
        self._half = capacity // 2
        self._lock = threading.Lock()
        self._texts = SuffixAutomaton(), SuffixAutomaton()  # the newer, which grows, first

    def __len__(self) -> int:
        """How many tokens are held, with one for each text's end."""
        with self._lock:
            return sum(len(text) for text in self._texts)

    def add(self, tokens: Sequence[int]) -> None:
        """Remembers a text: a prompt with its output, or either."""
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
        """A place for one request, which has read nothing yet."""
        return CorpusReader(self)


class CorpusReader:
    """Where one request's context matches a memory. Several may read one memory at once, each in its own thread."""

    def __init__(self, memory: LookupCorpus) -> None:
        self._memory = memory
        self._texts: tuple[SuffixAutomaton, ...] = ()
        self._followers: list[Follower] = []

    def read(self, tokens: Sequence[int]) -> None:
        """The context goes on with these."""
        with self._memory._lock:
            self._keep_up()
            for follower in self._followers:
                for token in tokens:
                    follower.extend(token)

    def find(self, drafted: Sequence[int], limit: int) -> tuple[int, int, list[int]]:
        """The longest match of what was read and `drafted` after it: its length, its end, and at most `limit` tokens
        that came after it.
        """
        best: tuple[int, int, list[int]] = (0, 0, [])
        with self._memory._lock:
            self._keep_up()
            for follower in self._followers:
                ahead = follower.copy() if drafted else follower
                for token in drafted:
                    ahead.extend(token)
                length, end = ahead.continued()
                if length > best[0]:
                    tokens = ahead.automaton.tokens[end : end + limit].tolist()
                    best = (length, end, tokens[: tokens.index(SEPARATOR)] if SEPARATOR in tokens else tokens)
        return best

    def _keep_up(self) -> None:
        """Forgets what the memory forgot, and starts on what is new."""
        if self._texts is not self._memory._texts:
            self._texts = self._memory._texts
            known = {id(follower.automaton): follower for follower in self._followers}
            self._followers = [known.get(id(text)) or Follower(text) for text in self._texts]


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier occurrence of the context's last tokens.

    Args:
        length: how many tokens match.
        text: where it is: the context itself or the memory.
        end: index of the token after it, in the context or in the part of the memory that has it.
    """

    length: int
    text: Literal["context", "memory"]
    end: int


class LookupDraft:
    """Drafts what came after the longest suffix of the context that occurred before, in the context, or in the memory
    where that has a longer one. A source for one request, whose context only ever grows.

    A copy that reaches the end of the context goes on with its own beginning: after "abcabc" come "abcabc…". It is
    what the next look-up would say, were each of the tokens accepted. A copy from the memory ends with its text.

    Args:
        memory: what to search besides the context, if anything. The context is not added to it here.
        min_match: the shortest match worth a draft, in tokens.
    """

    def __init__(self, memory: LookupCorpus | None = None, min_match: int = 2) -> None:
        if min_match < 1:
            raise ValueError(f"a match has at least 1 token, got min_match={min_match}")
        self._own = SuffixAutomaton()
        self._remembered = None if memory is None else memory.reader()
        self._min_match = min_match

    def match(self, context: Sequence[int], drafted: Sequence[int] = ()) -> Match | None:
        """The longest match with a continuation, None under `min_match`.

        Args:
            context: what it was at the last call, with any number of tokens after that.
            drafted: tokens of another source after the context. They are matched, and forgotten again.
        """
        return self._find(context, drafted, 0)[0]

    def propose(self, context: Sequence[int], limit: int, drafted: Sequence[int] = ()) -> Draft:
        """At most `limit` tokens, copied from after the match of `context` and then `drafted`; none without one."""
        match, tokens = self._find(context, drafted, max(limit, 0))
        if match is None or not tokens:
            return Draft()
        return Draft(tuple(tokens), drafter="lookup", match_length=match.length)

    def learn(self, outcome: Outcome) -> None:
        """There is nothing to learn that the context does not say."""

    def _find(self, context: Sequence[int], drafted: Sequence[int], limit: int) -> tuple[Match | None, list[int]]:
        """The match, and at most `limit` tokens after it."""
        self._read(context)
        own = Follower.at_match(self._own)
        for token in drafted:
            own.extend(token)
        length, end, copied = self._remembered.find(drafted, limit) if self._remembered is not None else (0, 0, [])
        if max(length, own.length) < self._min_match:
            return None, []
        if length > own.length:
            return Match(length, "memory", end), copied
        return Match(own.length, "context", own.end), self._copy(own.end, drafted, limit)

    def _read(self, context: Sequence[int]) -> None:
        """Reads what is new in the context. What was read is compared in its last few tokens, which costs little."""
        known = len(self._own)
        tail = self._own.tokens[-_TAIL:].tolist()
        assert len(context) >= known, f"the context had {known} tokens and now has {len(context)}"
        assert list(context[known - len(tail) : known]) == tail, f"the context was changed before token {known}"
        new = context[known:]
        for token in new:
            self._own.extend(token)
        if self._remembered is not None:
            self._remembered.read(new)

    def _copy(self, end: int, drafted: Sequence[int], limit: int) -> list[int]:
        """`limit` tokens from index `end` of the context and `drafted` after it, over and over."""
        tokens = self._own.tokens[end : end + limit].tolist()
        tokens.extend(drafted)
        while 0 < len(tokens) < limit:
            tokens.extend(tokens[: limit - len(tokens)])
        return tokens[:limit]
