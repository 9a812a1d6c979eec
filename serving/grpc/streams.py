"""Streams of cells over gRPC."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
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
from serving.access.front import Front
from serving.access.limits import Held
from serving.call import Call
from serving.engine.engine import Engine
from serving.engine.streams import answer_stream, check_chunk
from serving.grpc.edge import abort

_LAST_WORDS = 5.0
"""Seconds within which a status must be sent; one behind answers that nobody reads never is."""


class GrpcPipe:
    """The messages of one ``EmbedStream`` call; see :class:`serving.engine.streams.Pipe`."""

    def __init__(self, context: Any, held: Held, limit: int) -> None:
        self._context, self._held, self._limit = context, held, limit

    async def start(self) -> tuple[Any, int]:
        """See :meth:`Pipe.start`."""
        found = await self.next()
        if found is None:
            raise InvalidParameterError("The stream has no message; it begins with a `start`.", field="start")
        return found

    async def next(self) -> tuple[Any, int] | None:
        """See :meth:`Pipe.next`."""
        message = await self._context.read()
        if message is grpc.aio.EOF:
            return None
        n_bytes = message.ByteSize()
        check_chunk(n_bytes, self._limit)
        self._held(n_bytes)
        return message, n_bytes

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


async def embed_stream(engine: Engine, call: Call, context: Any) -> None:
    """Answer one stream; grpc.aio cancels this when the caller does, or its deadline passes."""
    try:
        async with engine.front.admitted(call) as held:
            await answer_stream(engine, call, held, GrpcPipe(context, held, engine.settings.chunk_bytes))
    except Exception as error:  # noqa: BLE001  the edge of the server: every request gets an answer
        async with asyncio.timeout(_LAST_WORDS):
            await abort(error, call, context)
    except BaseException:
        Front.finish(call, "CANCELLED", "client_gone")
        raise
    Front.finish(call, "OK")
