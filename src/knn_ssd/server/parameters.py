"""Arguments that a model writes one by one, each between marks, and text without quotes, as Qwen3-Coder does.

Knows how a schema's values are written so: their grammar, and what a written value means.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from knn_ssd.errors import UsageError
from knn_ssd.grammar import json_rule
from knn_ssd.server.terms import quoted, without

_NOTES = {"title", "description", "default", "examples", "deprecated", "$comment", "$defs", "definitions"}
_ANNOTATIONS = {"type", *_NOTES}
_LISTED = {"enum", "const"}
_TEXT_KEYWORDS = {"minLength", "maxLength", "pattern"}
_OBJECT_KEYWORDS = {"properties", "required", "additionalProperties", "$schema", "$id"}
_NOT_TEXT = {  # keywords of other values
    *("properties", "items", "additionalProperties", "prefixItems"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_MOST_ALTERNATIVES = 100  # of a value: schemas that are looked at, references included
_ANY = r"(.|\n)*"
_PYTHON = {"True": True, "False": False, "None": None}  # as templates write them without `tojson`

Schema = Mapping[str, Any]


def parameters_of(schema: Schema) -> dict[str, Any]:
    """The schema of each parameter that an object's schema names."""
    names = _mapping(schema.get("properties"))
    required = schema.get("required")
    listed = [name for name in (required if isinstance(required, list) else []) if isinstance(name, str)]
    return {**names, **{name: parameter_of(schema, name) for name in listed if name not in names}}


def parameter_of(schema: Schema, name: str) -> Any:
    """The schema of one parameter; of one that is not named, that of additional properties."""
    return _mapping(schema.get("properties")).get(name, _mapping(schema.get("additionalProperties")))


def check_object(schema: Schema) -> None:
    """Raises a `UsageError` for what an object's schema has that cannot be enforced if its values are written apart."""
    _refuse_others(schema, _OBJECT_KEYWORDS)
    _check_references(schema)


def _check_references(part: Any) -> None:
    """Raises a `UsageError` for a reference to other than a definition: a value's grammar has no other part in it."""
    if isinstance(part, Mapping):
        reference = part.get("$ref")
        if isinstance(reference, str) and not reference.startswith(("#/$defs/", "#/definitions/")):
            raise UsageError(
                f"the reference {reference!r} cannot be enforced where arguments are written without quotes, as this "
                f"model's chat template has them",
                "Refer to what is in '$defs' of the parameters' schema.",
            )
    for each in part.values() if isinstance(part, Mapping) else part if isinstance(part, list) else ():
        _check_references(each)


def value_rules(rule: str, schema: Any, root: Schema, end: str, others: Sequence[str] = ()) -> list[str]:
    """The rules of a grammar for a value and the mark after it.

    Args:
        rule: the name of the rule.
        schema: the value's schema.
        root: the schema within which references are resolved.
        end: the mark.
        others: marks that a text must not have in it either.

    Raises:
        UsageError: a keyword or a listed value that cannot be enforced.
    """
    options = _alternatives(schema, root)
    if not any(map(_is_text, options)):
        definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
        return [f"{rule}: {json_rule({**_mapping(schema), **definitions})} {quoted(end)}"]
    terms = [_text_term(option, [end.strip(), *others]) for option in options if _is_text(option)]
    terms += ['"null"'] if any(map(_may_be_null, options)) else []
    names = [f"{rule.upper()}_{place}" for place in range(len(terms))]
    return [
        f"{rule}[lazy]: ({' | '.join(names)}) {quoted(end)}",
        *(f"{name}: {term}" for name, term in zip(names, terms, strict=True)),
    ]


def read_value(text: str, schema: Any, root: Schema) -> Any:
    """What a written value means by its schema: text where that may be text, else JSON, and text where it is none."""
    options = _readable(schema, root)
    for value in (value for option in options for value in _listed(option)):
        if _written(value) == text:
            return value
    if any(map(_is_text, options)):
        return None if text in ("null", "None") and any(map(_may_be_null, options)) else text
    try:
        return DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return _PYTHON.get(text, text)


def may_be_text(schema: Any, root: Schema) -> bool:
    """Whether a written value is text by its schema, and not JSON."""
    return any(map(_is_text, _readable(schema, root)))


def _readable(schema: Any, root: Schema) -> list[Schema]:
    """The alternatives of a schema that was not checked; any value if there are too many."""
    try:
        return _alternatives(schema, root)
    except UsageError:
        return [{}]


def _text_term(schema: Schema, marks: Sequence[str]) -> str:
    """A terminal of a grammar for text that is valid by a schema and does not contain a mark."""
    values = [value for value in _listed(schema) if isinstance(value, str) or schema.get("type") != "string"]
    if values or _LISTED & schema.keys():
        _refuse_others(schema, _LISTED)
        texts = [_written(value) for value in values]
        for text, mark in ((text, mark) for text in texts for mark in marks if mark in text):
            raise UsageError(f"the value {text!r} cannot be written between this model's marks: it has {mark!r} in it")
        return " | ".join(map(quoted, texts))
    _refuse_others(schema, _TEXT_KEYWORDS)
    term = without(*marks)
    if schema.get("minLength") or "maxLength" in schema:
        term += rf" & /(.|\n){{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}/"
    return f"{term} & /{_whole(schema['pattern'])}/" if "pattern" in schema else term


def _whole(pattern: str) -> str:
    """A pattern that matches anywhere in a text as one that matches all of it, with its slashes escaped."""
    inner = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", pattern)
    is_start, is_end = inner.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", inner) is not None
    inner = inner[is_start : len(inner) - is_end]
    return ("" if is_start else _ANY) + f"({inner})" + ("" if is_end else _ANY)


def _alternatives(schema: Any, root: Schema) -> list[Schema]:
    """The schemas of which a value satisfies one, with references within `root` resolved.

    A reference within what it refers to adds no alternative, and is left out.

    Raises:
        UsageError: there are too many to look at.
    """
    found: list[Schema] = []
    waiting: list[tuple[dict[str, Any], tuple[str, ...]]] = [(_mapping(schema), ())]
    for _ in range(_MOST_ALTERNATIVES):
        if not waiting:
            break
        each, followed = waiting.pop()
        keyword = next((name for name in ("anyOf", "oneOf", "allOf", "$ref") if _choices(each, name, root)), None)
        if keyword is None:
            found.append(each)
        elif keyword != "$ref" or str(each[keyword]) not in followed:
            followed = (*followed, str(each[keyword])) if keyword == "$ref" else followed
            rest = {name: value for name, value in each.items() if name != keyword}
            choices = _choices(each, keyword, root)[:_MOST_ALTERNATIVES]
            waiting += [({**rest, **_mapping(one)}, followed) for one in reversed(choices)]
    if waiting:
        raise UsageError(f"a value may have {_MOST_ALTERNATIVES} alternatives, references included", "Leave some out.")
    return found


def _choices(schema: Schema, keyword: str, root: Schema) -> list[Any]:
    """The schemas that a keyword adds, of which one counts; none where it is not there, or cannot be resolved."""
    given = schema.get(keyword)
    if keyword == "$ref":
        return [_target(given, root)] if keyword in schema else []
    if keyword != "allOf" or not isinstance(given, list):
        return given if isinstance(given, list) else []
    parts = [{name: value for name, value in schema.items() if name != keyword}, *map(_mapping, given)]
    merged = {name: value for part in parts for name, value in part.items()}
    constraints = [(name, value) for part in parts for name, value in part.items() if name not in _NOTES]
    return [merged] if all(merged[name] == value for name, value in constraints) else []


def _target(reference: Any, root: Schema) -> Any:
    found: Any = root
    for part in str(reference).removeprefix("#").removeprefix("/").split("/"):
        found = _mapping(found).get(part.replace("~1", "/").replace("~0", "~"))
    return found


def _is_text(schema: Schema) -> bool:
    if _LISTED & schema.keys():
        return any(isinstance(value, str) for value in _listed(schema))
    return "string" in _kinds(schema) or not (_kinds(schema) or _NOT_TEXT & schema.keys())


def _may_be_null(schema: Schema) -> bool:
    return "null" in _kinds(schema)


def _kinds(schema: Schema) -> Sequence[Any]:
    kinds = schema.get("type", [])
    return kinds if isinstance(kinds, list) else [kinds]


def _listed(schema: Schema) -> list[Any]:
    """The values that a schema lists."""
    values = schema.get("enum")
    return [*(values if isinstance(values, list) else []), *([schema["const"]] if "const" in schema else [])]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _refuse_others(schema: Schema, known: set[str]) -> None:
    if others := sorted(schema.keys() - known - _ANNOTATIONS):
        raise UsageError(
            f"'{others[0]}' cannot be enforced where arguments are written without quotes, as this model's chat "
            f"template has them",
            "Leave it out.",
        )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse_constant(digits)


# Without NaN and infinities, as which 1e999 counts: no client can read them.
DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
