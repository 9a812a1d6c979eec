"""The gRPC server: the same engine, on the same event loop, as HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from perturbscope import protocol
from perturbscope.operations import OPERATIONS
from perturbscope.protocol.descriptors import method_of
from perturbscope.protocol.operations import Operation
from perturbscope.protocol.proto import perturbscope_v1_pb2 as messages
from perturbscope.protocol.protobuf import message_class
from serving.access import tls
from serving.access.limits import LAST_WORDS, Held
from serving.call import Call
from serving.engine.engine import Engine
from serving.engine.operations import Served, served
from serving.grpc.edge import answered, begin
from serving.grpc.health import Health
from serving.grpc.interceptors import KeyInterceptor, MessageInterceptor
from serving.grpc.received import Incoming
from serving.grpc.reflection import Reflection
from serving.grpc.streams import embed_stream
from serving.settings import PREFIX, Settings

SERVICE: str = messages.DESCRIPTOR.services_by_name["PerturbScope"].full_name
_ENVELOPE = 64 * 2**10
"""Bytes of room for what is around the counted bytes of a message."""

Register = Callable[[Any], str]
"""Adds a service to a server of grpc.aio, and returns the service's full name."""
KEEPALIVE = 30
"""Seconds after which a silent connection with calls is pinged, and within which its client must answer."""

PING = 5.0
"""Seconds between two pings of a client at least."""


class Methods:
    """The methods of the operations of the table, and of streams.

    Parameters
    ----------
    engine
        The engine that answers.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def handlers(self) -> dict[str, dict[str, Any]]:
        """Return the handler of each method, by service."""
        found: dict[str, dict[str, Any]] = {SERVICE: {}}
        for operation in OPERATIONS.values():
            service, _, method = method_of(operation).partition("/")
            found.setdefault(service, {})[method] = grpc.unary_unary_rpc_method_handler(
                self._method(served(operation), operation),
                request_deserializer=message_class(operation.takes).FromString,
                response_serializer=message_class(operation.gives).SerializeToString,
            )
        found[SERVICE]["EmbedStream"] = grpc.stream_stream_rpc_method_handler(
            self._embed_stream,
            request_deserializer=messages.EmbedStreamRequest.FromString,
            response_serializer=messages.EmbedStreamAnswer.SerializeToString,
        )
        return found

    def _method(self, answers: Served, operation: Operation[Any, Any]) -> Callable[[Any, Any], Any]:
        decode, route = partial(protocol.request_from_proto, operation.request), method_of(operation)

        async def operate(request: Any, call: Call, held: Held) -> Any:
            """Decode, call, encode."""
            with call.stage("decode"):
                decoded = await self._engine.work(decode, request)
            answer = await answers.call(self._engine, decoded, call)
            with call.stage("encode"):
                return await self._engine.work(protocol.answer_to_proto, answer)

        async def method(request: Incoming, context: Any) -> Any:
            return await answered(self._engine.front, route, operate, request, context)

        return method

    async def _embed_stream(self, requests: Incoming, context: Any) -> Any:
        """Embed any number of cells, while they are sent."""
        await embed_stream(self._engine, begin(f"{SERVICE}/EmbedStream", context), requests, context)


def _ages(settings: Settings) -> list[tuple[str, int]]:
    """Return the options that end old connections, so that clients look for replicas that are new.

    gRPC varies the age by a tenth, so that connections that began together do not end together, and gives calls in
    progress as long as they need.
    """
    if not settings.connection_age:
        return []
    return [("grpc.max_connection_age_ms", 1000 * min(settings.connection_age, 2**31 // 1000 - 1))]


class GrpcServer:
    """A grpc.aio server over an engine; made and used on one event loop.

    Parameters
    ----------
    engine
        The engine that answers, and its settings.
    host, port
        Address to listen on; port 0 asks the system for a free one.
    register_more
        Functions that each add a further service to the server, and return its name.
    """

    def __init__(self, engine: Engine, *, host: str, port: int, register_more: Sequence[Register] = ()) -> None:
        largest = min(engine.settings.max_body_bytes + _ENVELOPE, 2**31 - 1)
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._grace = engine.settings.shutdown_grace
        self._credentials = tls.grpc_credentials(engine.settings)
        self._server = grpc.aio.server(
            interceptors=[KeyInterceptor(engine.front), MessageInterceptor(engine)],
            options=[
                ("grpc.max_receive_message_length", largest),
                ("grpc.max_send_message_length", -1),
                # Identity alone: what is compressed is refused, and never grows to what nobody counted.
                ("grpc.compression_enabled_algorithms_bitset", 1),
                # 64 KiB of a message lie here before it is read. With the probe, a fast caller can have it be 48 MiB.
                ("grpc.http2.bdp_probe", 0),
                # Two servers on one port would each get a random half of the calls.
                ("grpc.so_reuseport", 0),
                # A connection that never says what it wants, and one whose client does not live any more, end.
                ("grpc.server_handshake_timeout_ms", 1000 * engine.settings.head_timeout),
                ("grpc.keepalive_time_ms", 1000 * KEEPALIVE),
                ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE),
                # Clients may ping, too, with calls and without; the third ping that comes too soon ends a connection.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", int(1000 * PING)),
                *_ages(engine.settings),
            ],
        )
        methods = Methods(engine).handlers()
        self._server.add_generic_rpc_handlers(
            tuple(grpc.method_handlers_generic_handler(service, found) for service, found in methods.items())
        )
        own = (*methods, *(register(self._server) for register in register_more))
        self._health = Health(engine, own)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*own, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        Reflection(engine.front, names).register(self._server)

    async def start(self) -> int:
        """Listen, and say so in the health service.

        Returns
        -------
        int
            The port.

        Raises
        ------
        OSError
            The port is taken.
        """
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(self._address)
            else:
                port = self._server.add_secure_port(self._address, self._credentials)
        except RuntimeError as error:
            raise OSError(
                f"gRPC cannot listen on {self._address}: {error}. Stop what listens there, or set {PREFIX}GRPC_PORT."
            ) from error
        await self._server.start()
        await self._health.start()
        return int(port)

    async def leave(self) -> None:
        """Tell the health service that the engine is not ready."""
        await self._health.refresh()

    async def stop(self) -> None:
        """Tell the health service, refuse new calls, and give those in progress their time."""
        await self._health.stop()
        # The engine ends calls that are not done in time, and tells their callers; the seconds on top are for that.
        await self._server.stop(self._grace + LAST_WORDS)
