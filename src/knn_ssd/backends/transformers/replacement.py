"""Replaces attributes of a model's modules for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

_MISSING: Any = object()


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """One attribute and what stands in its place.

    Args:
        attributes: the dictionary that holds it: a module's `__dict__`, `_parameters` or `_buffers`.
        name: its name there.
        value: what stands in its place.
    """

    attributes: dict[str, Any]
    name: str
    value: Any


def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Replacement:
    """The replacement of a module's `forward`."""
    return Replacement(module.__dict__, "forward", forward)


@contextmanager
def replaced(replacements: Sequence[Replacement]) -> Iterator[None]:
    """Replaces attributes for the length of a `with` block; then what was there before is restored."""
    before = [each.attributes.get(each.name, _MISSING) for each in replacements]
    try:
        for each in replacements:
            each.attributes[each.name] = each.value
        yield
    finally:
        for each, value in zip(reversed(replacements), reversed(before), strict=True):
            if value is _MISSING:
                each.attributes.pop(each.name, None)
            else:
                each.attributes[each.name] = value
