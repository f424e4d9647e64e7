"""The messages of a conversation as clients send them, tool calls included, and as chat templates take them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_JOINS_ARGUMENTS = re.compile(r"""[+~]\s*(?:\w[\w.'"\[\]]*)?\barguments\b(?!['"\]]*\s*\|)""")  # without a filter


class Strict(BaseModel):
    """A JSON object without unknown names."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Drops names whose value is null, which asks for the default, and all unknown names except the first.

        The first is reported; reporting thousands would take seconds.
        """
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        unknown = next((name for name in given if name not in cls.model_fields), None)
        return {name: value for name, value in given.items() if name in cls.model_fields or name == unknown}


class TextPart(Strict):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None


class ToolFunction(Strict):
    """The function that an assistant called: its name, and its arguments as JSON."""

    name: str
    arguments: str | dict[str, Any] = "{}"

    def plain(self) -> dict[str, Any]:
        """The function as chat templates take it: with its arguments as an object, where they are one."""
        arguments = self.arguments
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):
                decoded = json.loads(arguments or "{}")
                arguments = decoded if isinstance(decoded, dict) else arguments
        return {"name": self.name, "arguments": arguments}


class ToolCall(Strict):
    """A tool call of an earlier answer."""

    id: str = ""
    type: Literal["function"] = "function"
    function: ToolFunction
    index: int | None = None

    def plain(self) -> dict[str, Any]:
        """The call as chat templates take it."""
        return {"id": self.id, "type": self.type, "function": self.function.plain()}


class Message(Strict):
    """One message of a conversation. What only describes it to other programs changes no prompt and is accepted."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    tool_calls: list[ToolCall] = Field([], max_length=1000)
    tool_call_id: str | None = None
    name: str | None = None
    annotations: Any = None
    cache_control: Any = None
    id: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    refusal: Any = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.role not in ("assistant", "tool") and "content" not in self.model_fields_set:
            raise ValueError(f"a message of the {self.role} needs its content")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.role == "tool":
            message |= {"tool_call_id": self.tool_call_id or ""} | ({"name": self.name} if self.name else {})
        return message


def with_arguments_for(template: str, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages whose calls have their arguments as JSON text where a chat template joins them to text, as DeepSeek's.

    Args:
        template: the chat template's text.
        messages: the messages, with arguments as objects.
    """
    if not _JOINS_ARGUMENTS.search(template):
        return list(messages)
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
