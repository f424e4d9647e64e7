"""How many threads the kernels use, and why.

The smallest of: KNN_SSD_THREADS, the CPUs that this process may run on (its affinity mask, which counts logical CPUs),
and the CPU quota of its control groups. A quota below that number would otherwise stop all threads for the rest of
each period once they have used it up together. Knows nothing of the pool itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

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


@dataclass(frozen=True, slots=True)
class _Hierarchy:
    """A cgroup hierarchy that may limit CPU time.

    Args:
        version: 1 or 2.
        mount_point: the directory where it is mounted.
        mount_root: the cgroup that this directory stands for, as /proc/self/cgroup would name it.
        cgroup: this process's cgroup.
    """

    version: int
    mount_point: Path
    mount_root: PurePosixPath
    cgroup: PurePosixPath

    def directories(self) -> Iterator[Path]:
        """Directories of the cgroup and of all its ancestors that can be seen."""
        inside = self.mount_root in (self.cgroup, *self.cgroup.parents)
        below = self.cgroup.relative_to(self.mount_root) if inside else PurePosixPath()
        for each in (below, *below.parents):
            yield self.mount_point / each

    def quota_cpus(self) -> float:
        """The smallest quota along the way, in CPUs; infinity where there is none."""
        read = _quota_v2_cpus if self.version == 2 else _quota_v1_cpus
        return min(map(read, self.directories()), default=math.inf)


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
    for hierarchy in _hierarchies(root):
        quota_cpus = hierarchy.quota_cpus()
        if quota_cpus < math.inf:
            reason = f"cgroup v{hierarchy.version} quota of {quota_cpus:g} {'CPU' if quota_cpus == 1 else 'CPUs'}"
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


def _lines(path: Path) -> list[str]:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text("utf-8").splitlines()
    return []


def _hierarchies(root: Path) -> Iterator[_Hierarchy]:
    """The hierarchies that are mounted and can limit CPU time: those of v1 with the cpu controller, and v2's."""
    cgroups = dict(_cgroups(root))
    for line in _lines(root / "proc/self/mountinfo"):  # ID parent device root mount_point options - type source options
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        version = {"cgroup2": 2, "cgroup": 1}.get(kind[0])
        if version in cgroups and (version == 2 or "cpu" in kind[2].split(",")):
            mount_root, mount_point = (PurePosixPath(_unescape(field)) for field in fields[3:5])
            yield _Hierarchy(version, root / mount_point.relative_to("/"), mount_root, cgroups[version])


def _cgroups(root: Path) -> Iterator[tuple[int, PurePosixPath]]:
    """This process's cgroup by version, of v1's hierarchies the one with the cpu controller."""
    for line in _lines(root / "proc/self/cgroup"):  # hierarchy:controllers:cgroup
        hierarchy, _, rest = line.partition(":")
        controllers, _, cgroup = rest.partition(":")
        if hierarchy == "0" and not controllers:
            yield 2, PurePosixPath(cgroup)
        elif "cpu" in controllers.split(","):
            yield 1, PurePosixPath(cgroup)


def _unescape(field: str) -> str:
    """A path of mountinfo, where a space is written \\040."""
    return field.replace("\\040", " ")


def _quota_v2_cpus(directory: Path) -> float:
    for line in _lines(directory / "cpu.max"):  # "max 100000" or "50000 100000"
        quota_us, _, period_us = line.partition(" ")
        return _cpus(quota_us, period_us or "100000")
    return math.inf


def _quota_v1_cpus(directory: Path) -> float:
    quota_us, period_us = ("".join(_lines(directory / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return _cpus(quota_us, period_us)


def _cpus(quota_us: str, period_us: str) -> float:
    """Quota over period; infinity where there is no quota, which v1 writes as -1 and v2 as max."""
    with suppress(ValueError, ZeroDivisionError):
        quota_cpus = int(quota_us) / int(period_us)
        if quota_cpus > 0:
            return quota_cpus
    return math.inf
