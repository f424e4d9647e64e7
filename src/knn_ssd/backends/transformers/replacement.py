"""Replaces attributes of a model's modules for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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


class DirectCalls:
    """Has modules call the replaced forwards of their leaf modules without `nn.Module.__call__`, which takes as long as
    a norm: what is replaced is the leaf as its parents see it. Hooks of the leaf do not run then.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._leaves: dict[int, nn.Module] = {}  # by the id of their `__dict__`
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}  # where parents see them
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None and not child._modules:
                    self._leaves[id(vars(child))] = child
                    self._places.setdefault(id(vars(child)), []).append((parent, name))

    @property
    def are_possible(self) -> bool:
        """Whether each leaf is still where it was found, and has no hooks."""
        return not any(
            leaf._forward_hooks
            or leaf._forward_pre_hooks
            or any(parent._modules.get(name) is not leaf for parent, name in self._places[key])
            for key, leaf in self._leaves.items()
        )

    def of(self, replacements: Sequence[Replacement]) -> list[Replacement]:
        """The replacements, and those of leaves' forwards in the parents as well."""
        direct = list(replacements)
        for each in replacements:
            key = id(each.attributes)
            if each.name == "forward" and key in self._leaves:
                leaf = _Leaf(each.value)
                leaf.module = self._leaves[key]
                direct += [Replacement(vars(parent), name, leaf) for parent, name in self._places[key]]
        return direct


class _Leaf(partial[Any]):
    """A leaf module's forward, with the attributes of the module. (A call of a `partial` runs no Python of its own.)"""

    module: nn.Module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


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
