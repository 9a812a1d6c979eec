"""The service is told to stop while it is busy."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
import uuid
from typing import Any

import grpc
import httpx

from benchmarks.reliability.inputs import real_cells
from benchmarks.reliability.trial import Trial, fault
from perturbscope import protocol
from perturbscope.protocol import EmbedRequest
from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import PerturbScopeStub

GRACE = 30
"""Seconds of the service's grace, its default."""


@fault("stopping", "SIGTERM under load")
async def stopping(trial: Trial) -> None:
    """Twelve callers over HTTP and twelve over gRPC embed one cell after the other, two more 500 cells each; every
    request with an id of its own. After some seconds the service gets SIGTERM. What clients got is then compared, id by
    id, with the service's own log of what it answered."""
    for _ in range(trial.plan.times(3, 1)):
        await _once(trial)


async def _once(trial: Trial) -> None:
    answered: dict[str, str] = {}
    stopped = asyncio.Event()
    with trial.service() as server:
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=120) as http,
            grpc.aio.insecure_channel(server.target) as channel,
        ):
            started: dict[str, float] = {}

            async def over_http(body: bytes) -> str:
                name = uuid.uuid4().hex[:16]
                started[name] = time.monotonic()
                headers = {"content-type": protocol.ARROW, "x-request-id": name}
                try:
                    reply = await http.post("/v1/embed", content=body, headers=headers)
                    answered[name] = "ok" if reply.status_code == 200 else _code(reply.content)
                except httpx.TransportError as error:
                    answered[name] = f"closed: {type(error).__name__}"
                return answered[name]

            async def over_grpc(message: Any) -> str:
                name = uuid.uuid4().hex[:16]
                started[name] = time.monotonic()
                try:
                    await PerturbScopeStub(channel).Embed(message, metadata=(("x-request-id", name),))
                    answered[name] = "ok"
                except grpc.aio.AioRpcError as error:
                    answered[name] = error.code().name
                return answered[name]

            async def caller(ask: Any, request: Any) -> None:
                # Until the service is gone: then there is nobody to ask.
                while not stopped.is_set():
                    if await ask(request) != "ok":
                        await asyncio.sleep(0.05)

            single, large = (EmbedRequest(cells=real_cells("papalexi", n)) for n in (1, 500))
            tasks = [asyncio.ensure_future(caller(over_http, protocol.request_to_arrow(single))) for _ in range(12)]
            tasks += [asyncio.ensure_future(caller(over_grpc, protocol.request_to_proto(single))) for _ in range(12)]
            tasks.append(asyncio.ensure_future(caller(over_http, protocol.request_to_arrow(large))))
            tasks.append(asyncio.ensure_future(caller(over_grpc, protocol.request_to_proto(large))))
            await asyncio.sleep(trial.plan.times(4, 2))
            in_flight = len(started) - len(answered)
            at = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            code = await asyncio.to_thread(server.process.wait, GRACE + 30)
            took = time.monotonic() - at
            stopped.set()
            await asyncio.gather(*tasks)
        for outcome in answered.values():
            trial.saw(outcome)
        finished = set(re.findall(r"[0-9a-f]{16}", "\n".join(_answered_lines(server.log))))
        lost = [name for name in finished & set(answered) if answered[name] != "ok"]
        trial.check(
            f"exit code {code}, {took:.1f} s after SIGTERM (within its grace of {GRACE} s)", code == 0 and took < GRACE
        )
        trial.check(
            f"{in_flight} requests were in flight; of {len(finished & set(answered))} that the service answered, "
            f"{len(lost)} did not reach their caller",
            not lost and in_flight > 0,
        )
        cut = [
            name
            for name, outcome in answered.items()
            if started[name] < at - 0.5 and outcome not in ("ok", "overloaded", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
        ]
        trial.check(f"no request that was accepted before SIGTERM was broken off ({len(cut)})", not cut)
        refusals = {outcome for outcome in answered.values() if outcome != "ok"}
        allowed = {"overloaded", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
        trial.check(
            f"the others were refused: {sorted(refusals)}",
            all(outcome in allowed or outcome.startswith("closed: ") for outcome in refusals),
        )


def _code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "no error of ours"


def _answered_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if re.search(r'code"?[=:] ?"?ok\b', line)]
