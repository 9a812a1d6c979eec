"""The service is killed while it computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.reliability.inputs import Asker, is_right, real_cells, right_vectors
from benchmarks.reliability.trial import Trial, fault
from perturbscope.cells.counts import CountMatrix
from perturbscope.client import RetryPolicy
from tests.integration.server import RunningServer

CELLS = 200
PATIENT = RetryPolicy(attempts=20, first=0.5, longest=4.0)
"""Retries that last until a service has started again."""


class Supervisor(threading.Thread):
    """A thread that starts the service again when it has ended, as systemd or Kubernetes would."""

    def __init__(self, server: RunningServer) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._stopped = threading.Event()
        self.restarts = 0

    def run(self) -> None:
        while not self._stopped.is_set():
            self._server.process.wait()
            if not self._stopped.is_set():
                self.restarts += 1
                self._server.launch()

    def stop(self) -> None:
        """Start the service no more; called before it is stopped."""
        self._stopped.set()


@fault("killed", "kill -9 in the middle of requests")
async def killed(trial: Trial) -> None:
    """Eight requests are in flight: over HTTP with JSON and with Arrow, over gRPC, and as a stream of ten chunks, each
    with a client that tries again and with one that does not. Then every process of the service gets SIGKILL, and a
    supervisor starts it anew. The same again with SIGKILL for the worker alone, which BentoML's own supervisor
    replaces."""
    cells, expected = real_cells("pbmc3k", CELLS), right_vectors("pbmc3k", CELLS)
    with trial.service() as server:
        supervisor = Supervisor(server)
        supervisor.start()
        retried: list[bool] = []
        try:
            for _ in range(trial.plan.times(3, 1)):
                for whole in (True, False):
                    await _once(trial, server, whole, cells, expected, retried)
            trial.row.service.append(f"started again {supervisor.restarts} times by the supervisor")
            trial.check("the service is alive and ready at the end", server.answers("/readyz"))
        finally:
            supervisor.stop()
    trial.check(
        f"clients that try again got the right vectors of all {CELLS} cells ({sum(retried)} of {len(retried)})",
        all(retried),
    )
    failed = {code: n for code, n in trial.seen.items() if code != "ok"}
    trial.check(f"clients that do not got a typed error ({failed})", set(failed) == {"server_unreachable"})


def _asked(asker: Asker, cells: CountMatrix) -> list[Awaitable[NDArray[np.float32]]]:
    """Send the same cells over every interface."""
    return [*(asker.ways[name](cells) for name in ("HTTP JSON", "HTTP Arrow", "gRPC")), _streamed(asker, cells)]


async def _streamed(asker: Asker, cells: CountMatrix) -> NDArray[np.float32]:
    chunks = [cells[start : start + 20] for start in range(0, len(cells), 20)]
    return np.concatenate([part.values async for part in asker.grpc.embed_stream(chunks)])


async def _once(
    trial: Trial, server: RunningServer, whole: bool, cells: Any, expected: Any, retried: list[bool]
) -> None:
    async with Asker(server) as hasty, Asker(server, retries=PATIENT) as patient:
        first = [asyncio.ensure_future(trial.outcome(ask)) for ask in _asked(hasty, cells)]
        second = [asyncio.ensure_future(trial.outcome(ask)) for ask in _asked(patient, cells)]
        await asyncio.sleep(1.5)
        finished = sum(task.done() for task in (*first, *second))
        trial.check(f"requests were in flight when it was killed ({len(first + second) - finished})", finished == 0)
        await asyncio.to_thread(server.kill if whole else server.worker().kill)
        await asyncio.gather(*first)
        for code, values in await asyncio.gather(*second):
            retried.append(code == "ok" and is_right(values, expected))
        await asyncio.to_thread(server.wait_until_ready)
