"""Tool calls in the formats of model families: how they are demanded by a grammar, and found in a reply.

The format is recognised by the chat template's text:

- Hermes, Qwen: `<tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>`, several after each other;
- Mistral: `[TOOL_CALLS][{"name": …, "arguments": …}]`;
- Llama 3: `{"name": …, "parameters": …}`;
- any other: `{"name": …, "arguments": …}`. Where the template knows no tools, a system message describes them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from knn_ssd.errors import UsageError
from knn_ssd.grammar import Grammar, json_rule
from knn_ssd.server.structured import FieldError, FunctionDefinition, NamedTool, Tool, ToolChoice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PYTHON_TAG = "<|python_tag|>"  # which Llama 3 may write before a call
_INSTRUCTIONS = """\
You may call these functions, which are described as JSON:
{tools}
To call one, reply with a JSON object of its name and its arguments, and with nothing else: \
{{"name": "…", "arguments": {{…}}}}"""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model family writes tool calls.

    Args:
        opening: what a call begins with, a special token's text or plain text.
        closing: what it ends with.
        gap: between opening, call and closing.
        is_list: whether all calls stand in one list.
        arguments: the name of the arguments.
        id_characters: length of a call's id; the templates of Mistral's models ask for nine.
        is_described: whether a system message has to describe the tools.
    """

    opening: str = ""
    closing: str = ""
    gap: str = ""
    is_list: bool = False
    arguments: str = "arguments"
    id_characters: int = 24
    is_described: bool = False

    @property
    def can_repeat(self) -> bool:
        """Whether a reply can have several calls."""
        return self.is_list or bool(self.closing)

    @classmethod
    def of(cls, template: str) -> ToolFormat:
        """The format that a chat template's text shows."""
        if "<tool_call>" in template and "<function=" not in template:
            return cls("<tool_call>", "</tool_call>", "\n")
        if "[TOOL_CALLS]" in template:
            return cls("[TOOL_CALLS]", is_list=True, id_characters=9)
        if _PYTHON_TAG in template or '"parameters": dictionary' in template:
            return cls(arguments="parameters")
        return cls(is_described="tools" not in template)

    def messages(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[Mapping[str, Any]]:
        """The conversation, with a description of the tools where the template gives none."""
        if not self.is_described:
            return list(messages)
        text = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools))
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": text}, *messages]
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]

    def grammar(
        self,
        functions: Mapping[int, FunctionDefinition],
        tokenizer: PreTrainedTokenizerBase,
        *,
        several: bool,
        or_text: bool,
    ) -> Grammar:
        """The grammar of a reply that calls one of some functions.

        Args:
            functions: those that may be called, by their place in the request.
            tokenizer: knows which of the format's marks are special tokens.
            several: whether it may call more than one.
            or_text: whether the reply may be free text, and calls may follow it.

        Raises:
            FieldError: the schema of a function's arguments cannot be used.
        """
        bodies = [f"body_{place}: {self._body(each, place)}" for place, each in functions.items()]
        names = " | ".join(f"body_{place}" for place in functions)
        gap = json.dumps(self.gap) if self.gap else ""
        opening, closing = (_mark(text, tokenizer) for text in (self.opening, self.closing))
        rest = '"[" body (", " body)* "]"' if self.is_list and several else '"[" body "]"' if self.is_list else "body"
        call = f"{gap} {rest} {gap} {closing}"
        repeats = several and bool(self.closing)
        if not or_text:
            more = f' ("\\n" {opening} {call})*' if repeats else ""
            lines = [f"start: {opening} {call}{more}"]
        elif self.opening:
            lazy = "" if opening.startswith("<") else "[lazy]"  # the first mark ends the text, unless it is a token
            lines = [f"start: (opened {call}){'*' if repeats else '?'} TEXT", f"opened{lazy}: TEXT {opening}"]
            lines.append(r"TEXT: /(.|\n)*/")
        else:
            lines = [f"start: {call} | TEXT", r"TEXT: /([^{\s](.|\n)*)?/"]
        try:
            return Grammar.lark("\n".join(["%llguidance {}", *lines, f"body: {names}", *bodies]))
        except UsageError as error:
            raise FieldError("tools", error) from error

    def _body(self, function: FunctionDefinition, place: int) -> str:
        head = json.dumps(json.dumps({"name": function.name})[:-1] + f', "{self.arguments}": ')
        try:
            Grammar.json_schema(function.parameters)
            return f'{head} {json_rule(function.parameters)} "}}"'
        except UsageError as error:
            raise FieldError(f"tools.{place}.function.parameters", error) from error

    def calls(self, text: str, names: Sequence[str]) -> tuple[str, list[ToolCallFound]]:
        """The text before the calls of a reply, and the calls; the whole text and none where it has none.

        A call of a function that was not offered is text. Where the family's own format is not found, a reply that is
        nothing but a JSON object with name and arguments is a call, too.
        """
        before, found = self._marked(text) if self.opening and self.opening in text else ("", _values(text))
        calls = [self._call(value) for value in found]
        if not calls or any(call is None or call.name not in names for call in calls):
            return text, []
        return before.rstrip(), [call for call in calls if call is not None]

    def _marked(self, text: str) -> tuple[str, list[Any]]:
        """The text before the first mark, and the JSON after each mark; None where there is none."""
        first = place = text.find(self.opening)
        found: list[Any] = []
        while place >= 0:
            rest = text[place + len(self.opening) :].lstrip()
            value, length = _decoded(rest)
            found += value if isinstance(value, list) else [value]
            place = text.find(self.opening, len(text) - len(rest) + length)
        return text[:first], found

    def _call(self, value: Any) -> ToolCallFound | None:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(arguments, str | dict):
            return None
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        digits = uuid.uuid4().hex[: self.id_characters]
        return ToolCallFound(digits if self.id_characters == 9 else f"call_{digits}", value["name"], written)


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

    def json(self) -> dict[str, Any]:
        """The call as in OpenAI's API."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


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
    def format(self) -> ToolFormat:
        """How the model writes calls."""
        return ToolFormat.of(str(self.tokenizer.chat_template or ""))

    @property
    def described(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        return [tool.plain() for tool in self.tools]

    def grammar(self) -> Grammar | None:
        """The grammar of the reply; None where it may be any text.

        Raises:
            FieldError: the schema of a function's arguments cannot be used.
        """
        functions = {place: tool.function for place, tool in enumerate(self.tools)}
        if isinstance(self.choice, NamedTool):
            functions = {n: each for n, each in functions.items() if each.name == self.choice.function.name}
            return self.format.grammar(functions, self.tokenizer, several=False, or_text=False)
        if self.choice == "required":
            return self.format.grammar(functions, self.tokenizer, several=self.several, or_text=False)
        if not any(each.strict for each in functions.values()):
            return None
        free = {"type": "object"}
        functions = {
            n: each if each.strict else each.model_copy(update={"parameters": free}) for n, each in functions.items()
        }
        return self.format.grammar(functions, self.tokenizer, several=self.several, or_text=True)

    def reply(self) -> ToolReply:
        """A reply that begins."""
        return ToolReply(self.format, [tool.function.name for tool in self.tools], self.choice != "auto")


@dataclass(slots=True)
class ToolReply:
    """The text of one reply that may call tools, as it arrives: what may belong to a call is held back.

    Args:
        format: of the calls.
        names: the functions that may be called.
        must_call: whether the reply has to call one.
    """

    format: ToolFormat
    names: Sequence[str]
    must_call: bool
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
        text, self.calls = self.format.calls(self._text, self.names)
        return self._give(len(text))

    def _give(self, end: int) -> str:
        fresh = self._text[self._given : end]
        self._given = max(self._given, end)
        return fresh

    def _certain(self) -> int:
        """How many characters of the text so far are certainly no part of a call."""
        start = self._text.lstrip()
        if self.must_call or start[:1] in ("", "{", "[") or _PYTHON_TAG.startswith(start[: len(_PYTHON_TAG)]):
            return 0
        mark = self.format.opening
        if not mark:
            return len(self._text)
        place = self._text.find(mark)
        end = place if place >= 0 else len(self._text)
        if place < 0:
            end -= next((n for n in range(len(mark) - 1, 0, -1) if self._text.endswith(mark[:n])), 0)
        return len(self._text[:end].rstrip())


def _values(text: str) -> list[Any]:
    """The JSON objects that a text consists of: one, those of a list, or several divided by semicolons or lines."""
    found: list[Any] = []
    rest = text.strip().removeprefix(_PYTHON_TAG).strip()
    while rest:
        value, length = _decoded(rest)
        if not length:
            return []
        found += value if isinstance(value, list) else [value]
        rest = rest[length:].strip().removeprefix(";").strip()
    return found


def _decoded(text: str) -> tuple[Any, int]:
    """The JSON that a text begins with, and its length; None and 0 if it begins with none."""
    try:
        return json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0


def _mark(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A mark of a format as a term of a grammar: a special token by its id, other text as it is."""
    if not text:
        return ""
    for token, each in tokenizer.added_tokens_decoder.items():
        if each.special and each.content == text:
            return f"<[{token}]>"
    return json.dumps(text)
