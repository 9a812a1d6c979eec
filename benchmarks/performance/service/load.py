"""The callers of the service benchmark: a process of its own that sends requests which were encoded before.

On a machine of two cores a client library would take time from the service, so bodies are encoded before the clock
starts, and answers are decoded and compared after it has stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.harness import Child
from benchmarks.performance.service.inputs import RPC, STREAMS, Ask, Job, Outcome, Way, embedder
from benchmarks.performance.service.streams import Streams
from perturbscope import protocol
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb

_HTTP: dict[Way, tuple[str, str]] = {
    "HTTP JSON": ("/v1/embed", protocol.JSON),
    "HTTP Arrow": ("/v1/embed", protocol.ARROW),
    "BentoML batchable": ("/embed", protocol.JSON),
}
CALLERS = 16
"""Number of requests in progress at saturation."""
PIECE = 100
"""Most cells of one request to the BentoML endpoint, which is its max_batch_size."""


class Callers:
    """The callers' process; it does one job after the other."""

    def __enter__(self) -> Self:
        self._child = Child(_serve)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.close()

    def do(self, job: Job) -> Outcome:
        """Do a job and return its result."""
        self._child.send(job)
        outcome: Outcome = self._child.receive()
        return outcome


def _serve(pipe: Any) -> None:
    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        pipe.send(_run(job))


def _run(job: Job) -> Outcome:
    if job.way in STREAMS:
        return Streams(job).run()
    return asyncio.run(_unary(job, [encoded(job.way, ask) for ask in job.asks]))


def encoded(way: Way, ask: Ask) -> list[bytes]:
    """Encode one request; it becomes several bodies if the service does not take so many cells at once."""
    cells = ask.cells()
    if way == "BentoML batchable":
        return [_token_body(cells[start : start + PIECE]) for start in range(0, len(cells), PIECE)]
    request = protocol.EmbedRequest(cells=cells)
    if way == "gRPC":
        return [protocol.request_to_proto(request).SerializeToString()]
    return [protocol.request_to_json(request) if way == "HTTP JSON" else protocol.request_to_arrow(request)]


def _token_body(cells: Any) -> bytes:
    """Tokens padded to the model's longest length, since BentoML can only join arrays of one width."""
    import json

    found = embedder()
    tokens = found.tokenize(cells)
    (spec,) = found.family.inputs
    padded = np.full((len(tokens), found.family.max_length), int(spec.pad_value), dtype=np.int64)
    for row, cell in enumerate(tokens):
        padded[row, : len(cell[spec.name])] = cell[spec.name]
    return json.dumps({"tokens": padded.tolist()}, separators=(",", ":")).encode()


async def _unary(job: Job, bodies: list[list[bytes]]) -> Outcome:
    outcome = Outcome()
    answers: dict[int, list[bytes]] = {}
    host, _, port = job.address.partition(":")
    async with contextlib.AsyncExitStack() as stack:
        if job.way == "gRPC":
            import grpc

            options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(job.address, options))
            await channel.channel_ready()
            method: Any = channel.unary_unary(RPC + "Embed")
            spare: list[_Connection] = []

            async def ask_one(body: bytes) -> bytes:
                answer: bytes = await method(body)
                return answer
        else:
            path, kind = _HTTP[job.way]
            # More callers than connections wait in line here, which counts as their latency.
            spare = [await _Connection.open(host, int(port), path, kind) for _ in range(max(job.callers, 128))]
            free: asyncio.Queue[_Connection] = asyncio.Queue()
            for connection in spare:
                stack.callback(connection.close)
                free.put_nowait(connection)

            async def ask_one(body: bytes) -> bytes:
                connection = await free.get()
                try:
                    return await connection.ask(body)
                finally:
                    free.put_nowait(connection)

        async def ask(at: int, due: float) -> None:
            parts = bodies[at]
            found = [await ask_one(parts[0])] if len(parts) == 1 else await asyncio.gather(*map(ask_one, parts))
            outcome.latency.append(time.perf_counter() - due)
            outcome.sizes.append(len(job.asks[at].rows))
            if not job.rate:
                answers[at] = found

        async def caller(left: deque[int]) -> None:
            while left:
                await ask(left.popleft(), time.perf_counter())
                if job.pause:
                    await asyncio.sleep(job.pause)

        started, cpu = time.perf_counter(), time.process_time()
        if job.rate:
            await _at_a_rate(job, ask)
        else:
            left = deque(range(len(bodies)))
            await asyncio.gather(*(caller(left) for _ in range(job.callers)))
        outcome.wall, outcome.cpu = time.perf_counter() - started, time.process_time() - cpu
    outcome.n_cells = sum(outcome.sizes)
    outcome.vectors = [np.concatenate([decoded(job.way, part) for part in answers[at]]) for at in sorted(answers)]
    return outcome


async def _at_a_rate(job: Job, ask: Any) -> None:
    rng = np.random.default_rng(3)
    gaps = rng.exponential(1.0, size=max(1, round(job.rate * job.seconds)))
    # Scaled, so that the mean rate is the one asked for: what is left to chance is how requests crowd.
    due = np.cumsum(gaps) * (job.seconds / gaps.sum())
    started = time.perf_counter()
    tasks = []
    for number, at in enumerate(due.tolist()):
        if (wait := started + at - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.ensure_future(ask(number % len(job.asks), started + at)))
    await asyncio.gather(*tasks)


def decoded(way: Way, answer: bytes) -> NDArray[np.float32]:
    """Return the vectors of an answer."""
    if way == "BentoML batchable":
        import json

        return np.asarray(json.loads(answer), dtype=np.float32)
    if way == "gRPC":
        return protocol.answer_from_proto(protocol.EmbedAnswer, pb.EmbedAnswer.FromString(answer)).values
    decode = (
        partial(protocol.answer_from_json, protocol.EmbedAnswer)
        if way == "HTTP JSON"
        else partial(protocol.answer_from_arrow, protocol.EmbedAnswer)
    )
    return decode(answer).values


class _Connection:
    """One HTTP connection, kept open, and opened again after the service has closed it for being idle."""

    def __init__(self, host: str, port: int, head: bytes) -> None:
        self._host, self._port, self._head = host, port, head
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, host: str, port: int, path: str, kind: str) -> _Connection:
        head = f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: {kind}\r\naccept: {kind}\r\n"
        connection = cls(host, port, head.encode())
        await connection._connect()
        return connection

    async def _connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)

    async def _send(self, body: bytes) -> bytes:
        """Send a request, and return the head of its answer."""
        self._writer.write(self._head + b"content-length: %d\r\n\r\n" % len(body) + body)
        return (await self._reader.readuntil(b"\r\n\r\n")).lower()

    async def ask(self, body: bytes) -> bytes:
        try:
            head = await self._send(body)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.close()
            await self._connect()
            head = await self._send(body)
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        answer = await self._reader.readexactly(length)
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise ConnectionError(f"{head[:60]!r}: {answer[:300]!r}")
        return answer

    def close(self) -> None:
        self._writer.close()
