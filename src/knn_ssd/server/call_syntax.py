"""How a single tool call is written: its grammar and its reader. `tool_formats` puts marks around it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from knn_ssd.errors import UsageError
from knn_ssd.grammar import json_rule
from knn_ssd.server.parameters import (
    DECODER,
    Schema,
    check_object,
    may_be_text,
    parameter_of,
    parameters_of,
    read_value,
    value_rules,
)
from knn_ssd.server.terms import Term

_NAME = r"([a-zA-Z0-9_.-]+)"


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A call as a model wrote it.

    Args:
        name: the function's name.
        arguments: its arguments.
    """

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReadCalls:
    """What was read at the beginning of a text.

    Args:
        calls: the calls; None stands for one that cannot be read.
        length: the characters that were read.
    """

    calls: Sequence[WrittenCall | None]
    length: int


_UNREADABLE = ReadCalls([None], 0)
_CALL_ID = "[CALL_ID]"  # of Mistral's eleventh tokenizer, which writes an id between name and arguments


class CallSyntax(Protocol):
    """How a single call is written between the marks around it."""

    @property
    def marks(self) -> str:
        """The marks within a call, after each other."""
        ...

    def rules(self, rule: str, name: str, parameters: Schema, term: Term) -> list[str]:
        """The rules of a grammar in which `rule` is a call of a function whose arguments have a schema.

        Args:
            rule: the rule's name.
            name: the function's name.
            parameters: the schema of its arguments.
            term: writes a text as terms of a grammar.

        Raises:
            UsageError: the schema cannot be enforced.
        """
        ...

    def read(self, text: str, schemas: Mapping[str, Schema]) -> ReadCalls:
        """The call that a text begins with.

        Args:
            text: the reply after an opening mark.
            schemas: of the arguments of each function that was offered.
        """
        ...


@dataclass(frozen=True, slots=True)
class JsonCall:
    """A JSON object of the name and the arguments; several may stand in a list.

    Args:
        arguments: the name of the arguments.
    """

    arguments: str = "arguments"
    marks: str = ""

    def rules(self, rule: str, name: str, parameters: Schema, term: Term) -> list[str]:
        head = json.dumps({"name": name})[:-1] + f', "{self.arguments}": '
        return [f'{rule}: {term(head)} {json_rule(parameters)} "}}"']

    def read(self, text: str, schemas: Mapping[str, Schema]) -> ReadCalls:
        value, length = _decoded(text)
        values = value if isinstance(value, list) else [value]
        return ReadCalls([self._call(each) for each in values], length)

    def _call(self, value: Any) -> WrittenCall | None:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        given = [value[key] for key in ("arguments", "parameters") if key in value]
        arguments = _object(given[0]) if given else None
        return None if arguments is None else WrittenCall(value["name"], arguments)


@dataclass(frozen=True, slots=True)
class NamedCall:
    """The name, a mark, and the arguments as JSON.

    Args:
        mark: between name and arguments.
    """

    mark: str

    @property
    def marks(self) -> str:
        return self.mark + _CALL_ID

    def rules(self, rule: str, name: str, parameters: Schema, term: Term) -> list[str]:
        return [f"{rule}: {term(name + self.mark)} {json_rule(parameters)}"]

    def read(self, text: str, schemas: Mapping[str, Schema]) -> ReadCalls:
        call_id = rf"(?:{re.escape(_CALL_ID)}[^\[{{]*)?"
        found = re.match(rf"\s*{_NAME}\s*{call_id}(?:{re.escape(self.mark.strip())})?\s*", text)
        value, length = _decoded(text[found.end() :]) if found else (None, 0)
        if found is None or not isinstance(value, dict):
            return _UNREADABLE
        return ReadCalls([WrittenCall(found[1], value)], found.end() + length)


@dataclass(frozen=True, slots=True)
class ParameterCall:
    """The name, and each argument between marks of its own: text as it is, other values as JSON.

    Args:
        head: before the name.
        after_name: after it.
        key: before an argument's name.
        after_key: between that and the value.
        end: after the value.
        tail: after the last argument.
    """

    head: str
    after_name: str
    key: str
    after_key: str
    end: str
    tail: str

    @property
    def marks(self) -> str:
        return "".join((self.head, self.after_name, self.key, self.after_key, self.end, self.tail))

    def rules(self, rule: str, name: str, parameters: Schema, term: Term) -> list[str]:
        check_object(parameters)
        required = parameters.get("required", [])
        parts, lines = [], []
        for place, (key, schema) in enumerate(parameters_of(parameters).items()):
            if not re.fullmatch(r"[^<>\n]+", key):
                raise UsageError(f"the parameter name {key!r} cannot be written between this model's marks")
            part = f"{rule}_{place}"
            parts.append(part if key in required else f"{part}?")
            lines.append(f"{part}: {term(self.key + key + self.after_key)} {part}_value")
            lines += value_rules(f"{part}_value", schema, parameters, self.end, [self.key])
        if not parts and parameters.get("additionalProperties") is not False:
            parts.append(f"{rule}_any*")
            lines.append(f"{rule}_any: {term(self.key)} /{_NAME}/ {term(self.after_key)} {rule}_any_value")
            lines += value_rules(f"{rule}_any_value", parameter_of(parameters, ""), parameters, self.end, [self.key])
        return [f"{rule}: {term(self.head + name + self.after_name)} {' '.join(parts)} {term(self.tail)}", *lines]

    def read(self, text: str, schemas: Mapping[str, Schema]) -> ReadCalls:
        head = re.match(rf"\s*{_flexible(self.head)}{_NAME}{_flexible(self.after_name)}", text)
        if head is None:
            return _UNREADABLE
        schema, place, arguments = schemas.get(head[1], {}), head.end(), {}
        begin = re.compile(rf"\s*{self._name_pattern}")
        closing = re.compile(_flexible(self.end))
        while found := begin.match(text, place):
            own, start = parameter_of(schema, found[1]), found.end()
            after_json = 0 if may_be_text(own, schema) else _decoded(text, start)[1]
            end = closing.match(text, after_json) if after_json else None  # a text in the JSON may have the mark in it
            if end is None:
                end = closing.search(text, start)
                if end is None or self._has_argument(text[start : end.start()], schemas):
                    return _UNREADABLE
            arguments[found[1]] = read_value(text[start : end.start()], own, schema)
            place = end.end()
        tail = re.compile(rf"\s*{_flexible(self.tail)}").match(text, place)
        return _UNREADABLE if tail is None else ReadCalls([WrittenCall(head[1], arguments)], tail.end())

    @property
    def _name_pattern(self) -> str:
        return rf"{_flexible(self.key)}([^<>]+?){_flexible(self.after_key)}"

    def _has_argument(self, value: str, schemas: Mapping[str, Schema]) -> bool:
        """Whether an argument of a function begins within a value, after which the mark is missing then."""
        names = set(re.findall(self._name_pattern, value))
        return bool(names) and any(names & parameters_of(each).keys() for each in schemas.values())


def _decoded(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON that begins at a place of a text, and the place after it; None and 0 if none begins there."""
    try:
        return DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, 0


def _object(value: Any) -> dict[str, Any] | None:
    """Arguments as an object, which may be written as JSON within a text, or left empty; None if they are no object."""
    if isinstance(value, str) and value:
        decoded, length = _decoded(value.strip())
        value = decoded if length == len(value.strip()) else None
        return value if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {} if value in (None, "") else None


def _flexible(text: str) -> str:
    """A regular expression for a mark: lines around it may be missing, and white space within it may differ."""
    inner = r"\s*".join(map(re.escape, text.split()))
    return r"\n?" * text.startswith("\n") + inner + r"\n?" * text.endswith("\n")
