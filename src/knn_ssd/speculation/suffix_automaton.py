"""The suffix automaton of a growing token sequence, and the longest match of another sequence in it.

It finds the *longest* suffix that occurred before, rather than one of a fixed length (SAM decoding, arXiv 2411.10666).
Transitions are kept in flat arrays of integers, with a dictionary only for the few states that have more than one.
This module knows token ids and nothing else.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

SEPARATOR = -1  # between texts; it is in no context, so no match crosses it, and copies end at it
_VACANT = -2  # instead of a token: the state has no transition yet
_NOWHERE = -1  # instead of a state
_ROOT = 0
_HOPS = 4  # the most links that are followed where nothing else bounds the walk


class SuffixAutomaton:
    """The suffix automaton of a growing text (Blumer et al. 1985), and its longest suffix that occurred earlier.

    A state stands for all strings that occur at the same set of positions: the suffixes of its longest string that
    are longer than its link's. The link of the state of the whole text is therefore the longest suffix that also ends
    at an earlier position: the match needs no search.

    A text of n tokens has at most 2n states and 3n transitions. Transitions are never removed, so the cost of copying
    them when a state is split is bounded by their number; each step of the two walks along links shortens the next
    suffix looked at, which each token lengthens by one. `extend` is thus amortised constant, whatever the vocabulary.

    Each state knows one position where its strings end: where it was first seen, overwritten whenever it is the
    match or one of the next `_HOPS` links after it. It is always an earlier occurrence, and the most recent one unless
    all since then ended much longer matches; always to give the most recent one would cost logarithmic time per token.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens = array("i")
        self._length = array("i", [0])  # of a state's longest string
        self._link = array("i", [_NOWHERE])  # state of the longest suffix that also occurs elsewhere
        self._end = array("i", [0])  # index after an occurrence of the state's strings
        self._token = array("i", [_VACANT])  # token of a state's first transition
        self._next = array("i", [_NOWHERE])  # target of a state's first transition
        self._more: dict[int, dict[int, int]] = {}  # further transitions, of states that have any
        self._last = _ROOT  # the state of the whole text
        for token in tokens:
            self.extend(token)

    def __len__(self) -> int:
        """Length of the text in tokens."""
        return len(self.tokens)

    @property
    def num_states(self) -> int:
        """Number of states: at most two for each token, and the root."""
        return len(self._length)

    @property
    def match_length(self) -> int:
        """Length in tokens of the longest suffix of the text that also ends earlier in it; the two may overlap."""
        return self._length[self._match_state()]

    @property
    def match_end(self) -> int:
        """Index of the token after an earlier occurrence of that suffix, usually the most recent; 0 without one."""
        return self._end[self._match_state()]

    def extend(self, token: int) -> None:
        """Appends `token`, which is not negative, or a separator, to the text."""
        assert token >= SEPARATOR, f"token ids are not negative, got {token}"
        if token != SEPARATOR:
            self._update_ends()
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
        """Splits off a state for those strings of `whole` that are at most one token longer than those of `state`."""
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

    def _update_ends(self) -> None:
        """Sets the end of the current match, and of the next links, to the end of the text.

        This is done only as the text is extended, so that a state's end is the end of the text only for strings that
        occur nowhere else, and not before a separator, so that occurrences with a continuation are preferred.
        """
        link, end, now = self._link, self._end, len(self.tokens)
        state = link[self._last]
        for _ in range(_HOPS):
            if state <= _ROOT:  # or nowhere, in an empty text
                return
            end[state] = now
            state = link[state]


class SuffixMatcher:
    """Finds the longest suffix of one text, read token by token, that occurs in another text.

    Reading takes amortised constant time: each step along a link shortens the match, which each token lengthens by one.
    The automaton may grow between calls: states that were split are found again along the links. Tokens added to it are
    matched from the next token on; a match that they made longer in hindsight is not searched for.

    Args:
        automaton: the automaton of the text to search.
    """

    def __init__(self, automaton: SuffixAutomaton) -> None:
        self.automaton = automaton
        self.length = 0  # of the match in tokens
        self._state = _ROOT

    @classmethod
    def at_match(cls, automaton: SuffixAutomaton) -> SuffixMatcher:
        """A matcher that has read the automaton's own text, and matches an earlier occurrence of its suffix."""
        matcher = cls(automaton)
        matcher._state = automaton._match_state()
        matcher.length = automaton.match_length
        return matcher

    def copy(self) -> SuffixMatcher:
        """An independent copy."""
        other = SuffixMatcher(self.automaton)
        other._state, other.length = self._state, self.length
        return other

    def extend(self, token: int) -> None:
        """Reads the next token."""
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
        """Index in the automaton's text of the token after an occurrence of the match, usually the most recent one."""
        self._settle()
        return self.automaton._end[self._state]

    def continued(self) -> tuple[int, int]:
        """Length and end of the longest match with a known continuation, one that is neither at the end of the text nor
        before a separator; (0, 0) if none of the first few has one.
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
        """Moves to the state that now contains the match, if its former state was split."""
        link, length = self.automaton._link, self.automaton._length
        while self._state != _ROOT and length[link[self._state]] >= self.length:
            self._state = link[self._state]
