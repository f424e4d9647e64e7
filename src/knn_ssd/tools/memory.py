"""Memory use of a process and an engine, and the memory that is free. It knows nothing of models, whose sizes its
callers provide.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from knn_ssd.cgroups import cgroups, system_lines

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
        files = [each for each in _mappings("maps") if any(each[0] <= address < each[1] for address in addresses)]
        unchanged = set(_mappings("smaps")) if files else set()  # which takes the system long to write
        for start, end in unchanged.intersection(files):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _mappings(name: str) -> list[tuple[int, int]]:
    """First address and end of every mapping of a file; with "smaps", of those that have no page of their own."""
    found: list[tuple[int, int]] = []
    mapping: tuple[int, int] | None = None  # the one that the lines read belong to, if a file is behind it
    for line in Path("/proc/self", name).read_text("utf-8", errors="replace").splitlines():
        first, *values = line.split()
        if not first.endswith(":"):
            start, _, end = first.partition("-")
            mapping = (int(start, 16), int(end, 16)) if values[3] != "0" else None  # the inode
            if mapping is not None and name == "maps":
                found.append(mapping)
        elif first == "Anonymous:" and mapping is not None and values[0] == "0":
            found.append(mapping)
    return found


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Memory that this process can still take.

    Args:
        bytes: its size.
        total: the size of the memory that it is a part of.
        owner: whose memory that is, such as "this machine" or "the process's cgroup v2".
    """

    bytes: int
    total: int
    owner: str

    def __str__(self) -> str:
        return f"{size(max(self.bytes, 0))} of the {size(self.total)} of {self.owner} are free"


def free_memory(root: Path = Path("/")) -> FreeMemory | None:
    """The memory that this process can still take: what is free on the machine, or within the limit of one of its
    control groups if that is less. None where the system does not report it.

    Files in memory count as free, because the system drops them, except for those that this process has mapped: weights
    that lie there are read for every token.

    Args:
        root: the directory under which `proc` and `sys` are read.
    """
    return min(_limits(root), key=lambda limit: limit.bytes, default=None)


def size(num_bytes: float) -> str:
    """A number of bytes in the largest unit of which there is at least one, such as "1.5 GiB"."""
    for exponent, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**exponent:
            return f"{num_bytes / 1024**exponent:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _limits(root: Path) -> Iterator[FreeMemory]:
    mapped = _mapped_file_bytes(root)
    machine = _numbers(root / "proc/meminfo")  # in KiB
    if "MemAvailable" in machine and "MemTotal" in machine:
        yield FreeMemory(1024 * machine["MemAvailable"] - mapped, 1024 * machine["MemTotal"], "this machine")
    for group in cgroups("memory", root):
        limit_name, use_name, prefix = _CGROUP_FILES[group.version]
        for directory in group.directories:
            limit, used = ("".join(system_lines(directory / name)) for name in (limit_name, use_name))
            if limit.isdigit() and used.isdigit():
                stat = _numbers(directory / "memory.stat")
                files = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
                free = int(limit) - int(used) + max(0, files - mapped)
                yield FreeMemory(free, int(limit), f"the process's cgroup v{group.version}")


# By version: the files of the limit and the use, and how the names in memory.stat begin.
_CGROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("memory.max", "memory.current", ""),
}


def _numbers(path: Path) -> dict[str, int]:
    """The numbers in a file of lines such as "MemTotal:  24683652 kB" or "active_file 4096"."""
    words = [line.split() for line in system_lines(path)]
    return {pair[0].rstrip(":"): int(pair[1]) for pair in words if len(pair) > 1 and pair[1].isdigit()}


def _mapped_file_bytes(root: Path) -> int:
    """Memory of the files that this process has mapped and read."""
    words = "".join(system_lines(root / "proc/self/statm")).split()  # in pages: size, resident, shared, …
    return int(words[2]) * os.sysconf("SC_PAGE_SIZE") if len(words) > 2 else 0
