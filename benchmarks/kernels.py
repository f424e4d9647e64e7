"""One matrix, many kernels: PyTorch's for float32, bfloat16 and 4 bits beside those of the lean target.

    python benchmarks/kernels.py [--rows N] [--cols K]

Medians in milliseconds by rows of input, over copies of the matrix that do not fit the cache together.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from knn_ssd.target.linear import Keeper, LowBit, matrix_of
from knn_ssd.target.native import Matrix, address, kernels

BLOCKS = (1, 2, 4, 8)
KEPT: list[object] = []  # holds the tensors whose addresses the kernels have
COPIES, REPEATS = 4, 7


def ours(matrices: list[Matrix], x: torch.Tensor) -> Callable[[int], object]:
    """The lean target's linear, called through its head, whose norm is a thousandth of it."""
    count, cols = x.shape
    norm, hidden, out = torch.ones(cols), torch.empty(count, cols), torch.empty(count, matrices[0].rows)
    every = (ctypes.c_int64 * count)(*range(count))

    def run(copy: int) -> object:
        places = address(x), count, every, count, address(hidden), address(out)
        return kernels().knn_ssd_head(ctypes.byref(matrices[copy]), address(norm), 1e-5, *places)

    return run


def ways(rows: int, cols: int) -> dict[str, Callable[[torch.Tensor], Callable[[int], object]]]:
    """By name: for an input, what to run on a copy of the matrix."""
    linears = [nn.Linear(cols, rows, bias=False) for _ in range(COPIES)]
    wide = [linear.weight.detach() for linear in linears]
    halves = [nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16) for _ in range(COPIES)]
    narrow = [linear.weight.detach() for linear in halves]
    keeper = Keeper()
    full = [matrix_of(linear, keeper) for linear in halves]
    low = LowBit([], [], full[0], lambda *_: None)
    copies = [low._round(matrix, torch.ones(cols)) for matrix in full]
    KEPT.extend((keeper, low, halves))
    found: dict[str, Callable[[torch.Tensor], Callable[[int], object]]] = {
        "F.linear, float32": lambda x: lambda i: nn.functional.linear(x, wide[i]),
        "F.linear, bfloat16": lambda x: lambda i: nn.functional.linear(x.bfloat16(), narrow[i]),
        "lean, bfloat16": lambda x: ours(full, x),
        "lean, 4 bits": lambda x: ours(copies, x),
    }
    core, onednn = torch.ops.aten, torch.ops.mkldnn
    if hasattr(onednn, "_reorder_linear_weight"):
        packed = [onednn._reorder_linear_weight(weight, 8) for weight in wide]
        found["oneDNN, float32, packed"] = lambda x: (
            lambda i: onednn._linear_pointwise(x, packed[i], None, "none", [], "")
        )
    if hasattr(core, "_weight_int4pack_mm_for_cpu"):
        levels = torch.randint(0, 15, (rows, cols), dtype=torch.int32)
        fours = [torch._convert_weight_to_int4pack_for_cpu(levels, 1) for _ in range(COPIES)]
        scales = torch.rand(cols // 64, rows, 2, dtype=torch.bfloat16)
        found["_weight_int4pack_mm_for_cpu, bfloat16"] = lambda x: (
            lambda i: torch._weight_int4pack_mm_for_cpu(x.bfloat16(), fours[i], 64, scales)
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8960)
    parser.add_argument("--cols", type=int, default=1536)
    args = parser.parse_args()
    torch.manual_seed(0)
    found = ways(args.rows, args.cols)
    print(f"{args.rows} x {args.cols:27} " + " ".join(f"{block:7} rows" for block in BLOCKS))
    taken: dict[tuple[str, int], list[float]] = {}
    for repeat in range(REPEATS + 1):
        for block in BLOCKS:
            for name, make in found.items():
                run = make(torch.randn(block, args.cols))
                started = time.perf_counter()
                for copy in range(COPIES):
                    run(copy)
                if repeat:
                    taken.setdefault((name, block), []).append(1e3 * (time.perf_counter() - started) / COPIES)
    for name in found:
        print(f"{name:38} " + " ".join(f"{statistics.median(taken[name, block]):12.2f}" for block in BLOCKS))


if __name__ == "__main__":
    with torch.no_grad():
        main()
