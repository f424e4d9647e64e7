"""The text of a reply as it arrives, divided into thinking, content and tool calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from knn_ssd.outputs import Chunk
from knn_ssd.server.thinking import CLOSING, OPENING, Thinking, partial_mark
from knn_ssd.server.tool_calls import ToolReply


@dataclass(frozen=True, slots=True)
class ReplyPart:
    """What became certain of a reply.

    Args:
        reasoning: text of its thinking.
        content: text of its content.
    """

    reasoning: str = ""
    content: str = ""


class _Phase(Enum):
    BEGINNING = auto()  # thinking may follow
    THINKING = auto()
    GAP = auto()  # white space between thinking and content
    CONTENT = auto()


@dataclass(slots=True)
class ReplyText:
    """The text of one reply.

    Args:
        thinking: how it may begin with thinking, which is kept apart from its content; None if it may not.
        tools: finds its tool calls; None where it may not call any.
        special: the special tokens that are marks in it, which a text without special tokens lacks.

    Attributes:
        reasoning: its thinking so far.
        content: its content so far.
    """

    thinking: Thinking | None = None
    tools: ToolReply | None = None
    special: Mapping[int, str] = field(default_factory=dict)
    reasoning: str = ""
    content: str = ""
    _held: str = ""
    _received: int = 0  # characters of the text, without special tokens
    _marks: list[tuple[int, str]] = field(default_factory=list)  # that follow so many of them, and are not added yet
    _phase: _Phase = _Phase.CONTENT

    def __post_init__(self) -> None:
        if self.thinking is not None:
            self._phase = _Phase.THINKING if self.thinking.is_open else _Phase.BEGINNING

    def push(self, chunk: Chunk) -> ReplyPart:
        """Adds a round, and returns what is certain with it."""
        part = self._divide(self._with_marks(chunk), is_end=False)
        return self._add(part.reasoning, part.content if self.tools is None else self.tools.push(part.content))

    def finish(self) -> ReplyPart:
        """Returns the rest, once all tool calls were found."""
        part = self._divide("", is_end=True)
        if self.tools is None:
            return self._add(part.reasoning, part.content)
        return self._add(part.reasoning, self.tools.push(part.content) + self.tools.finish())

    def _with_marks(self, chunk: Chunk) -> str:
        """The text that became final, with each mark after all text of the tokens before it, which may come later."""
        place = self._received
        for token, piece, held in zip(chunk.round.tokens, chunk.pieces, chunk.held, strict=True):
            place += len(piece)
            if token in self.special:
                self._marks.append((place + held, self.special[token]))
        parts, rest = [], chunk.text
        while self._marks and self._marks[0][0] <= place:
            end, mark = self._marks.pop(0)
            parts += [rest[: end - self._received], mark]
            rest, self._received = rest[end - self._received :], end
        self._received = place
        return "".join([*parts, rest])

    def _add(self, reasoning: str, content: str) -> ReplyPart:
        self.reasoning += reasoning
        self.content += content
        return ReplyPart(reasoning, content)

    def _divide(self, text: str, *, is_end: bool) -> ReplyPart:
        self._held += text
        if self._phase is _Phase.BEGINNING:
            self._begin(is_end)
        reasoning = self._think(is_end) if self._phase is _Phase.THINKING else ""
        if self._phase is _Phase.GAP:
            self._held = self._held.lstrip()
            self._phase = _Phase.CONTENT if self._held else _Phase.GAP
        content = ""
        if self._phase is _Phase.CONTENT:
            content, self._held = self._held, ""
        return ReplyPart(reasoning, content)

    def _begin(self, is_end: bool) -> None:
        start = self._held.lstrip()
        if start.startswith(OPENING):
            self._phase, self._held = _Phase.THINKING, start[len(OPENING) :]
        elif is_end or not OPENING.startswith(start):
            self._phase = _Phase.CONTENT

    def _think(self, is_end: bool) -> str:
        reasoning, closing, rest = self._held.partition(CLOSING)
        if closing:
            self._phase, self._held = _Phase.GAP, rest
            return reasoning
        certain = len(reasoning) - (0 if is_end else partial_mark(reasoning, CLOSING))
        self._held = reasoning[certain:]
        return reasoning[:certain]
