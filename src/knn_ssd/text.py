"""From token ids to text as they arrive: incremental detokenisation and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what a tokenizer shows for a character whose bytes have not all arrived


class TextStream:
    """The text of one output, token by token.

    Args:
        tokenizer: decodes; special tokens are left out.
        stop: strings that end the output; the text ends before the first of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._window = 0  # decoding starts here: far enough back that the last text has its left context
        self._settled = 0  # tokens before this are in `_text`
        self._text = ""
        self._given = 0
        self.stopped = False

    def push(self, token_id: int) -> bool:
        """Takes a token; whether a stop string is complete with it."""
        self._token_ids.append(token_id)
        settled = self._decode(self._window, self._settled)
        extended = self._decode(self._window, len(self._token_ids))
        if not extended.endswith(_UNFINISHED):
            self._append(extended[len(settled) :])
            if extended != settled:  # a special token leaves no text, and is no left context for what follows
                self._window = self._settled
            self._settled = len(self._token_ids)
        return self.stopped

    def take(self) -> str:
        """Text not given before, without what may be the beginning of a stop string."""
        end = len(self._text) - (0 if self.stopped else self._possible_stop())
        fresh = self._text[self._given : end]
        self._given = max(self._given, end)
        return fresh

    def finish(self) -> str:
        """The rest of the text, once no more tokens come."""
        if not self.stopped:
            settled = self._decode(self._window, self._settled)
            self._append(self._decode(self._window, len(self._token_ids))[len(settled) :])
        fresh = self._text[self._given :]
        self._given = len(self._text)
        return fresh

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._token_ids[start:end], skip_special_tokens=True))

    def _append(self, fresh: str) -> None:
        searched_from = max(0, len(self._text) - max(map(len, self._stop), default=0))
        self._text += fresh
        ends = [at for stop in self._stop if (at := self._text.find(stop, searched_from)) >= 0]
        if ends:
            self._text = self._text[: min(ends)]
            self.stopped = True

    def _possible_stop(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        return max(
            (n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])),
            default=0,
        )
