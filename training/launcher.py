"""Rank and number of the processes of a run, as torchrun, DeepSpeed, Slurm or Open MPI tell each of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from perturbscope.errors import InvalidParameterError

_FIRST_PORT, _PORTS = 15000, 20000
"""Ports at which the first process may wait for the others, if the launcher names none."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Place of this process among those of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Number of this process among those of its machine, which is the number of its GPU."""
    master: tuple[str, int] | None = None
    """Host and port of the first process, if the launcher has not put them into the environment."""

    def export(self) -> None:
        """Put the place where torch.distributed and DeepSpeed look for it."""
        if self.world_size == 1:
            return
        for name, value in (("RANK", self.rank), ("WORLD_SIZE", self.world_size), ("LOCAL_RANK", self.local_rank)):
            os.environ[name] = str(value)
        if self.master is not None:
            os.environ.setdefault("MASTER_ADDR", self.master[0])
            os.environ.setdefault("MASTER_PORT", str(self.master[1]))


def place(environ: Mapping[str, str] | None = None) -> Place:
    """Return the place of this process; the only one if no launcher has started it.

    ``RANK`` and ``WORLD_SIZE`` (torchrun, DeepSpeed) come before Slurm's variables of a step, and these before Open
    MPI's.

    Parameters
    ----------
    environ
        Environment; that of the process by default.

    Raises
    ------
    InvalidParameterError
        There are several tasks, and nothing says which of them this process is, or where the first one is.
    """
    values = os.environ if environ is None else environ
    if "RANK" in values or "WORLD_SIZE" in values:
        return _torch(values)
    if "SLURM_STEP_ID" in values or "SLURM_STEP_NUM_TASKS" in values:
        return _slurm(values)
    if "OMPI_COMM_WORLD_SIZE" in values:
        return _open_mpi(values)
    tasks = _number(values, "SLURM_NTASKS", default=1)
    if tasks > 1:
        raise InvalidParameterError(
            f"This Slurm job has {tasks} tasks (SLURM_NTASKS), and this process is not one of a step, so that each of "
            "them would train alone. Start it with srun or torchrun, or give the job one task (--ntasks=1).",
            field="loop",
        )
    return Place()


def _torch(values: Mapping[str, str]) -> Place:
    world_size = _number(values, "WORLD_SIZE", default=1)
    if world_size > 1 and "RANK" not in values:
        raise InvalidParameterError(
            f"WORLD_SIZE is {world_size} and RANK is not set, so that every process would be the first. Start them "
            "with torchrun, or set RANK.",
            field="loop",
        )
    rank = _number(values, "RANK", default=0)
    if rank >= world_size:
        raise InvalidParameterError(
            f"RANK is {rank} and WORLD_SIZE is {world_size}; ranks are counted from 0. Set both, or neither.",
            field="loop",
        )
    return Place(rank=rank, world_size=world_size, local_rank=_number(values, "LOCAL_RANK", default=0))


def _slurm(values: Mapping[str, str]) -> Place:
    world_size = _number(values, "SLURM_STEP_NUM_TASKS", default=_number(values, "SLURM_NTASKS", default=1))
    if world_size == 1:
        return Place()
    nodes = values.get("SLURM_STEP_NODELIST") or values.get("SLURM_JOB_NODELIST") or ""
    alone = _number(values, "SLURM_STEP_NUM_NODES", default=0) == 1
    port = _FIRST_PORT + _number(values, "SLURM_JOB_ID", default=0) % _PORTS
    return Place(
        rank=_number(values, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(values, "SLURM_LOCALID", default=0),
        master=("127.0.0.1" if alone else _master(values, _first_host(nodes)), port),
    )


def _open_mpi(values: Mapping[str, str]) -> Place:
    world_size = _number(values, "OMPI_COMM_WORLD_SIZE")
    if world_size == 1:
        return Place()
    alone = _number(values, "OMPI_COMM_WORLD_LOCAL_SIZE", default=0) == world_size
    # All processes of one machine have one parent, and two runs on it have two.
    port = _FIRST_PORT + os.getppid() % _PORTS
    return Place(
        rank=_number(values, "OMPI_COMM_WORLD_RANK"),
        world_size=world_size,
        local_rank=_number(values, "OMPI_COMM_WORLD_LOCAL_RANK", default=0),
        master=("127.0.0.1" if alone else _master(values, ""), port),
    )


def _master(values: Mapping[str, str], found: str) -> str:
    """Return the host of the first process."""
    host = values.get("MASTER_ADDR") or found
    if not host:
        raise InvalidParameterError(
            "The processes are on several machines, and nothing names that of the first one. Set MASTER_ADDR and "
            "MASTER_PORT for all of them.",
            field="loop",
        )
    return host


def _first_host(nodes: str) -> str:
    """Return the first host of a Slurm list: ``gpu01`` of ``gpu[01-04,07],cpu1``."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return "" if found is None else "".join(part or "" for part in found.groups())


def _number(values: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = values.get(name, "").strip()
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise InvalidParameterError(
            f"The environment variable {name} is {text!r}; a launcher sets it to a number. Unset it, or start the "
            "processes with torchrun.",
            field="loop",
        )
    return int(text)
