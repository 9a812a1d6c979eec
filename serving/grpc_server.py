"""The gRPC interface: the same engine, on the same event loop, as HTTP."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from starlette.datastructures import Headers

from perturbscope import wire
from perturbscope.errors import OverloadedError, PerturbScopeError
from perturbscope.proto import perturbscope_v1_pb2 as messages
from perturbscope.proto import perturbscope_v1_pb2_grpc as services
from serving.calls import REQUEST_ID, Call
from serving.engine import Engine
from serving.routes import COMPARE, EMBED, SCORE, RpcRoute, describe, explain
from serving.security.interceptor import KeyInterceptor
from serving.settings import PREFIX
from serving.status import status_of
from serving.streams_grpc import embed_stream

SERVICE: str = messages.DESCRIPTOR.services_by_name["PerturbScope"].full_name
_ENVELOPE = 64 * 2**10
"""Room for what is around the counted bytes of a message."""


_MAX_MESSAGE, _MAX_FIELD = 2000, 200
"""Bytes of an error that are sent. Clients refuse more than 8 KiB of trailing metadata, where a byte may take three."""


class Servicer(services.PerturbScopeServicer):
    """``perturbscope.v1.PerturbScope``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Embed(self, request: Any, context: Any) -> Any:  # noqa: N802  gRPC's name
        """Vectors of cells."""
        return await self._answer(EMBED, request, context)

    async def Score(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Every perturbation against the controls."""
        return await self._answer(SCORE, request, context)

    async def Compare(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Perturbations against each other."""
        return await self._answer(COMPARE, request, context)

    async def Models(self, request: Any, context: Any) -> Any:  # noqa: N802
        """What is served."""
        call = begin(f"{SERVICE}/Models", context)
        try:
            async with self._engine.front.admitted(call):
                answer = wire.models_answer_to_proto(self._engine.models())
        except Exception as error:  # noqa: BLE001  the edge of the server: every request gets an answer
            await abort(error, call, context)
        call.finish("OK")
        return answer

    async def EmbedStream(self, requests: Any, context: Any) -> Any:  # type: ignore[override]  # noqa: N802
        """Vectors of any number of cells."""
        await embed_stream(self._engine, begin(f"{SERVICE}/EmbedStream", context), context, abort)

    async def _answer(self, route: RpcRoute, request: Any, context: Any) -> Any:
        """Decode, call, encode; grpc.aio cancels this when the caller does, or its deadline passes."""
        call = begin(f"{SERVICE}/{route.name.capitalize()}", context)
        try:
            async with self._engine.front.admitted(call) as hold:
                hold(request.ByteSize())
                with call.stage("decode"):
                    message = await self._engine.work(route.from_proto, request)
                describe(call, message)
                answer = await route.call(self._engine, message, call)
                with call.stage("encode"):
                    encoded = await self._engine.work(route.to_proto, answer)
        except Exception as error:  # noqa: BLE001  the edge of the server: every request gets an answer
            await abort(error, call, context)
        except BaseException:
            call.finish("CANCELLED", "client_gone")
            raise
        call.finish("OK")
        return encoded


def begin(route: str, context: Any) -> Call:
    """The call behind a context of gRPC; its id is sent back, however it ends."""
    call = Call.begin(
        route,
        "grpc",
        headers_of(context.invocation_metadata()),
        peer=context.peer() or "",
        remaining=context.time_remaining(),
    )
    context.set_trailing_metadata(((REQUEST_ID, call.id),))
    return call


def headers_of(metadata: Any) -> Headers:
    """Metadata as headers are: a name that is given twice stays twice."""
    return Headers(raw=[(key.encode(), value.encode()) for key, value in metadata or () if isinstance(value, str)])


async def abort(error: Exception, call: Call, context: Any) -> NoReturn:
    """End a call with the status of an error; called in an except block."""
    told = explain(error, call)
    status = status_of(told).grpc
    call.finish(status.name, told.code)
    await context.abort(status, told.message.encode()[:_MAX_MESSAGE].decode(errors="ignore"), _metadata(told, call))
    raise AssertionError("abort always raises")


def _metadata(error: PerturbScopeError, call: Call) -> tuple[tuple[str, str], ...]:
    found = [("perturbscope-code", error.code), ("perturbscope-request-id", call.id), (REQUEST_ID, call.id)]
    if error.field is not None:
        # Metadata is ASCII, and a field may be an unknown name that the caller made up.
        name = "".join(c for c in error.field if c.isprintable())[:_MAX_FIELD]
        found.append(("perturbscope-field", name.encode("ascii", "backslashreplace").decode()))
    if isinstance(error, OverloadedError):
        found.append(("retry-after", str(math.ceil(error.retry_after))))
    return tuple(found)


class GrpcServer:
    """A grpc.aio server over an engine; made and used on one event loop.

    Parameters
    ----------
    engine
        Answers the requests, and has the settings.
    host, port
        Where to listen; port 0 asks the system for a free one.
    """

    def __init__(self, engine: Engine, *, host: str, port: int) -> None:
        largest = min(engine.settings.max_body_bytes + _ENVELOPE, 2**31 - 1)
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._grace = engine.settings.shutdown_grace
        self._server = grpc.aio.server(
            interceptors=[KeyInterceptor(engine.front, headers_of, begin, abort)],
            options=[
                ("grpc.max_receive_message_length", largest),
                ("grpc.max_send_message_length", -1),
                # Two servers on one port would each get a random half of the calls.
                ("grpc.so_reuseport", 0),
            ],
        )
        self._health = HealthServicer()
        services.add_PerturbScopeServicer_to_server(Servicer(engine), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Listen, and say so in the health service.

        Returns
        -------
        The port.

        Raises
        ------
        OSError
            The port is taken.
        """
        try:
            port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(
                f"gRPC cannot listen on {self._address}: {error}. Stop what listens there, or set {PREFIX}GRPC_PORT."
            ) from error
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return int(port)

    async def stop(self) -> None:
        """Tell the health service, refuse new calls, and give those in progress their time."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._grace)
