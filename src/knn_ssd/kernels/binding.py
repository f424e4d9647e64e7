"""Compiles `kernels.c` for this processor, once, and binds it.

A C compiler with OpenMP is needed where the kernels are to run; without one, or with KNN_SSD_KERNELS=off, everything
works on the general target, slower and without low-bit drafts. Where the processor has a tile unit (AMX), bfloat16
weights go through it, unless KNN_SSD_KERNELS=vectors. The compiled file is kept in the cache directory, under
a name that changes with the source, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_double, c_int64, c_void_p
from pathlib import Path

import torch

from knn_ssd.errors import KnnSsdError
from knn_ssd.io import cache_directory, writing

_SOURCE = Path(__file__).parent / "csrc" / "kernels.c"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fPIC", "-std=gnu11", "-w")

FLOAT32, BFLOAT16, INT4 = range(3)
GROUP = 64  # columns that share a scale in a 4-bit matrix


class KernelsUnavailable(KnnSsdError):
    """The kernels cannot be compiled or loaded here; says why. Never reaches a user: the general target takes over."""


class Matrix(ctypes.Structure):
    """A weight matrix where it lies; see kernels.c."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("kind", c_int64),
        ("seen", c_void_p),
    )


class Attention(ctypes.Structure):
    """One attention sublayer."""

    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o")),
        *((name, c_void_p) for name in ("norm", "q_norm", "k_norm")),
        *((name, c_double) for name in ("epsilon", "scale")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "rotary", "window")),
    )


class Mlp(ctypes.Structure):
    """One MLP sublayer."""

    _fields_ = (*((name, Matrix) for name in ("gate", "up", "down")), ("norm", c_void_p), ("epsilon", c_double))


class BatchEntry(ctypes.Structure):
    """Where some rows of a pass stand: positions, cache, pointer, and how many they are."""

    _fields_ = (
        *((name, c_void_p) for name in ("cosines", "sines")),
        *((name, c_void_p) for name in ("keys", "values", "low_keys", "low_values", "key_scales", "value_scales")),
        *((name, c_int64) for name in ("capacity", "position", "run", "count")),
    )


_SIGNATURES = {
    "knn_ssd_forward": (c_void_p, c_void_p, c_int64, POINTER(BatchEntry), c_int64, c_void_p),
    "knn_ssd_lm_head": (
        *(POINTER(Matrix), c_void_p, c_double, c_void_p, c_int64),
        *(POINTER(c_int64), c_int64, c_void_p, c_void_p),
    ),
    "knn_ssd_quantise": (POINTER(Matrix), c_void_p, c_int64, c_void_p, c_void_p),
}


def kernels() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        KernelsUnavailable: says why.
    """
    found = _found()
    if isinstance(found, KernelsUnavailable):
        raise found
    return found


def kernels_obstacle() -> str | None:
    """None where the kernels can be used, else the reason in one sentence."""
    found = _found()
    return found.message if isinstance(found, KernelsUnavailable) else None


@functools.cache
def _found() -> ctypes.CDLL | KernelsUnavailable:
    """The kernels, or why not: compiled, or tried in vain, once in a process."""
    try:
        return _loaded()
    except KernelsUnavailable as error:
        return error


def _loaded() -> ctypes.CDLL:
    asked = os.environ.get("KNN_SSD_KERNELS", "").lower()
    if asked in ("off", "0", "no"):
        raise KernelsUnavailable("the environment says KNN_SSD_KERNELS=off")
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, KnnSsdError) as error:
        raise KernelsUnavailable(f"the kernels cannot be used: {error}") from error
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.knn_ssd_lanes.restype = c_int64
    library.knn_ssd_uses_tiles.restype = c_int64
    library.knn_ssd_enable_tiles.argtypes, library.knn_ssd_enable_tiles.restype = (c_int64,), None
    library.knn_ssd_enable_tiles(asked != "vectors")
    library.knn_ssd_release_threads.restype = None
    return library


def uses_tiles() -> bool:
    """Whether bfloat16 weights go through the processor's tile unit."""
    return kernels_obstacle() is None and bool(kernels().knn_ssd_uses_tiles())


def release_threads() -> None:
    """Called by a thread that has run the model, before another one does so for good; else passes take twice as long
    there. It may run the model again, at the other's cost.
    """
    if kernels_obstacle() is None:
        kernels().knn_ssd_release_threads()


def address(array: torch.Tensor | None) -> int | None:
    """Where a contiguous tensor lies."""
    assert array is None or array.is_contiguous()
    return None if array is None else array.data_ptr()


def _compiled() -> Path:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise KernelsUnavailable(f"no C compiler was found ('{compiler[0]}')", "Install gcc, or set CC.")
    name = hashlib.sha256("\0".join([_SOURCE.read_text("utf-8"), *compiler, *_FLAGS, *_processor()]).encode())
    path = cache_directory() / "kernels" / f"{name.hexdigest()[:16]}.so"
    if not path.exists():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
                made = Path(folder) / "kernels.so"
                _compile(compiler, made)
                os.replace(made, path)
    return path


def _compile(compiler: list[str], made: Path) -> None:
    compiled = made.with_suffix(".o")
    own = sorted(map(str, Path(torch.__file__).parent.glob("lib/libgomp*.so*")))  # torch's, so that there is one pool
    commands = (
        [*compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(compiled)],
        [*compiler, "-shared", str(compiled), "-o", str(made), *(own[:1] or ["-fopenmp"]), "-lm"],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            first = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise KernelsUnavailable(f"{compiler[0]} failed with exit code {done.returncode} ({first})")


def _processor() -> tuple[str, ...]:
    """What code made for this processor depends on."""
    flags = ""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        pass
    return (platform.machine(), platform.processor(), flags, torch.__version__)
