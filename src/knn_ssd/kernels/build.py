"""Where the library of the kernels comes from: from the wheel, else compiled for this processor, once.

A wheel brings a library for each of several instruction sets, of which the best one that this processor has is used. A
checkout brings none: there the C sources are compiled at first use, and the library is kept in the cache directory,
under a hash of all that its code depends on: sources, flags, the compiler's version, the processor. This module imports
no torch, for it also runs while a wheel is built.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from knn_ssd.errors import KnnSsdError
from knn_ssd.io import cache_directory, writing

SOURCE_FOLDER = Path(__file__).parent / "csrc"
WHEEL_FOLDER = Path(__file__).parent / "lib"  # only in an installed wheel
FLAGS = ("-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-std=gnu11", "-Wall", "-Wextra", "-Wno-psabi")
# Not every clang for macOS knows -march=native; all of Apple's processors have these instructions.
_IS_APPLE_ARM = (sys.platform, platform.machine()) == ("darwin", "arm64")
NATIVE = ("-march=armv8.2-a+dotprod" if _IS_APPLE_ARM else "-march=native",)

_V3 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
# Instruction sets of a wheel's libraries, the best last: machine, flags of the compiler, features as /proc/cpuinfo has
# them.
INSTRUCTION_SETS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "x86-64-v3": ("x86_64", ("-march=x86-64-v3",), _V3),
    "x86-64-v4": ("x86_64", ("-march=x86-64-v4",), _V4),
    "x86-64-v4-vnni": ("x86_64", ("-march=x86-64-v4", "-mavx512vnni"), (*_V4, "avx512_vnni")),
    "x86-64-v4-bf16": (
        "x86_64",
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
        (*_V4, "avx512_vnni", "avx512_bf16"),
    ),
    "x86-64-v4-amx": (
        "x86_64",
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        (*_V4, "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"),
    ),
    "aarch64-dotprod": ("aarch64", ("-march=armv8.2-a+dotprod",), ("asimddp",)),
}


class KernelsUnavailable(KnnSsdError):
    """The kernels cannot be compiled or loaded on this machine. The transformers backend runs instead, and says so."""


def library_path() -> Path:
    """Path of the best library for this processor: the wheel's, or one that is compiled if it is not in the cache.

    Raises:
        KernelsUnavailable: there is none, and no compiler was found, or it failed.
        OutputError: the cache directory cannot be written.
    """
    if packaged := _packaged_library():
        return packaged
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise KernelsUnavailable(
            f"no C compiler was found ('{' '.join(compiler)}')", "Install gcc or a wheel of knn-ssd, or set CC."
        )
    path = cache_directory() / "kernels" / f"{_cache_key(compiler)}.so"
    if _is_trusted(path):
        return path
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
        flags: added to those of every build: the instruction set.

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
    _run([*compiler, "-shared", *objects, "-o", str(library), "-pthread", "-lm"])
    return library


def compile_for_wheel(compiler: Sequence[str], folder: Path, name: str) -> Path:
    """Compiles the library of one of `INSTRUCTION_SETS` in `folder`, named after it.

    Raises:
        KernelsUnavailable: the compiler failed; it may be too old for the instruction set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        compiled = compile_library(compiler, Path(scratch), INSTRUCTION_SETS[name][1])
        return Path(shutil.move(compiled, folder / f"{name}.so"))


def best_instruction_set() -> str | None:
    """Name of the best of `INSTRUCTION_SETS` that this processor has; None if it has none."""
    features = processor_features()
    found = [name for name, (_, _, needed) in own_instruction_sets().items() if features.issuperset(needed)]
    return found[-1] if found else None


def processor_features() -> frozenset[str]:
    """The processor's features as Linux names them; on a Mac with its own processor, those that all of them have."""
    with suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset({"asimddp"} if _machine() == "aarch64" and sys.platform == "darwin" else ())


def _machine() -> str:
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())


def own_instruction_sets() -> dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Those of `INSTRUCTION_SETS` that processors of this machine's architecture may have."""
    return {name: each for name, each in INSTRUCTION_SETS.items() if each[0] == _machine()}


def _packaged_library() -> Path | None:
    path = WHEEL_FOLDER / f"{best_instruction_set()}.so"
    return path if path.is_file() else None


def _is_trusted(path: Path) -> bool:
    """Whether there is such a file and only this user, or root, can have written it; it will be executed."""
    try:
        status = path.stat()
    except OSError:
        return False
    return not hasattr(os, "getuid") or (status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise KernelsUnavailable(f"{command[0]} failed with exit code {done.returncode} ({reason or 'no message'})")


def _cache_key(compiler: Sequence[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [f"{path.name}\0{path.read_text('utf-8')}" for path in sorted(SOURCE_FOLDER.glob("*.[ch]"))]
    processor = [platform.machine(), platform.processor(), *sorted(processor_features())]
    parts = [*sources, *compiler, version, *FLAGS, *NATIVE, *processor]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
