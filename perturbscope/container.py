"""Limits of a container on processor time and memory, read from its control groups (cgroup, version 1 or 2).

A runtime such as Docker or Kubernetes gives limits to the kernel and tells the process nothing: it still sees all
cores and all memory of the machine, makes a thread for each core, and is then slowed down or killed. The limits stand
in files, and a group has no more than any group around it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Controller = Literal["cpu", "memory"]
_ESCAPED = re.compile(r"\\([0-7]{3})")


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the cores whose time the container may use, such as 1.5; None if there is no limit.

    Parameters
    ----------
    root
        Folder that holds ``proc`` and ``sys``: for tests.
    """
    return min(filter(None, (_quota(folder) for folder in _groups(root, "cpu"))), default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that the container may use; None if there is no limit.

    Parameters
    ----------
    root
        Folder that holds ``proc`` and ``sys``: for tests.
    """
    return min(filter(None, (_limit(folder) for folder in _groups(root, "memory"))), default=None)


def memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may use: the container's limit, or the machine's memory."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, memory_limit(root) or machine)


def _quota(folder: Path) -> float | None:
    """Read ``cpu.max`` ("200000 100000", or "max 100000"), or the two files of version 1 (-1: no limit)."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if not (quota.isdecimal() and period.isdecimal() and int(quota) and int(period)):
        return None
    return int(quota) / int(period)


def _limit(folder: Path) -> int | None:
    """Read ``memory.max``, or the file of version 1, whose "no limit" is larger than any machine."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        text = _read(folder / name)
        if text.isdecimal() and 0 < int(text) < 2**60:
            return int(text)
    return None


def _groups(root: Path, controller: Controller) -> Iterator[Path]:
    """Yield the folder of the process's group, and those of the groups around it, as far as this process sees them."""
    paths = dict(_own_groups(root))
    for mounted, top, controllers in _mounts(root):
        path = paths.get(controller if controllers else "")
        if path is None or (controllers and controller not in controllers):
            continue
        # In a container, its own group is often all that is mounted; then the path is that of the machine.
        inside = Path(path).relative_to(top) if Path(path).is_relative_to(top) else Path()
        folder = mounted if ".." in inside.parts else mounted / inside
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(mounted))


def _own_groups(root: Path) -> Iterator[tuple[str, str]]:
    """Yield each controller of version 1, or "" for version 2, with the path of the process's group."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for name in controllers.split(",") if number != "0" or controllers else [""]:
            yield name, path


def _mounts(root: Path) -> Iterator[tuple[Path, str, set[str]]]:
    """Yield where groups are mounted, the path of the group at the top, and the controllers (version 2: none)."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or not kind or kind[0] not in ("cgroup", "cgroup2"):
            continue
        top, place = (_ESCAPED.sub(lambda match: chr(int(match[1], 8)), field) for field in fields[3:5])
        yield root / place.lstrip("/"), top, set(kind[-1].split(",")) if kind[0] == "cgroup" else set()


def _read(path: Path) -> str:
    """Read a file of the kernel; empty if it is not there."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
