"""A plan in the form that the kernels take: the addresses of the sublayers to run."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from knn_ssd.kernels.binding import Matrix
from knn_ssd.plan import Mode


@dataclass(frozen=True, slots=True)
class ResolvedPlan:
    """The sublayers and the head under a plan, in the form that the kernels take."""

    attentions: Any
    mlps: Any
    head: Matrix


def sublayer_addresses(modes: Sequence[Mode], kept: Sequence[Any], low: Callable[[int], Any]) -> Any:
    """An array of the addresses of each layer's sublayer in its mode; null where it is skipped."""
    sublayer = {Mode.KEEP: kept.__getitem__, Mode.LOW: low}
    addresses = [None if mode is Mode.SKIP else ctypes.addressof(sublayer[mode](i)) for i, mode in enumerate(modes)]
    return (ctypes.c_void_p * len(addresses))(*addresses)
