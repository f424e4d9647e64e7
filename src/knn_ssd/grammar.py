"""What an output must look like: JSON of a schema, any JSON object, or a grammar. Knows nothing of models and tokens.

The grammars are those of llguidance (https://github.com/guidance-ai/llguidance), which compiles them lazily, gives the
mask of a position in microseconds, and knows which tokens a grammar forces.

JSON is written on one line, with a space after each comma and colon, as `json.dumps` writes it. So most of what lies
between two values is forced, and a model cannot lose itself in white space.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from knn_ssd.checks import require, require_kind
from knn_ssd.errors import UsageError

MOST_CHARACTERS = 200_000  # of a grammar, all schemas in it included
MOST_SCHEMA_CHARACTERS = 100_000
MOST_SCHEMA_LEVELS = 500  # of all definitions together: what refers to what is compiled recursively
MOST_MULTIPLE = 10_000  # least common multiple of all `multipleOf`: an automaton has as many states

_JSON_STYLE: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an output must look like; made by one of its class methods.

    Args:
        source: the grammar as llguidance takes it.

    Raises:
        UsageError: a grammar that cannot be used, with llguidance's own sentence.
    """

    source: str

    def __post_init__(self) -> None:
        require_kind("a grammar's source", self.source, str, "text")
        _require_unicode("a grammar's source", self.source)
        length = len(self.source)
        require(length <= MOST_CHARACTERS, f"a grammar may have {MOST_CHARACTERS} characters", length)
        is_error, messages = grammar_library().LLMatcher.validate_grammar_with_warnings(self.source)
        if is_error:
            raise UsageError(f"the grammar cannot be used: {library_sentence(messages[0])}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that is valid by a schema, with the properties of an object in the schema's order.

        A keyword that is part of JSON Schema and cannot be enforced is refused; which ones can be is documented at
        https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md.

        Args:
            schema: a JSON Schema (draft 2020-12 or earlier), as an object or as its text.

        Raises:
            UsageError: a schema that is none, that is too large, or that cannot be enforced.
        """
        decoded = _decoded(schema)
        try:
            return cls(grammar_library().LLMatcher.grammar_from_json_schema(decoded, overrides=_JSON_STYLE))
        except UsageError as error:
            raise UsageError(error.message.replace("the grammar", "the JSON schema", 1)) from None

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A context-free grammar in llguidance's variant of Lark's syntax.

        Raises:
            UsageError: the text is no such grammar.
        """
        require_kind("a grammar", text, str, "text")
        _require_unicode("a grammar", text)
        return cls(grammar_library().LLMatcher.grammar_from_lark(text))


def grammar_library() -> Any:
    """The module `llguidance`.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise UsageError("structured output needs the package llguidance", "pip install knn-ssd[structured]") from error
    return llguidance


def json_rule(schema: Mapping[str, Any]) -> str:
    """A schema as a term of a Lark grammar.

    Raises:
        UsageError: as in `Grammar.json_schema`.
    """
    return f"%json {json.dumps({**_decoded(schema), 'x-guidance': _JSON_STYLE})}"


def _decoded(schema: Mapping[str, Any] | str) -> dict[str, Any]:
    """The schema as an object, within what can be compiled in reasonable time and depth."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        require(
            len(text) <= MOST_SCHEMA_CHARACTERS, f"a schema may have {MOST_SCHEMA_CHARACTERS} characters", len(text)
        )
        decoded = json.loads(text)
        _require_unicode("a JSON schema", json.dumps(decoded, ensure_ascii=False))
        levels = _levels(decoded)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UsageError(f"the JSON schema cannot be read: {reason}") from error
    require_kind("a JSON schema", decoded, dict, "an object")
    if "x-guidance" in decoded:
        raise UsageError("the JSON schema has 'x-guidance', which is not supported", "Leave it out.")
    definitions = [part for name in ("$defs", "definitions") for part in _parts(decoded.get(name))]
    levels += sum(map(_levels, definitions))
    require(levels <= MOST_SCHEMA_LEVELS, f"a schema may have {MOST_SCHEMA_LEVELS} levels in all definitions", levels)
    multiple = math.lcm(*map(_digits, _multiples(decoded)))
    require(multiple <= MOST_MULTIPLE, f"all multipleOf may have the common multiple {MOST_MULTIPLE}", multiple)
    return dict(decoded)


def _require_unicode(name: str, text: str) -> None:
    """Raises a `UsageError` for text with a lone surrogate, which no output can have."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} must be Unicode text, got half a character ({error})", "Leave it out.") from error


def _parts(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _levels(value: Any) -> int:
    """How deeply a value is nested."""
    return 1 + max(map(_levels, _parts(value)), default=0)


def _multiples(value: Any) -> Iterator[Any]:
    if isinstance(value, dict) and "multipleOf" in value:
        yield value["multipleOf"]
    for part in _parts(value):
        yield from _multiples(part)


def _digits(multiple: Any) -> int:
    """The digits of a number without its decimal point; 1 for what is no number, which the library refuses."""
    try:
        digits = Decimal(str(multiple)).normalize().as_tuple()
    except InvalidOperation:
        return 1
    zeros = digits.exponent if isinstance(digits.exponent, int) and 0 < digits.exponent < 20 else 0
    return int("".join(map(str, digits.digits)) or 0) * 10**zeros or 1


def library_sentence(message: str) -> str:
    """What a message of the library says, without the state of its parser."""
    return message.partition("\n<state>")[0].strip()
