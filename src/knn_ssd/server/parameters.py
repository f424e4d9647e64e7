"""Arguments that a model writes one by one, each between marks, and text without quotes, as Qwen3-Coder does.

Knows how a schema's values are written so: their grammar, and what a written value means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from knn_ssd.errors import UsageError
from knn_ssd.grammar import json_rule
from knn_ssd.server.terms import quoted

_ANNOTATIONS = {"type", "title", "description", "default", "examples", "deprecated", "$comment", "$defs", "definitions"}
_LISTED = {"enum", "const"}
_TEXT_KEYWORDS = {"minLength", "maxLength", "pattern"}
_OBJECT_KEYWORDS = {"properties", "required", "additionalProperties", "$schema", "$id"}
_STRUCTURE = {"properties", "items", "additionalProperties", "prefixItems"}  # of what is not text
_DEEPEST = 20  # references and alternatives within each other
_ANY = r"(.|\n)*"
_PYTHON = {"True": True, "False": False, "None": None}  # as templates write them without `tojson`

Schema = Mapping[str, Any]


def parameters_of(schema: Schema) -> dict[str, Any]:
    """The schema of each parameter that an object's schema names."""
    names = _mapping(schema.get("properties"))
    required = schema.get("required")
    return {
        **{name: parameter_of(schema, name) for name in (required if isinstance(required, list) else [])},
        **names,
    }


def parameter_of(schema: Schema, name: str) -> Any:
    """The schema of one parameter; of one that is not named, that of additional properties."""
    return _mapping(schema.get("properties")).get(name, _mapping(schema.get("additionalProperties")))


def check_object(schema: Schema) -> None:
    """Raises a `UsageError` for an object's keywords that cannot be enforced if its values are written apart."""
    _refuse_others(schema, _OBJECT_KEYWORDS)


def value_rules(rule: str, schema: Any, root: Schema, end: str) -> list[str]:
    """The rules of a grammar for a value and the mark after it.

    Args:
        rule: the name of the rule.
        schema: the value's schema.
        root: the schema within which references are resolved.
        end: the mark.

    Raises:
        UsageError: a keyword that cannot be enforced.
    """
    options = _alternatives(schema, root)
    if not any(map(_is_text, options)):
        definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
        return [f"{rule}: {json_rule({**_mapping(schema), **definitions})} {quoted(end)}"]
    terms = [_text_term(option, end.strip()) for option in options if _is_text(option)]
    terms += ['"null"'] if any(map(_may_be_null, options)) else []
    names = [f"{rule.upper()}_{place}" for place in range(len(terms))]
    return [
        f"{rule}[lazy]: ({' | '.join(names)}) {quoted(end)}",
        *(f"{name}: {term}" for name, term in zip(names, terms, strict=True)),
    ]


def read_value(text: str, schema: Any, root: Schema) -> Any:
    """What a written value means by its schema: text where that may be text, else JSON, and text where it is none."""
    options = _alternatives(schema, root)
    for value in (value for option in options for value in _listed(option)):
        if _written(value) == text:
            return value
    if any(map(_is_text, options)):
        return None if text in ("null", "None") and any(map(_may_be_null, options)) else text
    try:
        return DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return _PYTHON.get(text, text)


def _text_term(schema: Schema, end: str) -> str:
    """A terminal of a grammar for text that is valid by a schema and does not contain a mark."""
    values = [value for value in _listed(schema) if isinstance(value, str) or schema.get("type") != "string"]
    if values or _LISTED & schema.keys():
        _refuse_others(schema, _LISTED)
        return " | ".join(quoted(_written(value)) for value in values)
    _refuse_others(schema, _TEXT_KEYWORDS)
    term = f"/{_ANY}/ & ~/{_ANY}{re.escape(end)}{_ANY}/".replace("</", r"<\/")
    if schema.get("minLength") or "maxLength" in schema:
        term += rf" & /(.|\n){{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}/"
    return f"{term} & /{_whole(schema['pattern'])}/" if "pattern" in schema else term


def _whole(pattern: str) -> str:
    """A pattern that matches anywhere in a text as one that matches all of it, with its slashes escaped."""
    inner = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", pattern)
    is_start, is_end = inner.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$$", inner) is not None
    inner = inner[is_start : len(inner) - is_end]
    return ("" if is_start else _ANY) + f"({inner})" + ("" if is_end else _ANY)


def _alternatives(schema: Any, root: Schema, depth: int = 0) -> list[Schema]:
    """The schemas of which a value satisfies one, with references within `root` resolved."""
    schema = _mapping(schema)
    if depth == _DEEPEST:
        return [{}]
    for keyword in ("anyOf", "oneOf", "allOf", "$ref"):
        given = [_target(schema[keyword], root)] if keyword == "$ref" and keyword in schema else schema.get(keyword)
        if isinstance(given, list) and (keyword != "allOf" or len(given) == 1):
            rest = {name: value for name, value in schema.items() if name != keyword}
            return [each for one in given for each in _alternatives({**rest, **_mapping(one)}, root, depth + 1)]
    return [schema]


def _target(reference: Any, root: Schema) -> Any:
    found: Any = root
    for part in str(reference).removeprefix("#").removeprefix("/").split("/"):
        found = _mapping(found).get(part.replace("~1", "/").replace("~0", "~"))
    return found


def _is_text(schema: Schema) -> bool:
    if _LISTED & schema.keys():
        return any(isinstance(value, str) for value in _listed(schema))
    return "string" in _kinds(schema) or not (_kinds(schema) or _STRUCTURE & schema.keys())


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


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # without NaN and infinities, which no client can read
