"""Takes 4-bit copies of a model's matrices from the weight cache, for any backend that makes them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch

from knn_ssd.kernels.binding import GROUP_SIZE, Matrix, kernels, uses_tiles
from knn_ssd.kernels.quantisation import MIN_IMPORTANCE, NUM_RANGES, SAMPLE_TOKENS, copy_forms
from knn_ssd.weight_cache import WeightCache

logger = logging.getLogger(__name__)

_VERSION = 1  # increased whenever the same weights and settings give other bytes than before


def kept_copies(
    cache: WeightCache, keys: Sequence[str], matrices: Mapping[tuple[str, str], Matrix]
) -> dict[str, torch.Tensor]:
    """The copies that are kept under the first of some keys; empty if there are none. A warning says if the kernels
    could not read what is kept.

    Args:
        cache: where they are kept.
        keys: in the order of preference.
        matrices: all of which there are copies, by the names of their levels and scales.
    """
    forms = {
        name: form for names, matrix in matrices.items() for name, form in zip(names, copy_forms(matrix), strict=True)
    }
    for key in keys:
        if (kept := cache.load(key)) is None:
            continue
        if forms == {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in kept.items()}:
            return kept
        logger.warning("The kept 4-bit copies are not those of this model, and are made again.")
    return {}


def copies_cache_key(scheme: str = "") -> str:
    """Everything beside a model's weights that decides the names and the bytes of its copies.

    Args:
        scheme: says how matrices are named if it is in another way than here.
    """
    unit = "tile unit" if uses_tiles() else "vectors"  # it rounds the sample's activations
    names = f", {scheme}" if scheme else ""
    return (
        f"4-bit copies, version {_VERSION}, {kernels().knn_ssd_lanes()} lanes, groups of {GROUP_SIZE}, "
        f"{NUM_RANGES} ranges, importance at least {MIN_IMPORTANCE:g}, from {SAMPLE_TOKENS} tokens, {unit}{names}"
    )
