"""Memory use of a process and an engine. It knows nothing of models, whose sizes its callers provide."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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
