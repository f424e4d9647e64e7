"""The kernels compile without warnings, are built again when anything changes, and report what goes wrong."""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Callable, Iterator
from ctypes import c_int64
from pathlib import Path

import pytest
import torch
from torch import nn

from knn_ssd.backends.base import ForwardRequest
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.kernels import binding, build
from knn_ssd.kernels.binding import address
from knn_ssd.kernels.weights import TensorKeeper, make_matrix
from knn_ssd.testing import tiny_model

needs_kernels = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")


@pytest.fixture
def _fresh_kernels() -> Iterator[None]:
    """Looks for the kernels again, before the test and after it."""
    binding._found.cache_clear()
    yield
    binding._found.cache_clear()


@pytest.mark.parametrize("compiler", ["cc", "gcc", "clang"])
def test_there_are_no_warnings(compiler: str, compiled_kernels: Callable[..., Path]) -> None:
    library = binding.load(compiled_kernels(compiler, *build.NATIVE))
    assert library.knn_ssd_lanes() in (8, 16)


def test_a_warning_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCE_FOLDER, sources)
    for other in set(sources.glob("*.c")) - {sources / "forward.c"}:
        other.unlink()  # so that there is little to compile
    with (sources / "forward.c").open("a") as file:
        file.write("static int unused(int a) { return 0; }\n")
    monkeypatch.setattr(build, "SOURCE_FOLDER", sources)
    with pytest.raises(build.KernelsUnavailable, match="unused"):
        build.compile_library(["cc"], tmp_path, ["-Werror"])


def test_the_cache_key_covers_sources_compiler_and_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = [build._cache_key([sys.executable])]
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    keys.append(build._cache_key([sys.executable]))
    compiler = tmp_path / "compiler"
    for version in ("1", "2"):
        compiler.write_text(f"#!/bin/sh\necho {version}\n")
        compiler.chmod(0o755)
        keys.append(build._cache_key([str(compiler)]))
    for name in ("kernels.h", "forward.c"):
        folder = tmp_path / name
        shutil.copytree(build.SOURCE_FOLDER, folder)
        with (folder / name).open("a") as file:
            file.write("\n")
        monkeypatch.setattr(build, "SOURCE_FOLDER", folder)
        keys.append(build._cache_key([str(compiler)]))
    assert len(set(keys)) == len(keys)


@needs_kernels
@pytest.mark.usefixtures("_fresh_kernels")
def test_structures_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(binding.Matrix):
        _fields_ = (("added", c_int64),)

    monkeypatch.setattr(binding, "_STRUCTURES", (Longer, *binding._STRUCTURES[1:]))
    assert "the compiled structures take [80, " in (binding.kernels_obstacle() or "")


@needs_kernels
def test_scratch_memory_that_cannot_be_allocated_is_a_memory_error() -> None:
    keeper, linear = TensorKeeper(), nn.Linear(96, 40)
    matrix, norm, x = make_matrix(linear.weight, linear.bias, keeper), torch.ones(96), torch.randn(1, 96)
    hidden, logits, row = torch.empty(1, 96), torch.empty(1, 40), (c_int64 * 1)(0)
    kernels, arguments = binding.kernels(), (address(norm), 1e-5, address(x), 1, row)

    def run(num_rows: int) -> None:
        kernels.knn_ssd_lm_head(ctypes.byref(matrix), *arguments, num_rows, address(hidden), address(logits))

    run(1)
    expected = logits.clone()
    for num_rows in (2**42, 2**61, 2**62 + 1):  # more than there is, and products beyond 64 bits
        with pytest.raises(MemoryError, match="knn_ssd_lm_head could not allocate"):
            run(num_rows)
    logits.zero_()
    run(1)
    assert torch.equal(logits, expected)


@needs_kernels
def test_sizes_that_would_corrupt_memory_are_refused() -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32)
    backend = NativeBackend(model)
    session = backend.open(2)
    request = ForwardRequest([3, 4, 5], 0, session.cache, None, 1)
    with pytest.raises(ValueError, match="knn_ssd_forward was called with sizes"):
        backend.forward(request)
    keeper, norm, x = TensorKeeper(), torch.ones(96), torch.randn(1, 96)
    linear = nn.Linear(96, 40)
    matrix, hidden = make_matrix(linear.weight, linear.bias, keeper), torch.empty(1, 96)
    logits = torch.zeros(1, 40)
    arguments = address(norm), 1e-5, address(x), 1, (c_int64 * 1)(1), 1, address(hidden), address(logits)
    with pytest.raises(ValueError, match="knn_ssd_lm_head was called with sizes"):
        binding.kernels().knn_ssd_lm_head(ctypes.byref(matrix), *arguments)
    assert not logits.any()


@needs_kernels
def test_a_forward_pass_without_memory_leaves_the_model_usable() -> None:
    model = tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32)
    backend = NativeBackend(model)
    session = backend.open(10)
    expected = session.prefill([3, 4, 5]).logits
    plan = backend._resolve(None)
    entry = binding.BatchEntry(capacity=2**50, position=0, run_length=0, n_rows=2**50)
    with pytest.raises(MemoryError, match="knn_ssd_forward"):
        binding.kernels().knn_ssd_forward(plan.attentions, plan.mlps, 1, ctypes.byref(entry), 1, None)
    request = ForwardRequest([3, 4, 5], 0, backend.open(10).cache, None, 1)
    assert torch.equal(backend.forward(request).logits[0], expected)
