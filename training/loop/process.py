"""One process of a run: its rank, its device, and how the processes find each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from perturbscope.errors import InvalidParameterError, ProviderUnavailableError
from perturbscope.threads import usable_cores
from training.config.stages import LoopConfig
from training.launcher import place

_PATIENCE = timedelta(hours=24)
"""Longest time that other processes wait while the first one prepares data."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """Rank and device of this process among the others."""

    rank: int
    world_size: int
    device: torch.device
    _waiting: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process builds data, prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def first(self, body: Callable[[], None]) -> None:
        """Run `body` in the first process while the others wait, if necessary for hours."""
        if self.is_first:
            body()
        if self.world_size > 1:
            dist.barrier(group=self._waiting)

    def any(self, flag: int) -> int:
        """Return the largest flag of all processes."""
        if self.world_size == 1:
            return flag
        largest = torch.tensor([flag], device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def mean(self, values: list[float]) -> list[float]:
        """Return the mean of each value over the processes."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) / self.world_size for value in total.cpu()]


def join(config: LoopConfig) -> Process:
    """Find the place of this process (:func:`training.launcher.place`), and join the other processes.

    Raises
    ------
    InvalidParameterError
        There are several processes and no DeepSpeed configuration, or their places are not known.
    ProviderUnavailableError
        CUDA was asked for, and torch finds no device.
    """
    here = place()
    rank, world_size = here.rank, here.world_size
    if world_size > 1 and config.deepspeed is None:
        raise InvalidParameterError(
            f"{world_size} processes were started, but loop.deepspeed names no DeepSpeed JSON file. "
            "Set it, e.g. --set loop.deepspeed=training/configs/zero1.json, or start one process.",
            field="loop.deepspeed",
        )
    device = _device(config, here.local_rank)
    here.export()
    # torch counts the cores of the machine, and knows nothing of a container's quota.
    torch.set_num_threads(config.threads or min(torch.get_num_threads(), usable_cores()))
    if config.deepspeed is None:
        return Process(rank=rank, world_size=world_size, device=device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if world_size == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
    waiting = dist.new_group(backend="gloo", timeout=_PATIENCE) if world_size > 1 else None
    return Process(rank=rank, world_size=world_size, device=device, _waiting=waiting)


def leave() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(config: LoopConfig, local_rank: int) -> torch.device:
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ProviderUnavailableError(
            "device is cuda, but torch finds no CUDA device here. Install torch with CUDA and its driver, or set "
            "loop.device=cpu.",
            field="loop.device",
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        if config.precision == "fp16":
            raise InvalidParameterError(
                "fp16 needs a CUDA device. Choose fp32 or bf16 on a CPU.", field="loop.precision"
            )
        return torch.device("cpu")
    device = torch.device("cuda", local_rank) if config.device in {"auto", "cuda"} else torch.device(config.device)
    torch.cuda.set_device(device)
    return device
