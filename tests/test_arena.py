"""Memory for weights: whole, apart from each other, aligned, and large pages are asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from knn_ssd.kernels.arena import Arena
from knn_ssd.tools import memory

SHAPES = [((3, 5), torch.float32), ((2**25,), torch.uint8), ((7,), torch.bfloat16), ((1000, 1000), torch.float32)]


def test_tensors_are_contiguous_aligned_and_apart() -> None:
    arena = Arena()
    tensors = [arena.empty(shape, dtype).fill_(i) for i, (shape, dtype) in enumerate(SHAPES * 3)]
    for i, (tensor, (shape, dtype)) in enumerate(zip(tensors, SHAPES * 3, strict=True)):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert bool((tensor == i).all()), "another tensor was written into it"


def test_large_pages_are_asked_for() -> None:
    """Whether they are given depends on how much memory is free in one piece."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("the system has no large pages")
    tensor = Arena().empty((2**26,), torch.uint8).fill_(1)
    flags = flags_of_mapping(tensor.data_ptr())
    if not flags:
        pytest.skip("the system does not say what was asked for")
    assert "hg" in flags


def test_memory_is_not_shared_with_a_forked_process_and_is_no_file() -> None:
    before = memory._mapped_file_bytes(Path("/"))
    tensor = Arena().empty((2**26,), torch.uint8).fill_(1)
    assert memory._mapped_file_bytes(Path("/")) - before < 2**25
    child = os.fork()
    if child == 0:
        tensor[0] = 2
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert tensor[0] == 1


def flags_of_mapping(address: int) -> list[str]:
    """Flags of the mapping at an address, as the kernel names them."""
    here = False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            start, _, end = name.partition("-")
            here = int(start, 16) <= address < int(end, 16)
        elif here and name == "VmFlags:":
            return values
    return []
