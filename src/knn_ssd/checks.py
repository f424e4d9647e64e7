"""Checks the kind and the range of values that users give in Python. Knows nothing of what they mean."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import MISSING, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from knn_ssd.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def fill_in_defaults(instance: DataclassInstance, keep: Iterable[str] = ()) -> None:
    """Gives each field of a frozen dataclass that is None its default, except those in `keep`."""
    for field in fields(instance):
        if getattr(instance, field.name) is None and field.name not in keep:
            made = field.default if field.default_factory is MISSING else field.default_factory()
            object.__setattr__(instance, field.name, made)


def require(condition: bool, rule: str, value: object) -> None:
    """Raises a `UsageError` with the rule and the value unless the condition holds."""
    if not condition:
        raise UsageError(f"{rule}, got {reprlib.repr(value)}")


def require_number(name: str, value: Any) -> None:
    """Raises a `UsageError` unless the value is a number, whole or not."""
    require(isinstance(value, Real) and not isinstance(value, bool), f"{name} must be a number", value)


def require_whole(name: str, value: Any) -> None:
    """Raises a `UsageError` unless the value is a whole number of a whole type: 2.0 is none."""
    require(is_whole(value), f"{name} must be a whole number", value)


def require_kind(name: str, value: Any, kind: type | tuple[type, ...], words: str) -> None:
    """Raises a `UsageError` unless the value is of a kind, which `words` describe with their article."""
    require(isinstance(value, kind), f"{name} must be {words}", value)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number of a whole type, and not True or False."""
    return isinstance(value, Integral) and not isinstance(value, bool)
