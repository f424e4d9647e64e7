"""Memory use of a process and an engine. It knows nothing of models, whose sizes its callers provide."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_MADV_DONTNEED = 4
_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory use in bytes.

    Args:
        weights: the model's weights.
        low_bit: the 4-bit copies made so far, which come on top of the weights.
        resident: the process's resident memory now; None where the system does not report it.
        peak: the process's peak resident memory; None where the system does not report it.
    """

    weights: int
    low_bit: int
    resident: int | None
    peak: int | None

    @classmethod
    def now(cls, weight_bytes: int, low_bit_bytes: int) -> MemoryUse:
        """The memory use now, with the given sizes of the weights and their 4-bit copies."""
        return cls(weight_bytes, low_bit_bytes, resident_bytes(), peak_bytes())


def resident_bytes() -> int | None:
    """The process's resident memory now; None where the system does not report it."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def peak_bytes() -> int | None:
    """The process's peak resident memory; None where the system does not report it."""
    with suppress(ImportError):
        import resource

        seen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
        return max(seen, resident_bytes() or 0)  # the system measures the two separately
    return None


def release_file_pages(addresses: Collection[int]) -> None:
    """Takes the pages of mapped files out of the process's memory; they are read from the file again when needed.

    A mapping that was written to is left alone, and so is all memory that no file is behind. Does nothing but on Linux.

    Args:
        addresses: addresses within the mappings of the files.
    """
    with suppress(OSError, AttributeError, ValueError):
        for start, end in _unchanged_mappings():
            if any(start <= address < end for address in addresses):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _unchanged_mappings() -> list[tuple[int, int]]:
    """First address and end of every mapping of a file that has no page of its own."""
    found: list[tuple[int, int]] = []
    mapping: tuple[int, int] | None = None  # the one that the lines read belong to, if a file is behind it
    for line in Path("/proc/self/smaps").read_text("utf-8", errors="replace").splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            start, _, end = name.partition("-")
            mapping = (int(start, 16), int(end, 16)) if values[3] != "0" else None  # the inode
        elif name == "Anonymous:" and mapping is not None and values[0] == "0":
            found.append(mapping)
    return found
