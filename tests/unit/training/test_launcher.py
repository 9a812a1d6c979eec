from __future__ import annotations

import os

import pytest

from perturbscope.errors import InvalidParameterError
from training.launcher import Place, place

STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Place()),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Place(rank=1, world_size=4, local_rank=1)),
        ({"RANK": "1", "WORLD_SIZE": "4", **STEP}, Place(rank=1, world_size=4)),
        (
            {**STEP, "SLURM_STEP_NODELIST": "gpu[07-08,11],cpu1", "SLURM_JOB_ID": "40017"},
            Place(rank=3, world_size=8, local_rank=1, master=("gpu07", 15017)),
        ),
        (
            {**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gpu07", "SLURM_JOB_ID": "1"},
            Place(rank=3, world_size=8, local_rank=1, master=("127.0.0.1", 15001)),
        ),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Place()),
        (
            {**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            Place(rank=1, world_size=2, local_rank=1, master=("127.0.0.1", 15000 + os.getppid() % 20000)),
        ),
    ],
    ids=["alone", "torchrun", "torchrun in a step", "srun", "srun, one node", "one task", "mpirun"],
)
def test_the_place_comes_from_the_launcher(environ: dict[str, str], expected: Place) -> None:
    assert place(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, r"has 2 tasks \(SLURM_NTASKS\).*srun or torchrun"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK is 'first'"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "Set MASTER_ADDR and MASTER_PORT"),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is ''"),
    ],
)
def test_a_place_that_is_not_known_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        place(environ)
