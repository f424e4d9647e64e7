"""4-bit copies of matrices; see `store_group` in csrc/quantise.c."""

from __future__ import annotations

import ctypes

import torch

from knn_ssd.kernels.arena import Arena
from knn_ssd.kernels.binding import GROUP_SIZE, INT4, Matrix, address, kernels

NUM_RANGES = 3  # tried for each group, each refitted by least squares


def quantise(matrix: Matrix, importance: torch.Tensor, arena: Arena | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels (rows, groups, 32) in bytes and the scales (rows, groups, 2) of a matrix's 4-bit copy.

    They are in the order in which the kernels read them, with rows filled up to a multiple of the kernels' lanes.

    Args:
        matrix: a matrix of the checkpoint.
        importance: (cols,) weights of the columns' squared errors.
        arena: gives the memory; None is one of its own.
    """
    arena = arena or Arena()
    data, scales = (arena.empty(shape, dtype).zero_() for shape, dtype in copy_forms(matrix))
    kernels().knn_ssd_quantise(ctypes.byref(matrix), address(importance), NUM_RANGES, address(data), address(scales))
    return data, scales


def low_matrix(matrix: Matrix, levels: torch.Tensor, scales: torch.Tensor) -> Matrix:
    """The 4-bit copy of a matrix, with tensors as `quantise` makes them; the caller keeps these alive."""
    return Matrix(address(levels), address(scales), matrix.bias, matrix.rows, matrix.cols, INT4)


def copy_forms(matrix: Matrix) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """The shapes and dtypes of the levels and the scales of a matrix's copy."""
    lanes, groups = kernels().knn_ssd_lanes(), -(-matrix.cols // GROUP_SIZE)
    rows = -(-matrix.rows // lanes) * lanes
    return ((rows, groups, GROUP_SIZE // 2), torch.uint8), ((rows, groups, 2), torch.bfloat16)
