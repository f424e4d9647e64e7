"""How much memory a process and an engine take. It knows nothing of models; what they take is told to it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes.

    Args:
        weights: of the model.
        low_bit: of the low-bit copies made so far, beside the weights.
        resident: of the process, now; None where the system does not say.
        peak: the most the process ever had; None where the system does not say.
    """

    weights: int
    low_bit: int
    resident: int | None
    peak: int | None

    @classmethod
    def now(cls, weight_bytes: int, low_bit_bytes: int) -> MemoryUse:
        """The process's use now, beside what its owner says of the model's weights and their 4-bit copies."""
        return cls(weight_bytes, low_bit_bytes, resident_bytes(), peak_bytes())


def resident_bytes() -> int | None:
    """What the process holds in memory now; None where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def peak_bytes() -> int | None:
    """The most the process ever held in memory; None where the system does not say."""
    with suppress(ImportError):
        import resource

        seen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
        return max(seen, resident_bytes() or 0)  # the system counts the two apart
    return None
