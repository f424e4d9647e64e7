"""Compiles the C sources for this processor, once, and keeps the library in the cache directory.

The library's name is a hash of all that its code depends on: sources, flags, the compiler's version, the processor.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from knn_ssd.errors import KnnSsdError
from knn_ssd.io import cache_directory, writing

SOURCE_FOLDER = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-std=gnu11", "-Wall", "-Wextra", "-Wno-psabi")
NATIVE = ("-march=native", "-fopenmp")


class KernelsUnavailable(KnnSsdError):
    """The kernels cannot be compiled or loaded on this machine. Users never see it: the transformers backend runs."""


def library_path() -> Path:
    """Path of the library for this processor, which is compiled if it is not in the cache.

    Raises:
        KernelsUnavailable: no compiler was found, or it failed.
        OutputError: the cache directory cannot be written.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise KernelsUnavailable(f"no C compiler was found ('{' '.join(compiler)}')", "Install gcc, or set CC.")
    path = cache_directory() / "kernels" / f"{_cache_key(compiler)}.so"
    if not path.exists():
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
                os.replace(compile_library(compiler, Path(folder)), path)
    return path


def compile_library(compiler: Sequence[str], folder: Path, flags: Sequence[str] = NATIVE) -> Path:
    """Compiles the library in `folder`, one process for each source file, as many at once as there are cores.

    Args:
        compiler: command of a C compiler.
        folder: an empty folder.
        flags: added to those of every build: the processor, OpenMP.

    Raises:
        KernelsUnavailable: the compiler failed.
    """
    sources = sorted(SOURCE_FOLDER.glob("*.c"))
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    commands = [
        [*compiler, *FLAGS, *flags, "-c", str(source), "-o", target]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    library = folder / "kernels.so"
    torch_openmp = sorted(map(str, Path(torch.__file__).parent.glob("lib/libgomp*.so*")))  # so that they share threads
    openmp = (torch_openmp[:1] or ["-fopenmp"]) if "-fopenmp" in flags else []
    _run([*compiler, "-shared", *objects, "-o", str(library), *openmp, "-lm"])
    return library


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise KernelsUnavailable(f"{command[0]} failed with exit code {done.returncode} ({reason or 'no message'})")


def _cache_key(compiler: Sequence[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [f"{path.name}\0{path.read_text('utf-8')}" for path in sorted(SOURCE_FOLDER.glob("*.[ch]"))]
    parts = [*sources, *compiler, version, *FLAGS, *NATIVE, *_processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> tuple[str, ...]:
    """What the code for this processor depends on, and the version of torch, with which it shares a library."""
    flags = ""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        pass
    return (platform.machine(), platform.processor(), flags, torch.__version__)
