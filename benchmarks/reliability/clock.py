"""The machine's clock jumps."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import grpc

from benchmarks.reliability.inputs import Asker, is_right, real_cells, right_vectors
from benchmarks.reliability.trial import Trial, fault
from perturbscope import protocol
from perturbscope.protocol import EmbedRequest
from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import PerturbScopeStub

LIBRARIES = tuple(
    Path(f"/usr/lib/{machine}-linux-gnu/faketime/libfaketimeMT.so.1") for machine in ("x86_64", "aarch64")
)
"""Library of Debian's package faketime."""
JUMPS = ("+3600", "-3600", "+86400", "-86400", "+0", "+31536000", "-7200", "+0")
"""Offsets from the true time in seconds, one after the other."""
DEADLINE = 30
"""Deadline of every request in seconds: far longer than it takes, far shorter than the jumps."""


@fault("clock", "The clock jumps, forward and backward")
async def clock(trial: Trial) -> None:
    """The service runs under libfaketime, which stands for the kernel's wall clock in every part of it (Python, gRPC's
    core, ONNX Runtime), and jumps by an hour, a day and a year, forward and backward. Callers embed over HTTP and gRPC
    without a pause, each with a deadline of 30 s, and some with one that is too short."""
    library = next((path for path in LIBRARIES if path.exists()), None)
    if library is None:
        raise FileNotFoundError("libfaketime is needed: apt-get install faketime")
    now = trial.folder / "now"
    now.write_text("+0\n")
    environ = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(now),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_RESET": "1",
    }
    with trial.service(environ=environ) as server:
        async with Asker(server) as asker, grpc.aio.insecure_channel(server.target) as channel:
            cells, expected = real_cells("papalexi", 20), right_vectors("papalexi", 20)
            before = trial.before(server)
            stop, wrong, slowest = asyncio.Event(), 0, 0.0
            body = protocol.request_to_arrow(EmbedRequest(cells=cells))
            message = protocol.request_to_proto(EmbedRequest(cells=cells))

            async def over_http() -> Any:
                headers = {"content-type": protocol.ARROW, "accept": protocol.ARROW, "x-request-timeout": str(DEADLINE)}
                reply = await asker.post("/v1/embed", content=body, headers=headers)
                return (
                    protocol.answer_from_arrow(protocol.EmbedAnswer, reply.content).values
                    if reply.status_code == 200
                    else reply.text
                )

            async def over_grpc() -> Any:
                reply = await PerturbScopeStub(channel).Embed(message, timeout=DEADLINE)
                return protocol.answer_from_proto(protocol.EmbedAnswer, reply).values

            async def caller(ask: Any) -> None:
                nonlocal wrong, slowest
                while not stop.is_set():
                    started = time.monotonic()
                    code, values = await trial.outcome(ask())
                    slowest = max(slowest, time.monotonic() - started)
                    wrong += code == "ok" and (isinstance(values, str) or not is_right(values, expected))
                    await asyncio.sleep(0.01)

            early: list[str] = []

            async def too_short() -> None:
                while not stop.is_set():
                    started = time.monotonic()
                    try:
                        await PerturbScopeStub(channel).Embed(message, timeout=0.001)
                        early.append("answered")
                    except grpc.aio.AioRpcError as error:
                        late = time.monotonic() - started
                        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED or late > 5:
                            early.append(f"{error.code().name} after {late:.1f} s")
                    await asyncio.sleep(0.2)

            callers = [asyncio.ensure_future(caller(ask)) for ask in (over_http, over_grpc) * 3]
            callers.append(asyncio.ensure_future(too_short()))
            seen = set()
            for jump in JUMPS[: trial.plan.times(len(JUMPS), 3)]:
                now.write_text(f"{jump}\n")
                await asyncio.sleep(trial.plan.times(4, 3))
                seen.add(_date_of(server.log))
            stop.set()
            await asyncio.gather(*callers)
            failed = {code: n for code, n in trial.seen.items() if code != "ok"}
            trial.check(
                f"the service's own log dates requests to {len(seen)} days: it did see the jumps", len(seen) > 1
            )
            trial.check(f"all {trial.seen['ok']:,} requests were answered ({failed or 'no failure'})", not failed)
            trial.check(f"and rightly ({wrong} wrong)", not wrong)
            trial.check(f"the slowest took {slowest:.1f} s: none waited for the clock", slowest < DEADLINE / 2)
            trial.check(f"deadlines that were too short ended at once ({early[:3] or 'all'})", not early)
            now.write_text("+0\n")
            await asyncio.sleep(2)
        trial.after(server, before)


def _date_of(log: str) -> str:
    """Return the day of the last request in the log."""
    days = re.findall(r"\d{4}-\d\d-\d\d", log)
    return str(days[-1]) if days else ""
