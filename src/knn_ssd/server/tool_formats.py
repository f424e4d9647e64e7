"""How model families write tool calls. Each format is described once: its grammar and its reader follow from that.

The format is recognised by the chat template's text; `docs/serving.md` lists them. Where the template knows no tools, a
system message describes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError

from knn_ssd.errors import UsageError
from knn_ssd.grammar import Grammar
from knn_ssd.server.call_syntax import CallSyntax, JsonCall, NamedCall, ParameterCall, WrittenCall
from knn_ssd.server.parameters import Schema
from knn_ssd.server.structured import FieldError, FunctionDefinition
from knn_ssd.server.terms import Term, special_tokens, without
from knn_ssd.server.thinking import NOT_THINKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PYTHON_TAG = "<|python_tag|>"  # which Llama 3 may write before a call
_INSTRUCTIONS = """\
You may call these functions, which are described as JSON:
{tools}
To call one, reply with a JSON object of its name and its arguments, and with nothing else: \
{{"name": "…", "arguments": {{…}}}}"""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model family writes tool calls.

    Args:
        call: how a single call is written.
        begin: before all calls.
        end: after all calls.
        opening: before each call.
        closing: after each call.
        between: between two calls.
        id_characters: length of a call's id; the templates of Mistral's models ask for nine.
        is_described: whether a system message has to describe the tools.
    """

    call: CallSyntax = field(default_factory=JsonCall)
    begin: str = ""
    end: str = ""
    opening: str = ""
    closing: str = ""
    between: str = ""
    id_characters: int = 24
    is_described: bool = False

    @classmethod
    def of(cls, template: str) -> ToolFormat:
        """The format that a chat template's text shows; the plain one where the template cannot describe tools."""
        if not takes_tools(template):
            return cls(is_described=True)
        return next((form for marks, form in _FORMATS if all(mark in template for mark in marks)), cls())

    @property
    def mark(self) -> str:
        """What a call is recognised by within a text; empty where a call is the whole reply."""
        return (self.begin.removesuffix("[") or self.opening).strip()

    def special_tokens(self, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
        """The special tokens that are part of the format, which a text without special tokens lacks."""
        marks = "".join((self.begin, self.end, self.opening, self.closing, self.call.marks))
        return {token: text for text, token in special_tokens(tokenizer).items() if text in marks}

    def messages(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[Mapping[str, Any]]:
        """The conversation, with a description of the tools, and calls as it asks for, where the template has none."""
        if not self.is_described:
            return list(messages)
        text = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools))
        written = [_with_calls_as_text(message) for message in messages]
        if written[0]["role"] != "system":
            return [{"role": "system", "content": text}, *written]
        return [{**written[0], "content": f"{written[0]['content']}\n\n{text}"}, *written[1:]]

    def rules(
        self,
        functions: Mapping[int, FunctionDefinition],
        term: Term,
        *,
        several: bool,
        or_text: bool,
    ) -> list[str]:
        """The rules of a grammar in which `form` is a reply that calls some functions.

        Args:
            functions: those that may be called, by their place in the request.
            term: writes a text as terms of a grammar.
            several: whether the reply may call more than one.
            or_text: whether it may be free text, and calls may follow it.

        Raises:
            FieldError: the schema of a function's arguments cannot be used.
        """
        lines = [line for place, each in functions.items() for line in self._call_rules(each, place, term)]
        lines.append(f"call: {' | '.join(f'call_{place}' for place in functions)}")
        rest = term((self.begin or self.opening)[len(self.mark) :])
        if self.begin:
            more = f"({term(self.between)} one)*" if several else ""
            lines += [
                f"block: {rest} one {more} {term(self.end)}",
                f"one: {term(self.opening)} call {term(self.closing)}",
            ]
        else:
            lines.append(f"block: {rest} call {term(self.closing)}")
        repeats = several and bool(self.opening) and not self.begin
        mark = term(self.mark)
        if not or_text:
            more = f"({term(self.between)} {mark} block)*" if repeats else ""
            return [f"form: {mark} block {more}", *lines]
        lines.append(f"TEXT: {self._free_text()} & {NOT_THINKING}")
        if not self.mark:
            return ["form: block | TEXT", *lines]
        lazy = "" if mark.startswith("<[") else "[lazy]"  # the first mark ends the text, unless it is a token
        return [f"form: (opened block){'*' if repeats else '?'} TEXT", f"opened{lazy}: TEXT {mark}", *lines]

    def _free_text(self) -> str:
        """A terminal for text in which `calls` finds no call."""
        if self.mark:
            return without(self.mark, self.opening.strip() or self.mark)
        return rf"/([^{{\[\s\x1c-\x1f](.|\n)*)?/ & ~/{re.escape(PYTHON_TAG)}(.|\n)*/"

    def _call_rules(self, function: FunctionDefinition, place: int, term: Term) -> list[str]:
        try:
            Grammar.json_schema(function.parameters)
            return self.call.rules(f"call_{place}", function.name, function.parameters, term)
        except UsageError as error:
            raise FieldError(f"tools.{place}.function.parameters", error) from error

    def calls(
        self, text: str, schemas: Mapping[str, Schema], *, only_marked: bool = False
    ) -> tuple[str, list[WrittenCall]]:
        """The text before the calls of a reply, and the calls; the whole text and none where it has none.

        Where one call cannot be read, or is of a function that was not offered, the whole reply is text. Where the
        family's own format is not found, a reply that is nothing but a JSON object with name and arguments is a call,
        too.

        Args:
            text: the reply.
            schemas: of the arguments of each function that was offered.
            only_marked: whether a call without the format's mark, if it has one, is text.
        """
        before, found = "", list[WrittenCall | None]()
        if self.mark and self.mark in text:
            before, found = self._marked(text, schemas)
        elif not (self.mark and only_marked):
            found = _unmarked(text)
        calls = [call for call in found if call is not None and call.name in schemas]
        if not calls or len(calls) < len(found):
            return text, []
        return before.rstrip(), calls

    def _marked(self, text: str, schemas: Mapping[str, Schema]) -> tuple[str, list[WrittenCall | None]]:
        """The text before the first mark, and the call after each, up to the first that cannot be read."""
        before, _, rest = text.partition(self.mark)
        opening = self.opening.strip() or self.mark
        if self.begin and self.opening:
            rest = rest.partition(opening)[2]
        found: list[WrittenCall | None] = []
        while True:
            read = self.call.read(rest.lstrip(), schemas)
            found += read.calls
            _, again, rest = rest.lstrip()[read.length :].partition(opening)
            if not again or None in read.calls:
                return before, found


_PARAMETERS = ParameterCall("<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n", "</function>")
_SEED_PARAMETERS = ParameterCall("<function=", ">\n", "<parameter=", ">", "</parameter>\n", "</function>")
_GLM_PARAMETERS = ParameterCall("", "\n", "<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n", "</tool_call>")
_HERMES = ToolFormat(opening="<tool_call>\n", closing="\n</tool_call>", between="\n")
_DEEPSEEK_V31 = ToolFormat(
    NamedCall("<｜tool▁sep｜>"),
    begin="<｜tool▁calls▁begin｜>",
    opening="<｜tool▁call▁begin｜>",
    closing="<｜tool▁call▁end｜>",
    end="<｜tool▁calls▁end｜>",
)
_DEEPSEEK_V3 = replace(
    _DEEPSEEK_V31,
    call=NamedCall("\n```json\n"),
    opening="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    closing="\n```<｜tool▁call▁end｜>",
    between="\n",
)
_FORMATS: Sequence[tuple[Sequence[str], ToolFormat]] = (  # the first one of which all marks are in the template
    (
        ["<seed:tool_call>"],
        replace(_HERMES, call=_SEED_PARAMETERS, opening="<seed:tool_call>\n", closing="\n</seed:tool_call>"),
    ),
    (["<tool_call>", "<arg_key>"], ToolFormat(_GLM_PARAMETERS, opening="<tool_call>", between="\n")),
    (["<tool_call>", "<parameter="], replace(_HERMES, call=_PARAMETERS)),
    (["<tool_call>"], _HERMES),
    (["[TOOL_CALLS]", "[ARGS]"], ToolFormat(NamedCall("[ARGS]"), opening="[TOOL_CALLS]", id_characters=9)),
    (["[TOOL_CALLS]"], ToolFormat(begin="[TOOL_CALLS][", between=", ", end="]", id_characters=9)),
    (["<|tool_call|>"], ToolFormat(begin="<|tool_call|>[", between=", ", end="]")),
    (["<｜tool▁sep｜>", "```json"], _DEEPSEEK_V3),
    (["<｜tool▁sep｜>"], _DEEPSEEK_V31),
    ([PYTHON_TAG], ToolFormat(JsonCall("parameters"))),
    (['"parameters": dictionary'], ToolFormat(JsonCall("parameters"))),
)


@cache
def takes_tools(template: str) -> bool:
    """Whether a chat template reads the variable `tools`; `message.tools` and a text with the word are others."""
    try:
        tokens = [(kind, name) for _, kind, name in Environment().lex(template) if kind != "whitespace"]
    except TemplateError:  # the template cannot be applied either
        return False
    return any(this == ("name", "tools") and before != ("operator", ".") for before, this in pairwise(tokens))


def _with_calls_as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose calls are part of its content, as `_INSTRUCTIONS` asks for them."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, (message["content"], *calls)))}


def _unmarked(text: str) -> list[WrittenCall | None]:
    """The calls that a text consists of: a JSON object, a list, or several divided by semicolons or lines."""
    found: list[WrittenCall | None] = []
    rest = text.strip().removeprefix(PYTHON_TAG).strip()
    while rest:
        read = JsonCall().read(rest, {})
        if not read.length or None in read.calls:
            return []
        found += read.calls
        rest = rest[read.length :].strip().removeprefix(";").strip()
    return found
