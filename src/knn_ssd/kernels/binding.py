"""Binds the C kernels: their structures, their entry points, and whether they can be used on this machine.

Where they cannot be used, or with KNN_SSD_KERNELS=off, everything runs on the transformers backend, slower and without
4-bit drafts. Where the processor has a tile unit (AMX), bfloat16 weights go through it, unless KNN_SSD_KERNELS=vectors.
Else, and for the bfloat16 rows of GGUF files, inputs are rounded to bfloat16 where the processor multiplies pairs of it
(AVX512_BF16), unless KNN_SSD_KERNELS=float32.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

from knn_ssd.checks import require_whole
from knn_ssd.errors import KnnSsdError, UsageError
from knn_ssd.kernels.build import KernelsUnavailable, library_path
from knn_ssd.kernels.threads import thread_count

FLOAT32, FLOAT16, BFLOAT16, Q8_0, Q6_K, Q5_0, Q4_K, Q4_0, INT4 = range(9)
FLOAT32_BLOCKS, FLOAT16_BLOCKS, BFLOAT16_BLOCKS, BFLOAT16_PACKED = range(9, 13)
Q8_0_BLOCKS, Q6_K_BLOCKS, Q5_0_BLOCKS, Q4_K_BLOCKS, Q4_0_BLOCKS = range(13, 18)
SILU, GELU_TANH = range(2)  # activations
_INVALID_SIZES = 2  # a status
GROUP_SIZE = 64  # columns that share a scale in a 4-bit matrix


class Matrix(ctypes.Structure):
    """A weight matrix in one of the kernels' formats; see csrc/kernels.h, also for the other structures."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("kind", c_int64),
        ("input_squares", c_void_p),
        ("upper_bytes", c_void_p),
        ("escape_starts", c_void_p),
        ("escapes", c_void_p),
    )


class Attention(ctypes.Structure):
    """One attention sublayer."""

    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o")),
        *((name, c_void_p) for name in ("norm", "q_norm", "k_norm")),
        *((name, c_double) for name in ("epsilon", "scale")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "rotary_dim", "window")),
    )


class Mlp(ctypes.Structure):
    """One MLP sublayer."""

    _fields_ = (
        *((name, Matrix) for name in ("gate", "up", "down")),
        ("norm", c_void_p),
        ("epsilon", c_double),
        ("activation", c_int64),
    )


class BatchEntry(ctypes.Structure):
    """The rows of one session in a batch: rotary tables, KV cache, first position, run length, number of rows, kind."""

    _fields_ = (
        *((name, c_void_p) for name in ("cosines", "sines")),
        *((name, c_void_p) for name in ("keys", "values", "int8_keys", "int8_values", "key_scales", "value_scales")),
        *((name, c_int64) for name in ("capacity", "position", "run_length", "n_rows", "kv_kind")),
    )


class OuterAttention(ctypes.Structure):
    """The attention of one layer of a model that runs outside the kernels."""

    _fields_ = (
        *((name, c_double) for name in ("scale", "softcap")),
        ("sinks", c_void_p),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim")),
    )


class OuterCache(ctypes.Structure):
    """One session's keys and values of that layer."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "new_keys", "new_values")),
        *((name, c_int64) for name in ("capacity", "position", "n_new")),
    )


class VisibleKeys(ctypes.Structure):
    """The keys that one row sees."""

    _fields_ = tuple((name, c_int64) for name in ("cache", "first", "split", "end"))


_STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    *(Matrix, Attention, Mlp, BatchEntry),
    *(OuterAttention, OuterCache, VisibleKeys),
)


def _check_status(status: int, function: Any, _: tuple[Any, ...]) -> None:
    if status == _INVALID_SIZES:
        raise ValueError(
            f"{function.__name__} was called with sizes that would corrupt memory; csrc/contract.c has what it accepts"
        )
    if status:
        raise MemoryError(
            f"{function.__name__} could not allocate its scratch memory; run fewer rows or a shorter context"
        )


# Entry points: the type of the result, or the check of a status, and the types of the arguments.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "knn_ssd_forward": (_check_status, c_void_p, c_void_p, c_int64, POINTER(BatchEntry), c_int64, c_void_p),
    "knn_ssd_lm_head": (
        *(_check_status, POINTER(Matrix), c_void_p, c_double, c_void_p, c_int64),
        *(POINTER(c_int64), c_int64, c_void_p, c_void_p),
    ),
    "knn_ssd_linear": (_check_status, POINTER(Matrix), c_void_p, c_int64, c_void_p),
    "knn_ssd_mlp": (_check_status, POINTER(Mlp), c_void_p, c_int64, c_void_p),
    "knn_ssd_rms_norm": (_check_status, c_void_p, c_int64, c_int64, c_void_p, c_double, c_void_p),
    "knn_ssd_attend": (
        *(_check_status, POINTER(OuterAttention), POINTER(OuterCache), c_int64),
        *(c_void_p, c_int64, c_void_p, c_void_p),
    ),
    "knn_ssd_quantise": (_check_status, POINTER(Matrix), c_void_p, *[c_int64] * 3, c_void_p, c_void_p),
    "knn_ssd_upper_bytes": (_check_status, POINTER(Matrix), c_void_p),
    "knn_ssd_pack": (_check_status, POINTER(Matrix), c_int64, c_void_p, c_void_p, c_void_p),
    "knn_ssd_list_escapes": (_check_status, POINTER(Matrix), c_void_p, c_void_p, c_void_p),
    "knn_ssd_read_rows": (_check_status, POINTER(Matrix), POINTER(c_int64), c_int64, c_void_p),
    "knn_ssd_struct_sizes": (POINTER(c_int64),),
    "knn_ssd_lanes": (c_int64,),
    "knn_ssd_uses_tiles": (c_int64,),
    "knn_ssd_enable_tiles": (None, c_int64),
    "knn_ssd_rounds_inputs": (c_int64,),
    "knn_ssd_enable_rounding": (None, c_int64),
    "knn_ssd_keep_float32": (None, c_int64),
    "pool_set_threads": (None, c_int),
    "pool_threads": (c_int,),
}


def kernels() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        KernelsUnavailable: they cannot be compiled or loaded; the message says why.
    """
    found = _found()
    if isinstance(found, KernelsUnavailable):
        raise found
    return found


def kernels_obstacle() -> str | None:
    """None where the kernels can be used, else the reason in one sentence."""
    found = _found()
    return str(found) if isinstance(found, KernelsUnavailable) else None


@functools.cache
def _found() -> ctypes.CDLL | KernelsUnavailable:
    """The kernels, or why there are none; they are compiled and loaded at most once in a process."""
    threads = thread_count()
    requested = os.environ.get("KNN_SSD_KERNELS", "").lower()
    if requested in ("off", "0", "no"):
        return KernelsUnavailable("the environment sets KNN_SSD_KERNELS=off")
    try:
        library = load(library_path())
    except KernelsUnavailable as error:
        return error
    except (OSError, KnnSsdError) as error:
        return KernelsUnavailable(f"the kernels cannot be used: {error}")
    library.knn_ssd_enable_tiles(requested not in ("vectors", "float32"))
    library.knn_ssd_enable_rounding(requested != "float32")
    library.pool_set_threads(threads.threads)
    return library


def load(path: Path) -> ctypes.CDLL:
    """Loads a compiled library and declares its entry points.

    Raises:
        KernelsUnavailable: its structures have other sizes than those of this module.
        OSError: it cannot be loaded.
    """
    library = ctypes.CDLL(str(path))
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
        if result is _check_status:
            function.restype, function.errcheck = c_int, _check_status
    sizes = [ctypes.sizeof(each) for each in _STRUCTURES]
    compiled = library.knn_ssd_struct_sizes()[: len(sizes)]
    if compiled != sizes:
        raise KernelsUnavailable(f"the compiled structures take {compiled} bytes, those of the binding {sizes}")
    return library


def uses_tiles() -> bool:
    """Whether bfloat16 weights go through the processor's tile unit."""
    return kernels_obstacle() is None and bool(kernels().knn_ssd_uses_tiles())


def rounds_inputs() -> bool:
    """Whether the inputs of bfloat16 weights are rounded to bfloat16."""
    return kernels_obstacle() is None and bool(kernels().knn_ssd_rounds_inputs())


@contextmanager
def float32_inputs() -> Iterator[None]:
    """Has this thread's passes take float32 inputs, for the length of a `with` block: rounded ones hide differences."""
    if not rounds_inputs():
        yield
        return
    kernels().knn_ssd_keep_float32(1)
    try:
        yield
    finally:
        kernels().knn_ssd_keep_float32(0)


def set_threads(threads: int | None) -> None:
    """Sets how many threads run the kernels and torch's own operations in this process.

    Args:
        threads: at least 1; the calling thread is one of them. None changes nothing.

    Raises:
        UsageError: no whole number, or one below 1.
    """
    if threads is None:
        return
    require_whole("threads", threads)
    if threads < 1:
        raise UsageError(f"threads must be 1 or more, got {threads}")
    torch.set_num_threads(threads)
    if kernels_obstacle() is None:
        kernels().pool_set_threads(threads)


def num_threads() -> int:
    """How many threads run the kernels; where there are none, torch's own operations."""
    return int(kernels().pool_threads()) if kernels_obstacle() is None else torch.get_num_threads()


def address(array: torch.Tensor | None) -> int | None:
    """Address of a contiguous tensor's data; None for None."""
    assert array is None or array.is_contiguous()
    return None if array is None else array.data_ptr()
