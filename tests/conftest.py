"""What all tests share: one fixed Hypothesis profile, one thread, with which tiny models are fastest, the embedded
model, and what takes long to make.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from processes import forget_the_disk

from knn_ssd.engine import Engine
from knn_ssd.io import provenance
from knn_ssd.kernels import build
from knn_ssd.kernels.binding import set_threads
from knn_ssd.loading.resolve import load_model

ROOT = Path(__file__).parents[1]

settings.register_profile(
    "fixed", derandomize=True, deadline=None, print_blob=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # the other worker needs the other core
if IN_WORKER:
    os.environ["KNN_SSD_THREADS"] = "1"  # for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"  # of those processes
set_threads(1)
forget_the_disk()
os.environ["KNN_SSD_WEIGHT_CACHE"] = "0"  # nothing is kept but in the tests of the weight cache

# The longest come first, so that no worker is left alone with them at the end.
LONGEST = ["test_wheel", "test_embedded", "test_kernel_backend", "test_routing", "test_calibrate", "test_benchmarks"]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker gets all tests of a file, which share fixtures and caches, or of a group in it."""
    for item in items:
        if IN_WORKER and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def made_once(pytestconfig: pytest.Config) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder of what takes long and depends on the sources, the packages and the compilers alone.

    It is kept in pytest's cache, where the other worker and later runs find it, until any of those changes. Called with
    the folder's name and with what fills an empty folder.
    """
    kept = pytestconfig.cache.mkdir("made")
    own = kept / _everything_it_depends_on()
    for other in set(kept.iterdir()) - {own}:
        shutil.rmtree(other, ignore_errors=True)
    own.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, unfinished = own / name, own / f"{name}.unfinished"
        with (own / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(folder)
        return folder

    return made


def _everything_it_depends_on() -> str:
    digest = hashlib.sha256()
    sources = [path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*") if path.is_file()]
    more = ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE")
    for path in sorted([*sources, *(ROOT / name for name in more)]):
        if path.suffix not in (".pyc", ".so"):
            digest.update(f"{path}\0".encode() + path.read_bytes())
    for compiler in ("cc", "gcc", "clang"):
        if shutil.which(compiler):
            digest.update(subprocess.check_output([compiler, "--version"]))
    variables = [os.environ.get(name) for name in ("CC", "KNN_SSD_WHEEL_KERNELS")]
    others = [provenance()["versions"], variables, sorted(build.processor_features())]
    digest.update(repr(others).encode())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def compiled_kernels(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[..., Path]:
    """Compiles the kernels' library, with a compiler and flags of an instruction set; a warning is an error."""

    def compiled(compiler: str, *flags: str) -> Path:
        found = shutil.which(compiler)
        if found is None:
            pytest.skip(f"{compiler} is not installed")
        version = subprocess.check_output([found, "--version"], text=True).partition(" ")[2]  # without its own name
        compiled_by = hashlib.sha256(version.encode()).hexdigest()[:8]
        name = "-".join([compiled_by, *(flag.rpartition("=")[2] for flag in flags)])
        folder = made_once(name, lambda folder: build.compile_library([compiler], folder, [*flags, "-Werror"]))
        return folder / "kernels.so"

    return compiled


@pytest.fixture(scope="session")
def _embedded() -> Engine:
    loaded = load_model(None, dtype="float32", device="cpu")
    return Engine(loaded.model, loaded.tokenizer)


@pytest.fixture(scope="module")
def embedded_engine(_embedded: Engine) -> Iterator[Engine]:
    """The embedded model in float32, on all cores that are this process's."""
    set_threads(1 if IN_WORKER else os.cpu_count() or 1)
    yield _embedded
    set_threads(1)
