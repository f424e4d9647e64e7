"""4-bit copies of matrices; see `store_group` in csrc/quantise.c."""

from __future__ import annotations

import ctypes

import torch

from knn_ssd.kernels.arena import Arena
from knn_ssd.kernels.binding import GROUP_SIZE, INT4, Matrix, address, kernels

NUM_RANGES = 3  # tried for each group, each refitted by least squares
MIN_IMPORTANCE = 1e-3  # of a column, relative to the mean
SAMPLE_TOKENS = 64  # to whose activations copies are fitted
PART_ROWS = 64  # a multiple of the rows that the kernels quantise together


def sample_tokens(vocab_size: int, context_length: int) -> list[int]:
    """Tokens spread over the vocabulary, `SAMPLE_TOKENS` of them if the context has room; their activations show which
    inputs are large as well as text does.
    """
    count = min(SAMPLE_TOKENS, context_length)
    return [i * vocab_size // count for i in range(count)]


def relative_importance(squares: torch.Tensor) -> torch.Tensor:
    """Importance (cols,) of a matrix's columns: their mean squared input, relative to the mean of all columns (as in
    AWQ, arXiv 2306.00978). All columns are alike if nothing is known of the inputs.

    Args:
        squares: (cols,) the sums of the squared inputs.
    """
    mean = squares.mean()
    known = bool(torch.isfinite(mean)) and float(mean) > 0
    return (squares / mean).clamp_(MIN_IMPORTANCE) if known else torch.ones_like(squares)


def quantise(matrix: Matrix, importance: torch.Tensor, arena: Arena | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels (rows, groups, 32) in bytes and the scales (rows, groups, 2) of a matrix's 4-bit copy.

    They are in the order in which the kernels read them, with rows filled up to a multiple of the kernels' lanes.

    Args:
        matrix: a matrix of the checkpoint.
        importance: (cols,) weights of the columns' squared errors.
        arena: gives the memory; None is one of its own.
    """
    levels, scales = empty_copy(matrix, arena or Arena())
    quantise_rows(matrix, importance, range(matrix.rows), levels, scales)
    return levels, scales


def empty_copy(matrix: Matrix, arena: Arena) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels and the scales of a matrix's 4-bit copy, all zero, for `quantise_rows` to fill."""
    levels, scales = (arena.empty(shape, dtype).zero_() for shape, dtype in copy_forms(matrix))
    return levels, scales


def quantise_rows(
    matrix: Matrix, importance: torch.Tensor, rows: range, levels: torch.Tensor, scales: torch.Tensor
) -> None:
    """Quantises a part of a matrix into its copy; all parts together are what `quantise` gives.

    Args:
        matrix: a matrix of the checkpoint.
        importance: (cols,) weights of the columns' squared errors.
        rows: which ones; they begin and end at multiples of `PART_ROWS`, or end with the last row.
        levels, scales: of the whole copy.
    """
    kernels().knn_ssd_quantise(
        *(ctypes.byref(matrix), address(importance), NUM_RANGES, rows.start, rows.stop),
        *(address(levels), address(scales)),
    )


def low_matrix(matrix: Matrix, levels: torch.Tensor, scales: torch.Tensor) -> Matrix:
    """The 4-bit copy of a matrix, with tensors as `quantise` makes them; the caller keeps these alive."""
    return Matrix(address(levels), address(scales), matrix.bias, matrix.rows, matrix.cols, INT4)


def copy_forms(matrix: Matrix) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """The shapes and dtypes of the levels and the scales of a matrix's copy."""
    lanes, groups = kernels().knn_ssd_lanes(), -(-matrix.cols // GROUP_SIZE)
    rows = -(-matrix.rows // lanes) * lanes
    return ((rows, groups, GROUP_SIZE // 2), torch.uint8), ((rows, groups, 2), torch.bfloat16)
