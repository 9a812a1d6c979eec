"""Limits of a container, read from trees of files as the kernel shows them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from perturbscope import container, threads

V1 = "30 1 0:27 {top} {place} rw,nosuid - cgroup cgroup rw,{controllers}\n"
V2 = "30 1 0:27 {top} {place} rw,nosuid,nodev - cgroup2 cgroup2 rw,nsdelegate\n"
MIB = 2**20

CASES: dict[str, tuple[str, str, Mapping[str, str], float | None, int | None]] = {
    "version 2, as in Docker": (
        "0::/\n",
        V2.format(top="/", place="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "200000 100000", "sys/fs/cgroup/memory.max": str(512 * MIB)},
        2.0,
        512 * MIB,
    ),
    "version 2 without limits": (
        "0::/\n",
        V2.format(top="/", place="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "max 100000", "sys/fs/cgroup/memory.max": "max"},
        None,
        None,
    ),
    "version 2, nested: a group around has less": (
        "0::/kubepods/burstable/pod7/web\n",
        V2.format(top="/", place="/sys/fs/cgroup"),
        {
            "sys/fs/cgroup/kubepods/burstable/pod7/web/cpu.max": "800000 100000",
            "sys/fs/cgroup/kubepods/burstable/pod7/cpu.max": "150000 100000",
            "sys/fs/cgroup/kubepods/burstable/cpu.max": "max 100000",
            "sys/fs/cgroup/kubepods/burstable/pod7/web/memory.max": "max",
            "sys/fs/cgroup/kubepods/memory.max": str(2048 * MIB),
            "sys/fs/cgroup/other/memory.max": str(MIB),
        },
        1.5,
        2048 * MIB,
    ),
    "version 2, the path of the machine, and only the group mounted": (
        "0::/system.slice/docker-12.scope\n",
        V2.format(top="/system.slice/docker-12.scope", place="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "50000 100000", "sys/fs/cgroup/memory.max": str(MIB)},
        0.5,
        MIB,
    ),
    "version 2, a group outside of the namespace": (
        "0::/../../init.scope\n",
        V2.format(top="/../../web", place="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "300000 100000"},
        3.0,
        None,
    ),
    "version 1": (
        "5:memory:/docker/12\n4:cpu,cpuacct:/docker/12\n0::/\n",
        V1.format(top="/docker/12", place="/sys/fs/cgroup/memory", controllers="memory")
        + V1.format(top="/docker/12", place="/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct"),
        {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4096 * MIB),
        },
        4.0,
        4096 * MIB,
    ),
    "version 1 without limits": (
        "5:memory:/\n4:cpu:/\n",
        V1.format(top="/", place="/sys/fs/cgroup/memory", controllers="memory")
        + V1.format(top="/", place="/sys/fs/cgroup/cpu", controllers="cpu"),
        {
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
        None,
        None,
    ),
    "version 1, nested, beside an empty version 2": (
        "5:memory:/a/b\n4:cpu:/a/b\n1:name=systemd:/a\n0::/a\n",
        V1.format(top="/", place="/mnt/mem\\040ory", controllers="memory")
        + V1.format(top="/", place="/sys/fs/cgroup/cpu", controllers="cpu")
        + V2.format(top="/", place="/sys/fs/cgroup/unified"),
        {
            "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "25000",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "50000",
            "mnt/mem ory/a/b/memory.limit_in_bytes": str(700 * MIB),
            "mnt/mem ory/a/memory.limit_in_bytes": str(600 * MIB),
            "sys/fs/cgroup/unified/a/cgroup.procs": "1",
        },
        0.5,
        600 * MIB,
    ),
    "no system of files of the kernel": ("", "", {}, None, None),
    "files that hold something else": (
        "0::/\nnonsense\n",
        "short\n" + V2.format(top="/", place="/sys/fs/cgroup"),
        {"sys/fs/cgroup/cpu.max": "much 0", "sys/fs/cgroup/memory.max": "-3"},
        None,
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_limits_are_read(case: str, tmp_path: Path) -> None:
    groups, mounts, files, quota, limit = CASES[case]
    for name, text in {**files, "proc/self/cgroup": groups, "proc/self/mountinfo": mounts}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert container.cpu_quota(tmp_path) == quota
    assert container.memory_limit(tmp_path) == limit
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert container.memory(tmp_path) == min(limit or machine, machine)


@pytest.mark.parametrize(
    ("cores", "quota", "expected"), [(64, 2.0, 2), (64, 1.5, 2), (64, 0.1, 1), (2, 8.0, 2), (64, None, 64)]
)
def test_threads_are_those_that_can_run(
    cores: int, quota: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(threads, "_quota", lambda: quota)
    assert threads.usable_cores() == expected
    variables = threads.blas_variables()
    assert set(variables.values()) == ({str(expected)} if expected < cores else set())
    assert ("OPENBLAS_NUM_THREADS" in variables) == (expected < cores)
