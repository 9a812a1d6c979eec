"""Streams of cells over gRPC."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError
from perturbscope.protocol.protobuf_streams import (
    stream_answer_to_proto,
    stream_cells_from_proto,
    stream_start_from_proto,
)
from perturbscope.protocol.streams import StreamAnswer, StreamStart
from serving.access.limits import Held
from serving.call import GROWTH, Call
from serving.engine.engine import Engine
from serving.engine.streams import answer_stream, check_chunk
from serving.grpc.edge import streamed
from serving.grpc.received import Incoming


class GrpcPipe:
    """The messages of one ``EmbedStream`` call; see :class:`serving.engine.streams.Pipe`."""

    def __init__(self, requests: Incoming, context: Any, call: Call, held: Held, limit: int) -> None:
        self._requests, self._context, self._call, self._held, self._limit = requests, context, call, held, limit

    async def start(self) -> tuple[Any, int]:
        """See :meth:`Pipe.start`."""
        found = await self.next()
        if found is None:
            raise InvalidParameterError("The stream has no message; it begins with a `start`.", field="start")
        return found

    async def next(self) -> tuple[Any, int] | None:
        """See :meth:`Pipe.next`."""
        sent = await self._requests.next(self._call)
        if sent is None:
            return None
        n_bytes = len(sent)
        check_chunk(n_bytes, self._limit)
        self._held(n_bytes)
        message = await sent.decoded(self._held)
        # Only the first message has items, the genes, which the stream keeps in another form.
        self._held.release_reserved(sent.items)
        return message, n_bytes

    def weigh_start(self, message: Any) -> int:
        """See :meth:`Pipe.weigh_start`. The genes of a message were counted before it was decoded."""
        return GROWTH * int(message.ByteSize())

    def decode_start(self, message: Any) -> StreamStart:
        """See :meth:`Pipe.decode_start`."""
        return stream_start_from_proto(message)

    def decode(self, message: Any, genes: NDArray[np.str_], first_row: int) -> CountMatrix:
        """See :meth:`Pipe.decode`."""
        return stream_cells_from_proto(message, genes, first_row)

    def encode(self, answer: StreamAnswer) -> Any:
        """See :meth:`Pipe.encode`."""
        return stream_answer_to_proto(answer)

    async def write(self, message: Any) -> None:
        """See :meth:`Pipe.write`."""
        await self._context.write(message)


async def embed_stream(engine: Engine, call: Call, requests: Incoming, context: Any) -> None:
    """Answer one stream; grpc.aio cancels this when the caller does, or its deadline passes."""

    async def answer(call: Call, held: Held) -> None:
        await answer_stream(engine, call, held, GrpcPipe(requests, context, call, held, engine.settings.chunk_bytes))

    await streamed(engine.front, call, context, answer)
