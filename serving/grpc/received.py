"""Messages that are read once their caller was let in, and decoded once there is room for what is in them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from perturbscope.errors import InvalidParameterError, LimitExceededError, UnreadableFileError
from serving.access.limits import Held
from serving.call import GROWTH, Call
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


class Unread:
    """The only message of a call, which gRPC has not read yet: it lies with the caller until it is asked for.

    Parameters
    ----------
    context
        The call's context of grpc.aio.
    kind
        Class of the message.
    work
        Decodes what is large on a worker thread.
    patience
        Seconds within which the message must arrive.
    """

    def __init__(self, context: Any, kind: Any, work: Work, patience: float) -> None:
        self._context, self._kind, self._work, self._patience = context, kind, work, patience

    async def message(self, call: Call, held: Held) -> Any:
        """Read and decode the message. The memory of its bytes, and for decoding them, is held from here on.

        Raises
        ------
        InvalidParameterError
            There is none.
        LimitExceededError
            It did not arrive in time.
        PerturbScopeError
            As :meth:`Message.decoded`.
        """
        with call.stage("receive"):
            try:
                async with asyncio.timeout(self._patience):
                    data = await self._context.read()
            except TimeoutError as error:
                raise LimitExceededError(
                    f"The message did not arrive within {self._patience} seconds. Send less at a time.", field="body"
                ) from error
        if data is grpc.aio.EOF:
            raise InvalidParameterError("The call ended without a message that could be read.", field="body")
        held(len(data))
        held.reserve(GROWTH * len(data))
        with call.stage("decode"):
            return await Message(data, self._kind, self._work).decoded(held)
