"""The protocol over gRPC: ``inference.GRPCInferenceService``."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import ParseDict

from perturbscope.errors import PerturbScopeError
from perturbscope.protocol.proto import open_inference_pb2 as messages
from perturbscope.protocol.proto import open_inference_pb2_grpc as services
from serving.access.front import Front
from serving.access.limits import Held
from serving.call import Call, Right
from serving.engine.status import explain
from serving.grpc.edge import Work, abort, answered, begin, headers_of
from serving.grpc.received import Incoming, Message
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
        """Tell that the process answers."""
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tell whether every model answers."""
        return messages.ServerReadyResponse(ready=await self._engine.ready())

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tell whether one model is loaded and answers."""
        return await self._answered("ModelReady", self._model_ready, request, context)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Describe the server."""
        return await self._answered("ServerMetadata", self._server_metadata, request, context)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Describe the tensors that a model takes and returns."""
        return await self._answered("ModelMetadata", self._model_metadata, request, context)

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Describe the tensors of a model in Triton's terms."""
        return await self._answered("ModelConfig", self._model_config, request, context)

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return counters of the requests over this protocol, by model."""
        return await self._answered("ModelStatistics", self._model_statistics, request, context)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802
        """List the models that are loaded, and the bundle folders that are not."""
        return await self._answered("RepositoryIndex", self._repository_index, request, context)

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Load a model by the name of its folder."""
        return await self._answered("RepositoryModelLoad", self._load, request, context, "admin")

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Unload a model."""
        return await self._answered("RepositoryModelUnload", self._unload, request, context, "admin")

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return the vectors of tokenized cells."""
        return await self._answered("ModelInfer", self._infer, request, context)

    async def ModelStreamInfer(self, requests: Incoming, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        """Answer each request of a stream, in their order, with vectors or the message of an error.

        Each request is a call of its own: admitted, counted and logged as if it had come alone.
        """
        route = f"{SERVICE}/ModelStreamInfer"
        first = Call(route, "grpc", headers_of(context.invocation_metadata()), context.peer() or "")
        try:
            first.caller = self._engine.front.doorkeeper.caller(first.headers, first.peer)
            while (sent := await requests.next(first)) is not None:
                await context.write(await self._one_of_many(sent, begin(route, context)))
        except PerturbScopeError as error:
            await abort(error, first, context)

    async def _one_of_many(self, sent: Message, call: Call) -> messages.ModelStreamInferResponse:
        request = messages.ModelInferRequest()
        try:
            async with self._engine.front.admitted(call) as held:
                held(len(sent))
                request = await sent.decoded(held)
                answer = messages.ModelStreamInferResponse(infer_response=await self._infer(request, call, held))
        except Exception as error:  # noqa: BLE001  the edge of the server: every request gets an answer
            told = explain(error, call)
            Front.finish(call, "OK", told.code)
            return messages.ModelStreamInferResponse(
                error_message=told.message, infer_response=messages.ModelInferResponse(id=request.id)
            )
        except BaseException:
            Front.finish(call, "CANCELLED", "client_gone")
            raise
        Front.finish(call, "OK")
        return answer

    async def _answered(self, method: str, work: Work, request: Any, context: Any, right: Right = "infer") -> Any:
        return await answered(self._engine.front, f"{SERVICE}/{method}", work, request, context, right)

    async def _infer(self, request: messages.ModelInferRequest, call: Call, held: Held) -> messages.ModelInferResponse:
        answer = await self._tokens.infer(
            request.model_name, request.model_version, lambda: request_from_proto(request), call
        )
        with call.stage("encode"):
            return await self._engine.work(answer_to_proto, answer)

    async def _model_ready(self, request: Any, call: Call, held: Held) -> Any:
        infos = self._engine.registry.infos()
        version = request.version or None
        if not any(request.name == info.name and version in (None, info.version) for info in infos):
            return messages.ModelReadyResponse(ready=False)
        with self._engine.registry.lease(request.name, version) as model:
            return messages.ModelReadyResponse(ready=model.verified and not self._engine.leaving)

    async def _server_metadata(self, request: Any, call: Call, held: Held) -> Any:
        return ParseDict(describe.server(), messages.ServerMetadataResponse())

    async def _model_metadata(self, request: Any, call: Call, held: Held) -> Any:
        with self._engine.registry.lease(request.name, request.version or None) as model:
            described = describe.metadata(model, self._engine.registry.infos())
        return ParseDict(described, messages.ModelMetadataResponse())

    async def _model_config(self, request: Any, call: Call, held: Held) -> Any:
        with self._engine.registry.lease(request.name, request.version or None) as model:
            described = describe.configuration(model, self._engine.settings)
        return ParseDict({"config": described}, messages.ModelConfigResponse())

    async def _model_statistics(self, request: Any, call: Call, held: Held) -> Any:
        infos = self._engine.registry.infos()
        if request.name:
            with self._engine.registry.lease(request.name, request.version or None) as model:
                infos = (model.info,)
        return ParseDict(self._tokens.statistics.told(infos), messages.ModelStatisticsResponse())

    async def _repository_index(self, request: Any, call: Call, held: Held) -> Any:
        listed = repository.index(self._engine, only_ready=request.ready)
        return ParseDict({"models": listed}, messages.RepositoryIndexResponse())

    async def _load(self, request: Any, call: Call, held: Held) -> Any:
        await repository.load(self._engine, request.model_name, request.parameters)
        return messages.RepositoryModelLoadResponse()

    async def _unload(self, request: Any, call: Call, held: Held) -> Any:
        await repository.unload(self._engine, request.model_name, request.parameters)
        return messages.RepositoryModelUnloadResponse()
