"""The full model's matrices for the kernels, taken from the weight cache or made from the checkpoint's tensors."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import nn

from knn_ssd.kernels.arena import Arena
from knn_ssd.kernels.binding import Matrix, kernels, uses_tiles
from knn_ssd.kernels.gguf_rows import GGUFRows, weight_of
from knn_ssd.kernels.weights import Blocks, TensorKeeper, best_blocks, is_read_in_place, make_matrix
from knn_ssd.weight_cache import WeightCache

logger = logging.getLogger(__name__)

_VERSION = 2  # increased whenever the same weights give other bytes than before


class PackedWeights:
    """Makes matrices, each under a name of its own, and keeps what is in blocks for the next start; but not a GGUF
    file's blocks, which are put in order quickly.

    Args:
        cache: where blocks are kept; None keeps none.
    """

    def __init__(self, cache: WeightCache | None) -> None:
        self.keeper = TensorKeeper()
        self.num_weights = 0  # of all matrices
        self._arena = Arena()
        self._cache = None if uses_tiles() else cache
        self._kept = (self._cache.load(_cache_key()) if self._cache is not None else None) or {}
        self._made: dict[str, torch.Tensor] = {}

    def matrix(self, name: str, linear: nn.Linear) -> Matrix:
        """The matrix of a linear layer; its bias becomes float32.

        Args:
            name: the same for the same layer at every start.
            linear: the layer.
        """
        weight = weight_of(linear)
        self.num_weights += linear.in_features * linear.out_features
        return make_matrix(weight, linear.bias, self.keeper, self._blocks(name, weight))

    def finish(self) -> None:
        """Keeps what was made; to be called after the last matrix."""
        if self._made and self._cache is not None:
            self._cache.store(_cache_key(), self._made)
        self._kept, self._made = {}, {}

    def _blocks(self, name: str, weight: torch.Tensor | GGUFRows) -> Blocks | None:
        if isinstance(weight, GGUFRows):
            return best_blocks(weight, self._arena)
        return None if is_read_in_place(weight) else self._from_cache(name, weight) or self._new(name, weight)

    def _from_cache(self, name: str, weight: torch.Tensor) -> Blocks | None:
        start = f"{name}."
        tensors = {key.removeprefix(start): tensor for key, tensor in self._kept.items() if key.startswith(start)}
        blocks = Blocks.of(weight, tensors) if "data" in tensors else None
        if blocks is None and self._kept:
            logger.warning("The kept weights are not those of this model, and are made again.")
            self._kept = {}
        return None if blocks is None else replace(blocks, data=self._arena.copy(blocks.data))

    def _new(self, name: str, weight: torch.Tensor) -> Blocks:
        blocks = best_blocks(weight, self._arena)
        if self._cache is not None:
            self._made.update((f"{name}.{part}", tensor) for part, tensor in blocks.tensors.items())
        return blocks


def _cache_key() -> str:
    """Everything beside a model's weights that decides the bytes of its blocks."""
    return f"weights in blocks, version {_VERSION}, {kernels().knn_ssd_lanes()} lanes"
