"""Finds a stop string in a text that grows, token by token. This module knows nothing of tokens."""

from __future__ import annotations


class StopMatcher:
    """Looks for one stop string in a text that grows, in time linear in the text (Knuth, Morris and Pratt, 1977).

    Attributes:
        matched: length of the longest suffix of the text that is a prefix of the stop string.
    """

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._borders = [0, 0]  # of each prefix, its longest proper suffix that is a prefix; as far as was needed
        self.matched = 0

    def push(self, fresh: str) -> int | None:
        """Adds text; returns where the first stop string begins that is complete with it, relative to this text."""
        first = None
        for place, character in enumerate(fresh, start=1):
            while self.matched and self._stop[self.matched] != character:
                self.matched = self._border(self.matched)
            self.matched += self._stop[self.matched] == character
            if self.matched == len(self._stop):
                first = place - self.matched if first is None else first
                self.matched = self._border(self.matched)
        return first

    def _border(self, length: int) -> int:
        while len(self._borders) <= length:
            last = len(self._borders) - 1
            border, character = self._borders[last], self._stop[last]
            while border and self._stop[border] != character:
                border = self._borders[border]
            self._borders.append(border + (self._stop[border] == character))
        return self._borders[length]
