"""The full model's matrices for the kernels, taken from the weight cache or made from the checkpoint's tensors."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping

import torch

from knn_ssd.kernels.arena import Arena
from knn_ssd.kernels.binding import Matrix, kernels, uses_tiles
from knn_ssd.kernels.gguf_rows import GGUFRows
from knn_ssd.kernels.weights import Blocks, TensorKeeper, best_blocks, is_read_in_place, make_matrix
from knn_ssd.weight_cache import WeightCache

logger = logging.getLogger(__name__)

_VERSION = 2  # increased whenever the same weights give other bytes than before


class PackedWeights:
    """Makes matrices, each under a name of its own, and keeps what is in blocks for the next start; but not a GGUF
    file's blocks, which are put in order quickly.

    Args:
        cache: where blocks are kept; None keeps none.
        scheme: says how matrices are named if it is in another way than the native backend's.
    """

    def __init__(self, cache: WeightCache | None, scheme: str = "") -> None:
        self.keeper = TensorKeeper()
        self.num_weights = 0  # of all matrices
        self._arena = Arena()
        self._cache = None if uses_tiles() else cache
        self._key = _cache_key(scheme)
        self._kept = self._by_matrix((self._cache.load(self._key) if self._cache is not None else None) or {})
        self._made: dict[str, torch.Tensor] = {}

    def matrix(self, name: str, weight: torch.Tensor | GGUFRows, bias: torch.Tensor | None) -> Matrix:
        """The matrix of a weight and a bias, which becomes float32.

        Args:
            name: the same for the same matrix at every start.
            weight: (rows, cols).
            bias: (rows,) or None.
        """
        self.num_weights += weight.shape[0] * weight.shape[1]
        if isinstance(weight, GGUFRows):
            return make_matrix(weight, bias, self.keeper, best_blocks(weight, self._arena))
        weight = weight.detach()
        if is_read_in_place(weight):
            return make_matrix(weight.contiguous(), bias, self.keeper, None)
        blocks = self._from_cache(name, weight) or self._new(name, weight.contiguous())
        return make_matrix(weight, bias, self.keeper, blocks)

    def finish(self) -> None:
        """Keeps what was made; to be called after the last matrix."""
        if self._made and self._cache is not None:
            self._cache.store(self._key, self._made)
        self._kept, self._made = {}, {}

    def _from_cache(self, name: str, weight: torch.Tensor) -> Blocks | None:
        tensors = self._kept.get(name, {})
        blocks = Blocks.of(weight, tensors) if "data" in tensors else None
        if blocks is None and self._kept:
            logger.warning("The kept weights are not those of this model, and are made again.")
            self._kept = {}
        return blocks

    @staticmethod
    def _by_matrix(kept: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """The parts of each matrix's blocks, by its name."""
        matrices: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, tensor in kept.items():
            name, _, part = key.rpartition(".")
            matrices[name][part] = tensor
        return matrices

    def _new(self, name: str, weight: torch.Tensor) -> Blocks:
        blocks = best_blocks(weight, self._arena)
        if self._cache is not None:
            self._made.update((f"{name}.{part}", tensor) for part, tensor in blocks.tensors.items())
        return blocks


def _cache_key(scheme: str) -> str:
    """Everything beside a model's weights that decides the names and the bytes of its blocks."""
    names = f", {scheme}" if scheme else ""
    return f"weights in blocks, version {_VERSION}, {kernels().knn_ssd_lanes()} lanes{names}"
