"""The tools that a request offers: the grammar of a reply that has to call one, and the calls found in a reply."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from knn_ssd.errors import UsageError
from knn_ssd.grammar import Grammar
from knn_ssd.server.call_syntax import WrittenCall
from knn_ssd.server.parameters import Schema
from knn_ssd.server.structured import FieldError, NamedTool, Tool, ToolChoice
from knn_ssd.server.terms import template_of, term_of
from knn_ssd.server.thinking import Thinking, formed, partial_mark
from knn_ssd.server.tool_formats import PYTHON_TAG, ToolFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ToolCallFound:
    """A call in a reply.

    Args:
        id: its id.
        name: the function's name.
        arguments: its arguments, as JSON.
    """

    id: str
    name: str
    arguments: str

    @classmethod
    def of(cls, call: WrittenCall, id_characters: int) -> ToolCallFound:
        """A call as a model wrote it, with a new id of so many characters."""
        digits = uuid.uuid4().hex[:id_characters]
        # A lone surrogate, which UTF-8 does not have, stays the escape as which the model wrote it.
        arguments = json.dumps(call.arguments, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
        return cls(digits if id_characters == 9 else f"call_{digits}", call.name, arguments)

    def json(self) -> dict[str, Any]:
        """The call as in OpenAI's API."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}

    def deltas(self, index: int) -> list[dict[str, Any]]:
        """The call as in a stream of OpenAI's API, where the arguments follow the name."""
        beginning = {**self.json(), "function": {"name": self.name, "arguments": ""}}
        return [{"index": index, **each} for each in (beginning, {"function": {"arguments": self.arguments}})]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools that a request offers, and whether one has to be called.

    Args:
        tools: those that may be called.
        choice: whether one has to be, and which.
        several: whether a reply may call more than one.
        tokenizer: the model's.
    """

    tools: Sequence[Tool]
    choice: ToolChoice
    several: bool
    tokenizer: PreTrainedTokenizerBase

    @property
    def demands_call(self) -> bool:
        """Whether the reply has to call one."""
        return self.choice != "auto"

    @property
    def format(self) -> ToolFormat:
        """How the model writes calls."""
        return ToolFormat.of(template_of(self.tokenizer))

    @property
    def described(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        return [tool.plain() for tool in self.tools]

    @property
    def special_tokens(self) -> dict[int, str]:
        """The special tokens that are marks of calls."""
        return self.format.special_tokens(self.tokenizer)

    def grammar(self, thinking: Thinking | None) -> Grammar | None:
        """The grammar of the reply; None where it may be any text.

        Args:
            thinking: how a reply that has to call one may begin.

        Raises:
            FieldError: the schema of a function's arguments cannot be used.
        """
        functions = {place: tool.function for place, tool in enumerate(self.tools)}
        if isinstance(self.choice, NamedTool):
            functions = {n: each for n, each in functions.items() if each.name == self.choice.function.name}
        elif self.choice == "auto":
            if not any(each.strict for each in functions.values()):
                return None
            free = {"type": "object"}
            functions = {
                n: each if each.strict else each.model_copy(update={"parameters": free})
                for n, each in functions.items()
            }
        several = self.several and not isinstance(self.choice, NamedTool)
        term = term_of(self.tokenizer)
        rules = self.format.rules(functions, term, several=several, or_text=not self.demands_call)
        try:
            return formed(rules, thinking)
        except UsageError as error:
            raise FieldError("tools", error) from error

    def reply(self) -> ToolReply:
        """A reply that begins."""
        schemas = {tool.function.name: tool.function.parameters for tool in self.tools}
        is_strict = any(tool.function.strict for tool in self.tools)
        return ToolReply(self.format, schemas, self.demands_call, several=self.several, only_marked=is_strict)


@dataclass(slots=True)
class ToolReply:
    """The text of one reply that may call tools, as it arrives: what may belong to a call is held back.

    Args:
        format: of the calls.
        schemas: of the arguments of each function that may be called.
        must_call: whether the reply has to call one.
        several: whether it may call more than one; those after the first are left out if not.
        only_marked: whether a call without the format's mark, if it has one, is text: no grammar checked its arguments.
    """

    format: ToolFormat
    schemas: Mapping[str, Schema]
    must_call: bool
    several: bool = True
    only_marked: bool = False
    calls: list[ToolCallFound] = field(default_factory=list)
    _text: str = ""
    _given: int = 0

    def whole(self, text: str) -> str:
        """Finds the calls of a finished reply, and returns its text before them."""
        self._text = text
        return self.finish()

    def push(self, text: str) -> str:
        """Adds text, and returns what is no part of a call."""
        self._text += text
        return self._give(self._certain())

    def finish(self) -> str:
        """Finds the calls, and returns the rest of the text that belongs to none."""
        text, calls = self.format.calls(self._text, self.schemas, only_marked=self.only_marked)
        counted = calls if self.several else calls[:1]
        self.calls = [ToolCallFound.of(call, self.format.id_characters) for call in counted]
        return self._give(len(text))

    def _give(self, end: int) -> str:
        fresh = self._text[self._given : end]
        self._given = max(self._given, end)
        return fresh

    def _certain(self) -> int:
        """How many characters of the text so far are certainly no part of a call."""
        start = self._text.lstrip()
        if self.must_call or start[:1] in ("", "{", "[") or PYTHON_TAG.startswith(start[: len(PYTHON_TAG)]):
            return 0
        mark = self.format.mark
        if not mark:
            return len(self._text)
        place = self._text.find(mark)
        end = place if place >= 0 else len(self._text)
        if place < 0:
            end -= partial_mark(self._text, mark)
        return len(self._text[:end].rstrip())
