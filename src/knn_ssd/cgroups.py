"""The control groups of Linux that limit what this process may use. What a limit means, its readers know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class Cgroup:
    """This process's cgroup in one hierarchy.

    Args:
        version: 1 or 2.
        directories: that of the cgroup and those of all its ancestors that can be seen.
    """

    version: int
    directories: tuple[Path, ...]


def cgroups(controller: str, root: Path = Path("/")) -> Iterator[Cgroup]:
    """This process's cgroups in the hierarchies that are mounted: that of version 1 with a controller, and version 2's.

    Args:
        controller: such as "cpu" or "memory".
        root: the directory under which `proc` and `sys` are read.
    """
    own = dict(_own(controller, root))
    for line in system_lines(
        root / "proc/self/mountinfo"
    ):  # ID parent device root mount_point options - type source options
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        version = {"cgroup2": 2, "cgroup": 1}.get(kind[0])
        if version in own and (version == 2 or controller in kind[2].split(",")):
            mount_root, mount_point = (PurePosixPath(_unescape(field)) for field in fields[3:5])
            directory = root / mount_point.relative_to("/")
            yield Cgroup(version, tuple(_directories(directory, mount_root, own[version])))


def system_lines(path: Path) -> list[str]:
    """The lines of a file; none where it cannot be read."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text("utf-8").splitlines()
    return []


def _own(controller: str, root: Path) -> Iterator[tuple[int, PurePosixPath]]:
    """This process's cgroup by version, of version 1's hierarchies the one with the controller."""
    for line in system_lines(root / "proc/self/cgroup"):  # hierarchy:controllers:cgroup
        hierarchy, _, rest = line.partition(":")
        controllers, _, cgroup = rest.partition(":")
        if hierarchy == "0" and not controllers:
            yield 2, PurePosixPath(cgroup)
        elif controller in controllers.split(","):
            yield 1, PurePosixPath(cgroup)


def _directories(mount_point: Path, mount_root: PurePosixPath, cgroup: PurePosixPath) -> Iterator[Path]:
    """Directories of a cgroup and its ancestors where a hierarchy is mounted, whose top stands for `mount_root`."""
    inside = mount_root in (cgroup, *cgroup.parents)
    below = cgroup.relative_to(mount_root) if inside else PurePosixPath()
    for each in (below, *below.parents):
        yield mount_point / each


def _unescape(field: str) -> str:
    """A path of mountinfo, where a space is written \\040."""
    return field.replace("\\040", " ")
