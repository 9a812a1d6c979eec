"""The protocol over gRPC: ``inference.GRPCInferenceService``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from google.protobuf.json_format import ParseDict

from perturbscope.protocol.proto import open_inference_pb2 as messages
from perturbscope.protocol.proto import open_inference_pb2_grpc as services
from serving.access.front import Front
from serving.access.limits import Held
from serving.call import Call, Right
from serving.engine.operations import explain
from serving.grpc.edge import answered, begin
from serving.openinference import describe, repository
from serving.openinference.inference import TokenEngine
from serving.openinference.proto_codec import answer_to_proto, request_from_proto

SERVICE: str = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name


def register(tokens: TokenEngine, server: Any) -> str:
    """Add the protocol's service to a server of grpc.aio, and return the service's name."""
    services.add_GRPCInferenceServiceServicer_to_server(InferenceServicer(tokens), server)
    return SERVICE


class InferenceServicer(services.GRPCInferenceServiceServicer):
    """Answers the protocol's calls.

    Parameters
    ----------
    tokens
        Embeds the tokens.
    """

    def __init__(self, tokens: TokenEngine) -> None:
        self._tokens = tokens
        self._engine = tokens.engine

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802  gRPC's name
        """Whether the process answers: it does."""
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Whether every model answers."""
        return messages.ServerReadyResponse(ready=await self._engine.ready())

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Whether one model is loaded and answers."""

        async def work(call: Call, hold: Held) -> Any:
            infos = self._engine.registry.infos()
            version = request.version or None
            if not any(request.name == info.name and version in (None, info.version) for info in infos):
                return messages.ModelReadyResponse(ready=False)
            with self._engine.registry.lease(request.name, version) as model:
                return messages.ModelReadyResponse(ready=model.verified)

        return await self._answer("ModelReady", work, context)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """What server this is."""

        async def work(call: Call, hold: Held) -> Any:
            return ParseDict(describe.server(), messages.ServerMetadataResponse())

        return await self._answer("ServerMetadata", work, context)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """What a model takes and gives."""

        async def work(call: Call, hold: Held) -> Any:
            with self._engine.registry.lease(request.name, request.version or None) as model:
                found = describe.metadata(model, self._engine.registry.infos())
            return ParseDict(found, messages.ModelMetadataResponse())

        return await self._answer("ModelMetadata", work, context)

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The same, in Triton's terms."""

        async def work(call: Call, hold: Held) -> Any:
            with self._engine.registry.lease(request.name, request.version or None) as model:
                found = describe.configuration(model, self._engine.settings)
            return ParseDict({"config": found}, messages.ModelConfigResponse())

        return await self._answer("ModelConfig", work, context)

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        """What was asked of the models over this protocol."""

        async def work(call: Call, hold: Held) -> Any:
            infos = self._engine.registry.infos()
            if request.name:
                with self._engine.registry.lease(request.name, request.version or None) as model:
                    infos = (model.info,)
            return ParseDict(self._tokens.statistics.told(infos), messages.ModelStatisticsResponse())

        return await self._answer("ModelStatistics", work, context)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The models that are loaded."""

        async def work(call: Call, hold: Held) -> Any:
            found = repository.index(self._engine, only_ready=request.ready)
            return ParseDict({"models": found}, messages.RepositoryIndexResponse())

        return await self._answer("RepositoryIndex", work, context)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Load a model by the name of its folder."""

        async def work(call: Call, hold: Held) -> Any:
            await repository.load(self._engine, request.model_name, request.parameters)
            return messages.RepositoryModelLoadResponse()

        return await self._answer("RepositoryModelLoad", work, context, "admin")

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Unload a model."""

        async def work(call: Call, hold: Held) -> Any:
            await repository.unload(self._engine, request.model_name, request.parameters)
            return messages.RepositoryModelUnloadResponse()

        return await self._answer("RepositoryModelUnload", work, context, "admin")

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Vectors of cells that are tokens already."""

        async def work(call: Call, hold: Held) -> Any:
            return await self._infer(request, call, hold)

        return await self._answer("ModelInfer", work, context)

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """An answer, or the message of an error, for each request of a stream, in their order.

        Each request is a call of its own: it is let in, counted and logged as if it had come alone.
        """
        async for request in requests:
            call = begin(f"{SERVICE}/ModelStreamInfer", context)
            try:
                async with self._engine.front.admitted(call) as hold:
                    answer = messages.ModelStreamInferResponse(infer_response=await self._infer(request, call, hold))
            except Exception as error:  # noqa: BLE001  the edge of the server: every request gets an answer
                told = explain(error, call)
                Front.finish(call, "OK", told.code)
                answer = messages.ModelStreamInferResponse(
                    error_message=told.message, infer_response=messages.ModelInferResponse(id=request.id)
                )
            except BaseException:
                Front.finish(call, "CANCELLED", "client_gone")
                raise
            else:
                Front.finish(call, "OK")
            yield answer

    async def _infer(self, request: messages.ModelInferRequest, call: Call, hold: Held) -> messages.ModelInferResponse:
        hold(request.ByteSize())
        answer = await self._tokens.infer(
            request.model_name, request.model_version, lambda: request_from_proto(request), call
        )
        with call.stage("encode"):
            return await self._engine.work(answer_to_proto, answer)

    async def _answer(
        self, method: str, work: Callable[[Call, Held], Awaitable[Any]], context: Any, right: Right = "infer"
    ) -> Any:
        return await answered(self._engine, f"{SERVICE}/{method}", work, context, right)
