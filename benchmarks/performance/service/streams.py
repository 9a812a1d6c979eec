"""Callers of the service benchmark that keep a stream open: one a file, at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.performance.service.inputs import RPC, Job, Outcome, pool
from perturbscope import protocol
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.protocol.protobuf_streams import (
    stream_answer_from_proto,
    stream_cells_to_proto,
    stream_start_to_proto,
)
from perturbscope.protocol.streams import StreamChunk, StreamOpened, StreamStart
from tests.arrow_client import stream_answers_from_arrow, stream_request_to_arrow


class Streams:
    """One stream a file, at the same time; a request of the job is a chunk."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._of = {source: [at for at, ask in enumerate(job.asks) if ask.source == source] for source in _names(job)}
        self._sent = {source: list(self._encoded(source)) for source in self._of}
        self._found: dict[str, list[Any]] = {}

    def _encoded(self, source: str) -> Iterator[bytes]:
        start = StreamStart(gene_ids=pool(source).gene_ids)
        chunks = [self._job.asks[at].cells() for at in self._of[source]]
        if self._job.way == "HTTP Arrow stream":
            for piece in stream_request_to_arrow(start, iter(chunks)):
                yield b"%x\r\n" % len(piece) + piece + b"\r\n"
            yield b"0\r\n\r\n"
        else:
            yield stream_start_to_proto(start).SerializeToString()
            for cells in chunks:
                yield stream_cells_to_proto(cells).SerializeToString()

    def run(self) -> Outcome:
        outcome = Outcome()
        started, cpu = time.perf_counter(), time.process_time()
        if self._job.way == "gRPC stream":
            asyncio.run(self._grpc())
        else:
            threads = [threading.Thread(target=self._http, args=(source,)) for source in self._of]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        outcome.wall, outcome.cpu = time.perf_counter() - started, time.process_time() - cpu
        vectors: dict[int, NDArray[np.float32]] = {}
        for source, numbers in self._of.items():
            vectors.update(zip(numbers, self._decoded(source), strict=True))
        outcome.vectors = [vectors[at] for at in sorted(vectors)]
        outcome.n_cells = sum(map(len, outcome.vectors))
        return outcome

    async def _grpc(self) -> None:
        import grpc

        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(self._job.address, options) as channel:
            method: Any = channel.stream_stream(RPC + "EmbedStream")

            async def sent(source: str) -> AsyncIterator[bytes]:
                for message in self._sent[source]:
                    yield message

            async def one(source: str) -> None:
                self._found[source] = [message async for message in method(sent(source))]

            await asyncio.gather(*map(one, self._of))

    def _http(self, source: str) -> None:
        connection = http.client.HTTPConnection(self._job.address, timeout=600)
        connection.putrequest("POST", "/v1/embed/stream")
        connection.putheader("content-type", protocol.ARROW)
        connection.putheader("transfer-encoding", "chunked")
        connection.endheaders()

        def send() -> None:
            for piece in self._sent[source]:
                connection.send(piece)

        sender = threading.Thread(target=send)
        sender.start()
        with contextlib.closing(connection), connection.getresponse() as response:
            self._found[source] = list(stream_answers_from_arrow(response))
        sender.join()

    def _decoded(self, source: str) -> list[NDArray[np.float32]]:
        answers = self._found[source]
        if self._job.way == "gRPC stream":
            opened: StreamOpened | None = None
            read = []
            for message in answers:
                answer = stream_answer_from_proto(pb.EmbedStreamAnswer.FromString(message), opened)
                opened = answer if isinstance(answer, StreamOpened) else opened
                read.append(answer)
            answers = read
        return [answer.embeddings.values for answer in answers if isinstance(answer, StreamChunk)]


def _names(job: Job) -> list[str]:
    return sorted({ask.source for ask in job.asks})
