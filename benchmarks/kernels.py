"""Times kernels on one matrix: PyTorch's for float32, bfloat16, 8 and 4 bits, and those of the native backend.

    python benchmarks/kernels.py [--rows N] [--cols K]

Medians in milliseconds by number of input rows, over copies of the matrix that exceed the cache. Where torchao is
installed, its 4-bit weights with 8-bit inputs are timed too.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

from knn_ssd.kernels.binding import Matrix, address, kernels
from knn_ssd.kernels.quantisation import low_matrix, quantise
from knn_ssd.kernels.weights import TensorKeeper, make_matrix

BLOCKS = (1, 2, 4, 8)
KEPT_ALIVE: list[object] = []  # the tensors whose addresses the kernels have
COPIES, REPEATS = 8, 7


def ours(matrices: list[Matrix], x: torch.Tensor) -> Callable[[int], object]:
    """The native backend's linear, called through its LM head; the norm there adds about a thousandth of the time."""
    count, cols = x.shape
    norm, hidden, out = torch.ones(cols), torch.empty(count, cols), torch.empty(count, matrices[0].rows)
    every = (ctypes.c_int64 * count)(*range(count))

    def run(copy: int) -> object:
        places = address(x), count, every, count, address(hidden), address(out)
        return kernels().knn_ssd_lm_head(ctypes.byref(matrices[copy]), address(norm), 1e-5, *places)

    return run


def kernels_by_name(rows: int, cols: int) -> dict[str, Callable[[torch.Tensor], Callable[[int], object]]]:
    """The kernels by name; each takes an input and returns a function that runs it on one copy of the matrix."""
    linears = [nn.Linear(cols, rows, bias=False) for _ in range(COPIES)]
    wide = [linear.weight.detach() for linear in linears]
    halves = [nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16) for _ in range(COPIES)]
    narrow = [linear.weight.detach() for linear in halves]
    keeper = TensorKeeper()
    full = [make_matrix(linear.weight, linear.bias, keeper) for linear in halves]
    tensors = [quantise(matrix, torch.ones(cols)) for matrix in full]
    copies = [low_matrix(matrix, *own) for matrix, own in zip(full, tensors, strict=True)]
    KEPT_ALIVE.extend((keeper, tensors, halves))
    found: dict[str, Callable[[torch.Tensor], Callable[[int], object]]] = {
        "F.linear, float32": lambda x: lambda i: nn.functional.linear(x, wide[i]),
        "F.linear, bfloat16": lambda x: lambda i: nn.functional.linear(x.bfloat16(), narrow[i]),
        "native, bfloat16": lambda x: ours(full, x),
        "native, 4 bits": lambda x: ours(copies, x),
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
    if hasattr(torch.ops.quantized, "linear_dynamic") and hasattr(torch, "quantize_per_channel"):
        eights = [eight_bits(weight) for weight in wide]
        found["linear_dynamic, 8 bits"] = lambda x: lambda i: torch.ops.quantized.linear_dynamic(x, eights[i], True)
    if importlib.util.find_spec("torchao"):
        by_torchao = [torchao_linear(weight) for weight in wide]
        found["torchao, 4 bits, 8-bit inputs"] = lambda x: lambda i: by_torchao[i](x)
    return found


def eight_bits(weight: torch.Tensor) -> object:
    """A matrix packed for PyTorch's own kernel of 8-bit weights and inputs, with a scale for each row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates its quantised tensors in favour of torchao
        scales, zeros = (weight.abs().amax(dim=1) / 127).double(), torch.zeros(len(weight), dtype=torch.long)
        return torch.ops.quantized.linear_prepack(
            torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8), None
        )


def torchao_linear(weight: torch.Tensor) -> nn.Module:
    """A linear as in torchao's documentation for CPUs; it dequantises first where its wheel has no kernel."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    module = nn.Sequential(linear)
    quantize_(module, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(64)))
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8960)
    parser.add_argument("--cols", type=int, default=1536)
    args = parser.parse_args()
    torch.manual_seed(0)
    found = kernels_by_name(args.rows, args.cols)
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
