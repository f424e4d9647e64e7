"""Drafts copied from where the context's last tokens stood before: in the context itself, or in what the same label
was asked and answered earlier. They cost no pass of a model.

Copying from a reference: arXiv 2304.04487; from the prompt: Saxena's prompt look-up decoding; with a suffix automaton,
which finds the *longest* suffix that occurred before rather than one of a fixed length: SAM decoding, arXiv 2411.10666.

What it costs. Reading a token takes amortised constant time, in the context and in the memory alike, and a proposal
takes time in proportion to its length. The memory is two automata over many texts each, one growing and one full: a
context follows two, however many texts there are, a new text costs its own length, nothing is ever rebuilt, and the
oldest goes when the growing one is full, becomes the full one, and the full one is dropped. (An automaton for each
text would cost every context as many steps as there are texts; one automaton cannot forget.) Transitions are kept in
flat arrays of integers, with a dictionary for those few states alone that have more than one.

This module knows token ids, and nothing of models, labels or of whether a draft pays.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from knn_ssd.draft.contract import Draft, Outcome

SEPARATOR = -1  # between texts; no context has it, so no match crosses it, and copies end at it
_VACANT = -2  # in place of a token: this state has no transition yet
_NOWHERE = -1  # in place of a state
_ROOT = 0
_HOPS = 4  # how many links are followed where nothing else bounds the walk
LEAST_MEMORY = 4  # tokens
_TAIL = 8  # how many tokens of what was read before are compared with a context


class SuffixAutomaton:
    """The suffix automaton of a growing text (Blumer et al. 1985), and its longest suffix that occurred earlier.

    A state stands for all strings that occur at the same set of positions: the suffixes of its longest string that
    are longer than its link's. The link of the state of the whole text is therefore the longest suffix that also ends
    at an earlier position: the match comes for nothing.

    A text of n tokens has at most 2n states and 3n transitions. Transitions are never removed, so what copying them
    costs, when a state is split, is bounded by their number; each step of the two walks along links shortens the next
    suffix looked at, which each token lengthens by one. `extend` is thus amortised constant, whatever the vocabulary.

    Each state knows one position where its strings end: where it was first seen, overwritten whenever it is the
    match or one of the next `_HOPS` links after it. It is always an earlier occurrence, and the most recent one unless
    all since then were the ends of much longer matches; to be always exact would cost a logarithm for each token.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens = array("i")
        self._length = array("i", [0])  # of a state's longest string
        self._link = array("i", [_NOWHERE])  # to the state of the longest suffix that also occurs elsewhere
        self._end = array("i", [0])  # index after an occurrence of the state's strings
        self._token = array("i", [_VACANT])  # a state's first transition: on which token,
        self._next = array("i", [_NOWHERE])  # and where to
        self._more: dict[int, dict[int, int]] = {}  # the others, of states that have them
        self._last = _ROOT  # the state of the whole text
        for token in tokens:
            self.extend(token)

    def __len__(self) -> int:
        """How many tokens the text has."""
        return len(self.tokens)

    @property
    def states(self) -> int:
        """How many states there are: at most twice as many as tokens, and the root."""
        return len(self._length)

    @property
    def match_length(self) -> int:
        """Length in tokens of the longest suffix of the text that also occurs ending earlier; it may overlap itself."""
        return self._length[self._match_state()]

    @property
    def match_end(self) -> int:
        """Index of the token after an earlier occurrence of that suffix, mostly the most recent one; 0 without one."""
        return self._end[self._match_state()]

    def extend(self, token: int) -> None:
        """The text goes on with `token`, which is not negative, or with a separator."""
        assert token >= SEPARATOR, f"token ids are not negative, got {token}"
        if token != SEPARATOR:
            self._see_again()
        length, link, token_of, next_of, more = self._length, self._link, self._token, self._next, self._more
        self.tokens.append(token)
        state = self._last
        new = self._last = self._add(length[state] + 1, _ROOT, len(self.tokens))
        while state != _NOWHERE:
            if token_of[state] == token:
                target = next_of[state]
            elif token_of[state] == _VACANT:
                token_of[state], next_of[state], target = token, new, new
            elif state in more:
                target = more[state].setdefault(token, new)
            else:
                more[state], target = {token: new}, new
            if target != new:
                break
            state = link[state]
        else:
            return
        if length[target] != length[state] + 1:
            target = self._split(target, state, token)
        link[new] = target

    def _split(self, whole: int, state: int, token: int) -> int:
        """A state of its own for those strings of `whole` that are no longer than `state`'s and a token."""
        link, token_of, next_of, more = self._link, self._token, self._next, self._more
        part = self._add(self._length[state] + 1, link[whole], self._end[whole])
        token_of[part], next_of[part] = token_of[whole], next_of[whole]
        if whole in more:
            more[part] = more[whole].copy()
        link[whole] = part
        while state != _NOWHERE:
            if token_of[state] == token:
                if next_of[state] != whole:
                    break
                next_of[state] = part
            else:
                if more[state][token] != whole:
                    break
                more[state][token] = part
            state = link[state]
        return part

    def _add(self, length: int, link: int, end: int) -> int:
        self._length.append(length)
        self._link.append(link)
        self._end.append(end)
        self._token.append(_VACANT)
        self._next.append(_NOWHERE)
        return len(self._length) - 1

    def _match_state(self) -> int:
        return max(self._link[self._last], _ROOT)  # an empty text's state is the root, which has no link

    def _see_again(self) -> None:
        """The match is now last seen at the end of the text.

        Noted only as the text goes on, so that a state's end is the text's own end for no strings but those that
        occur nowhere else; and not before a separator, so that an occurrence with a continuation is preferred.
        """
        link, end, now = self._link, self._end, len(self.tokens)
        state = link[self._last]
        for _ in range(_HOPS):
            if state <= _ROOT:  # or nowhere, in an empty text
                return
            end[state] = now
            state = link[state]


class Follower:
    """The longest suffix of one text, read token by token, that occurs in another, whose automaton is given.

    Reading is amortised constant: each step along a link shortens the match, which each token lengthens by one. The
    automaton may grow meanwhile, though not during a call: states that were split are found again along the links.
    What was added is matched from the next token on; a match that it made longer in hindsight is not looked for.

    Args:
        automaton: of the text to search.
    """

    def __init__(self, automaton: SuffixAutomaton) -> None:
        self.automaton = automaton
        self.length = 0  # of the match, in tokens
        self._state = _ROOT

    @classmethod
    def at_match(cls, automaton: SuffixAutomaton) -> Follower:
        """One that has read the automaton's own text, and holds its match with an earlier place."""
        follower = cls(automaton)
        follower._state = automaton._match_state()
        follower.length = automaton.match_length
        return follower

    def copy(self) -> Follower:
        """One that reads on by itself."""
        other = Follower(self.automaton)
        other._state, other.length = self._state, self.length
        return other

    def extend(self, token: int) -> None:
        """The text read goes on with `token`."""
        self._settle()
        text, state = self.automaton, self._state
        while state != _NOWHERE:
            if text._token[state] == token:
                target = text._next[state]
            else:
                more = text._more.get(state)
                target = _NOWHERE if more is None else more.get(token, _NOWHERE)
            if target != _NOWHERE:
                self._state = target
                self.length += 1
                return
            state = text._link[state]
            self.length = text._length[state] if state != _NOWHERE else 0
        self._state = _ROOT

    @property
    def end(self) -> int:
        """Index in the automaton's text of the token after an occurrence of the match, mostly the most recent one."""
        self._settle()
        return self.automaton._end[self._state]

    def continued(self) -> tuple[int, int]:
        """Length and end of the longest match that is known to go on: to stand neither at the end of the text nor
        before a separator; (0, 0) if none of the first few is.
        """
        self._settle()
        text, state, length = self.automaton, self._state, self.length
        for _ in range(_HOPS):
            if state == _ROOT:
                break
            end = text._end[state]
            if end < len(text.tokens) and text.tokens[end] != SEPARATOR:
                return length, end
            state = text._link[state]
            length = text._length[state]
        return 0, 0

    def _settle(self) -> None:
        """Moves to the state that now has the match among its strings, if its former one was split."""
        link, length = self.automaton._link, self.automaton._length
        while self._state != _ROOT and length[link[self._state]] >= self.length:
            self._state = link[self._state]


class Memory:
    """Earlier prompts and outputs of one label, for all requests and threads; the oldest are forgotten.

    A lock is held while a text is added (about as long as a request takes to read as many tokens of its own) and
    while a request reads its last few.

    Args:
        capacity: the most tokens to hold. Texts are forgotten many at once, so that at least half as many stay. Of a
            text that is longer than half, the end is kept. A token takes about 130 bytes in code and prose, at
            most some 220; a request under way holds on to forgotten ones until its next round.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        if capacity < LEAST_MEMORY:
            raise ValueError(f"a memory holds at least {LEAST_MEMORY} tokens, got {capacity}")
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

    def reader(self) -> MemoryReader:
        """A place for one request, which has read nothing yet."""
        return MemoryReader(self)


class MemoryReader:
    """Where one request's context matches a memory. Several may read one memory at once, each in its own thread."""

    def __init__(self, memory: Memory) -> None:
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

    def __init__(self, memory: Memory | None = None, min_match: int = 2) -> None:
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
        return Draft(tuple(tokens), source="lookup", match=match.length)

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
