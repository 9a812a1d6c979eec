"""The disk fills up while a file is uploaded."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.reliability.inputs import Asker, is_right, real_cells, right_vectors
from benchmarks.reliability.trial import Trial, fault
from perturbscope.cells.counts import CountMatrix
from tests.fuzz.seeds import h5ad

SIZE = 2**20
"""Bytes of the small disk."""


@contextlib.contextmanager
def little_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of one MiB in memory; this needs the right to mount."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise OSError(f"a disk of one MiB cannot be mounted here ({done.stderr.strip()}); run as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@fault("disk", "Disk full while files are uploaded")
async def disk(trial: Trial) -> None:
    """The service's directory for uploads (TMPDIR) is on a disk of 1 MiB. Files of 3 MiB are uploaded, as body and as
    form, some at a time; JSON, Arrow and gRPC requests and small files are sent beside and after."""
    large = real_cells("pbmc3k", 400)
    size = len(h5ad(large))
    times = trial.plan.times(20, 3)
    with little_disk(trial.folder / "disk") as folder, trial.service(environ={"TMPDIR": str(folder)}) as server:
        async with Asker(server) as asker:
            cells, expected = real_cells("pbmc3k", 2), right_vectors("pbmc3k", 2)

            async def beside(way: str) -> bool:
                code, values = await trial.outcome(asker.ways[way](cells))
                return code == "ok" and is_right(values, expected)

            ways = ("HTTP JSON", "HTTP Arrow", "gRPC")
            right = [await beside(way) for way in (*ways, "HTTP h5ad", "HTTP form")]
            await asker.warm(real_cells("hill", 2))
            before = trial.before(server)
            refused: list[str] = []

            async def upload(way: str, matrix: CountMatrix) -> None:
                refused.append((await trial.outcome(asker.ways[way](matrix)))[0])

            for number in range(times):
                way = ("HTTP h5ad", "HTTP form")[number % 2]
                work = [upload(way, large), upload(way, large), *(beside(way) for way in ways)]
                right += [bool(found) for found in (await asyncio.gather(*work))[2:]]
            left = sorted(path.name for path in folder.glob("perturbscope-uploads-*/*") if path.name != "lock")
            trial.check(
                f"{len(refused)} uploads of {size / 2**20:.1f} MiB were refused with a typed error ({set(refused)})",
                "ok" not in refused and len(set(refused)) == 1,
            )
            trial.check(f"no partial file is left ({left or 'none'})", not left)
            right += [await beside(way) for way in (*ways, "HTTP h5ad", "HTTP form")]
            trial.check(f"all {len(right)} other requests, before, beside and after, were answered rightly", all(right))
            trial.all_typed()
        trial.after(server, before)
