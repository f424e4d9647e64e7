"""How many threads the kernels use, and why.

The smallest of: KNN_SSD_THREADS, the CPUs that this process may run on (its affinity mask, which counts logical CPUs),
and the CPU quota of its control groups. A quota below that number would otherwise stop all threads for the rest of
each period once they have used it up together. Knows nothing of the pool itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from knn_ssd.cgroups import cgroups, system_lines
from knn_ssd.errors import UsageError

THREADS_VARIABLE = "KNN_SSD_THREADS"
_HAS_AFFINITY = hasattr(os, "sched_getaffinity")  # not on macOS


@dataclass(frozen=True, slots=True)
class ThreadCount:
    """A number of threads and the limit that set it.

    Args:
        threads: the number, at least 1.
        reason: the limit, such as "CPU affinity" or "cgroup v2 quota of 0.5 CPUs".
    """

    threads: int
    reason: str

    def __str__(self) -> str:
        return f"{self.threads}: {self.reason}"


def thread_count(
    root: Path = Path("/"), environment: Mapping[str, str] = os.environ, affinity_cpus: int | None = None
) -> ThreadCount:
    """Number of threads for the kernels.

    Args:
        root: the directory under which `proc` and `sys` are read.
        environment: where KNN_SSD_THREADS is looked up.
        affinity_cpus: CPUs that this process may run on; by default the operating system is asked.

    Raises:
        UsageError: KNN_SSD_THREADS is not a whole number of at least 1.
    """
    limits = [ThreadCount(affinity_cpus or usable_cpus(), "CPU affinity" if _HAS_AFFINITY else "CPUs of the machine")]
    for group in cgroups("cpu", root):
        quota_cpus = min(map(_QUOTA_CPUS[group.version], group.directories), default=math.inf)
        if quota_cpus < math.inf:
            reason = f"cgroup v{group.version} quota of {quota_cpus:g} {'CPU' if quota_cpus == 1 else 'CPUs'}"
            limits.append(ThreadCount(max(1, math.ceil(quota_cpus)), reason))
    requested = environment.get(THREADS_VARIABLE, "").strip()
    if requested:
        limits.insert(0, ThreadCount(_parse(requested), f"{THREADS_VARIABLE}={requested}"))
    return min(limits, key=lambda limit: limit.threads)


def _parse(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise UsageError(
            f"{THREADS_VARIABLE} must be a whole number of at least 1, got {text!r}",
            "Set it to a number of threads, or unset it to use all CPUs that this process may use.",
        )
    return int(text)


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count() or 1


def _quota_v2_cpus(directory: Path) -> float:
    for line in system_lines(directory / "cpu.max"):  # "max 100000" or "50000 100000"
        quota_us, _, period_us = line.partition(" ")
        return _cpus(quota_us, period_us or "100000")
    return math.inf


def _quota_v1_cpus(directory: Path) -> float:
    quota_us, period_us = ("".join(system_lines(directory / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return _cpus(quota_us, period_us)


def _cpus(quota_us: str, period_us: str) -> float:
    """Quota over period; infinity where there is no quota, which v1 writes as -1 and v2 as max."""
    with suppress(ValueError, ZeroDivisionError):
        quota_cpus = int(quota_us) / int(period_us)
        if quota_cpus > 0:
            return quota_cpus
    return math.inf


_QUOTA_CPUS = {1: _quota_v1_cpus, 2: _quota_v2_cpus}
