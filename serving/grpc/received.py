"""Messages that are read once their caller was let in, and decoded once there is room for what is in them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from perturbscope.errors import InvalidParameterError, LimitExceededError, UnreadableFileError
from serving.access.limits import Held
from serving.call import GROWTH, Call
from serving.engine.engine import Engine
from serving.grpc.inflow import Inflow
from serving.grpc.weight import weigh

Work = Callable[..., Awaitable[Any]]
"""Runs a function on a worker thread; see :meth:`serving.engine.engine.Engine.work`."""
_FEWER = "Send fewer labels, genes, pairs or parameters in one message."


class Message:
    """A message as it was sent, not decoded yet.

    Parameters
    ----------
    data
        Its bytes.
    kind
        Class of the message.
    work
        Decodes what is large on a worker thread.
    """

    def __init__(self, data: bytes, kind: Any, work: Work) -> None:
        self._data, self._kind, self._work = data, kind, work
        self.items = 0
        """Bytes that are held for its items, once it is decoded."""

    def __len__(self) -> int:
        return len(self._data)

    async def decoded(self, held: Held) -> Any:
        """Decode the message, after holding memory for the items in it; those who read it hold its bytes.

        Raises
        ------
        UnreadableFileError
            The bytes are no message of this kind.
        OverloadedError, LimitExceededError
            The items need more memory than there is.
        """
        if not self._data:
            return self._kind()
        try:
            items = await self._work(weigh, self._data, self._kind.DESCRIPTOR, held.limit)
            held.reserve(items, _FEWER)
            self.items = items
            return await self._work(self._kind.FromString, self._data)
        except DecodeError as error:
            why = str(error)[:200].rstrip(".")
            raise UnreadableFileError(f"The message is no protobuf of this method: {why}.", field="body") from error
        finally:
            self._data = b""


class Incoming:
    """The messages of a call, which gRPC has not read yet: they lie with the caller until they are asked for.

    Parameters
    ----------
    context
        The call's context of grpc.aio.
    kind
        Class of the messages.
    engine
        Has the limits, and the threads that decode.
    inflow
        Reads.
    """

    def __init__(self, context: Any, kind: Any, engine: Engine, inflow: Inflow) -> None:
        self._context, self._kind, self._engine, self._inflow = context, kind, engine, inflow

    async def next(self, call: Call, patience: float | None = None) -> Message | None:
        """Read a message of a caller that was let in; None at the end. Raises as :meth:`Inflow.read`."""
        data = await self._inflow.read(self._context, call.caller.name, patience)
        return None if data is grpc.aio.EOF else Message(data, self._kind, self._engine.work)

    async def only(self, call: Call, held: Held) -> Any:
        """Read and decode the one message of a call. The memory of its bytes, and for decoding them, is held from then.

        Raises
        ------
        InvalidParameterError
            There is none.
        LimitExceededError
            It did not arrive in time.
        PerturbScopeError
            As :meth:`next` and :meth:`Message.decoded`.
        """
        patience = self._engine.settings.body_timeout
        with call.stage("receive"):
            try:
                message = await self.next(call, patience)
            except TimeoutError as error:
                raise LimitExceededError(
                    f"The message did not arrive within {patience} seconds. Send less at a time.", field="body"
                ) from error
        if message is None:
            raise InvalidParameterError("The call ended without a message that could be read.", field="body")
        held(len(message))
        held.reserve(GROWTH * len(message))
        with call.stage("decode"):
            return await message.decoded(held)
