"""Memory for weights in large pages.

A forward pass reads every weight once, from pages of 4 KiB each of which the processor first has to find. In a virtual
machine that takes as long as reading them. Linux gives pages of 2 MiB to memory that asks for them, where its setting
`transparent_hugepage` is `madvise` or `always`. A mapped file has small pages; so weights are copied from it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch

_MADV_HUGEPAGE = 14
_PAGE_BYTES = 2**21
_CHUNK_BYTES = 16 * _PAGE_BYTES  # unless less is asked for at first
_ALIGNMENT = 64


class Arena:
    """Hands out tensors of large pages. A chunk of memory is freed when none of its tensors is left."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor on the CPU whose values are undefined."""
        size = math.prod(shape) * dtype.itemsize
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        if room > len(self._chunk):
            self._chunk = _untouched(max(_CHUNK_BYTES, room) + _PAGE_BYTES)
            self._chunk = self._chunk[-self._chunk.data_ptr() % _PAGE_BYTES :]
        taken, self._chunk = self._chunk[:size], self._chunk[room:]
        return taken.view(dtype).view(*shape)


def _untouched(size: int) -> torch.Tensor:
    """Memory (size,) of its own mapping; what an allocator hands out may lie in small pages already.

    The mapping is private: a shared one, which is what Python makes by default, has small pages, counts as a mapped
    file, and would be written to by a forked process.
    """
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    return large_pages(torch.frombuffer(mmap.mmap(-1, size, **private), dtype=torch.uint8))


def large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, whose memory asks the system for large pages where it was not written to yet."""
    start = -(-tensor.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
    end = (tensor.data_ptr() + tensor.nbytes) // _PAGE_BYTES * _PAGE_BYTES
    if sys.platform == "linux" and start < end:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)
    return tensor
