"""Clients over gRPC. grpc itself is imported when the first client is made."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

from perturbscope.cells.counts import CountMatrix
from perturbscope.client.access import Files, grpc_credentials, key_headers, leads_here, without_userinfo
from perturbscope.client.base import TIMEOUT, AsyncBase, SyncBase
from perturbscope.client.conversation import ChunkLimits, Failure, RetryPolicy
from perturbscope.client.grpc_stream import StreamCall
from perturbscope.client.methods import Conversations
from perturbscope.client.streams import chunks_of, each
from perturbscope.client.trace import trace_headers
from perturbscope.client.transports import grpc_answer, grpc_call, grpc_failure
from perturbscope.errors import InvalidParameterError
from perturbscope.inference.embeddings import Embeddings
from perturbscope.protocol.messages import Answer, Request

if TYPE_CHECKING:
    import grpc

# The server states its own limits; a client's would only hide them.
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class _OverGrpc(Conversations):
    """Settings of both clients over gRPC, checked, and the channel that is opened with them."""

    _is_asynchronous: ClassVar[bool]

    def __init__(
        self,
        target: str,
        *,
        model: str | None = None,
        timeout: float = TIMEOUT,
        retries: RetryPolicy | None = None,
        chunks: ChunkLimits | None = None,
        api_key: str | None = None,
        ca: Files | None = None,
        cert: tuple[Files, Files] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        seed: int | None = None,
    ) -> None:
        import grpc

        from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import PerturbScopeStub

        channels: Any = grpc
        if self._is_asynchronous:
            import grpc.aio

            channels = grpc.aio
        super().__init__(model=model, retries=retries, chunks=chunks, seed=seed)
        self._target, self._timeout = _checked_target(target), _checked_timeout(timeout)
        credentials = _credentials(target, ca, cert, credentials)
        self._metadata = _metadata(self._target, api_key, encrypted=credentials is not None)
        # A proxy of the environment would be asked to connect to itself, and would see the key.
        options = [*_OPTIONS, *([("grpc.enable_http_proxy", 0)] if leads_here(_host(self._target)) else [])]
        self._channel = (
            channels.insecure_channel(self._target, options)
            if credentials is None
            else channels.secure_channel(self._target, credentials, options)
        )
        self._stub = PerturbScopeStub(self._channel)
        self._methods: dict[str, Any] = {}
        self._rpc_error = grpc.RpcError

    def _call(self, request: Request) -> Any:
        """Begin the call of one request."""
        path, message, answer = grpc_call(request)
        if path not in self._methods:
            self._methods[path] = self._channel.unary_unary(
                path, request_serializer=type(message).SerializeToString, response_deserializer=answer.FromString
            )
        return self._methods[path](message, timeout=self._timeout, metadata=_traced(self._metadata))

    def _failure(self, error: grpc.RpcError) -> Failure:
        call = cast("Any", error)
        return grpc_failure(call.code().name, call.details(), call.trailing_metadata(), self._target)

    def _stream(self) -> StreamCall:
        method = partial(self._stub.EmbedStream, metadata=_traced(self._metadata))
        return StreamCall(method=method, target=self._target, timeout=self._timeout)


class GrpcClient(_OverGrpc, SyncBase):
    """A blocking client over gRPC.

    Parameters
    ----------
    target
        ``host:port``; ``grpc://`` may stand before it, or ``grpcs://`` for TLS.
    model
        Name of the model; None: the server's default.
    timeout
        Seconds to wait for one answer.
    retries
        When to try again.
    chunks
        Size of one request.
    api_key
        Key that is shown to the server; None: that of the environment (:mod:`perturbscope.client.access`); empty: none.
    ca, cert
        Files (PEM) of the authorities that are trusted, and of the client's own certificate and its private key; either
        means TLS. None: those of the environment, if the target is ``grpcs://``.
    credentials
        Credentials from ``grpc.ssl_channel_credentials``, for TLS of another kind.
    seed
        Seed of the jitter between tries.

    Raises
    ------
    InvalidParameterError
        `target` is empty or an address of another protocol, or another parameter is out of range.
    """

    _is_asynchronous = False

    def _exchange(self, request: Request) -> Answer:
        try:
            reply = self._call(request)
        except self._rpc_error as error:
            raise self._failure(error) from error
        return grpc_answer(request, reply)

    def embed_stream(
        self,
        chunks: Iterable[CountMatrix],
        *,
        outputs: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Embeddings]:
        """Embed a stream like :meth:`SyncBase.embed_stream`, in one call with messages in both directions."""
        flight, source, call = self._flight(outputs), chunks_of(chunks), self._stream()
        while not flight.done:
            try:
                yield from call.results(flight, source, progress)
            except Failure as failure:
                time.sleep(flight.retry(failure).seconds)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


class AsyncGrpcClient(_OverGrpc, AsyncBase):
    """An asynchronous client over gRPC, to be made where an event loop runs. See :class:`GrpcClient`."""

    _is_asynchronous = True

    async def _exchange(self, request: Request) -> Answer:
        try:
            reply = await self._call(request)
        except self._rpc_error as error:
            raise self._failure(error) from error
        return grpc_answer(request, reply)

    async def embed_stream(
        self,
        chunks: Iterable[CountMatrix] | AsyncIterable[CountMatrix],
        *,
        outputs: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> AsyncIterator[Embeddings]:
        """See :meth:`GrpcClient.embed_stream`; `chunks` may be either kind of iterable."""
        flight, source, call = self._flight(outputs), each(chunks), self._stream()
        while not flight.done:
            try:
                async with contextlib.aclosing(call.results_async(flight, source, progress)) as results:
                    async for result in results:
                        yield result
            except Failure as failure:
                await asyncio.sleep(flight.retry(failure).seconds)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def _checked_target(target: str) -> str:
    bare = target.removeprefix("grpc://").removeprefix("grpcs://")
    if not bare or "://" in bare or ("@" in bare and not bare.startswith("unix")):
        raise InvalidParameterError(
            f"{without_userinfo(target)!r} is not the address of a gRPC server; give host:port.", field="target"
        )
    return bare


def _host(target: str) -> str:
    """Host name or address of a target; localhost for a socket of this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return "localhost"
    scheme, _, rest = target.partition(":")
    target = rest.removeprefix("///") if scheme in ("dns", "ipv4", "ipv6") else target
    return target if target.count(":") > 1 and "]" not in target else target.rpartition(":")[0] or target


def _credentials(
    target: str, ca: Files | None, cert: tuple[Files, Files] | None, given: grpc.ChannelCredentials | None
) -> grpc.ChannelCredentials | None:
    if given is not None or not (target.startswith("grpcs://") or ca is not None or cert is not None):
        return given
    if target.startswith("grpc://"):
        raise InvalidParameterError(
            f"ca and cert are for grpcs://, and the address is {without_userinfo(target)}.", field="ca"
        )
    return grpc_credentials(ca, cert)


def _traced(metadata: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Metadata with the trace of this call."""
    return (*metadata, *trace_headers().items())


def _metadata(target: str, api_key: str | None, *, encrypted: bool) -> tuple[tuple[str, str], ...]:
    """The metadata of every call: the API key, if there is one."""
    return tuple(key_headers(api_key, _host(target), encrypted=encrypted).items())


def _checked_timeout(seconds: float) -> float:
    if not seconds > 0:
        raise InvalidParameterError(f"timeout is {seconds}; it must be above 0 seconds.", field="timeout")
    return seconds
