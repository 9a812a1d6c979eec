"""A server in a function: real decoding, tokens and scores, a fake model, and the failures that a test asks for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import httpx

from perturbscope import protocol
from perturbscope.errors import PerturbScopeError, UnknownModelError
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import (
    PerturbScopeServicer,
    add_PerturbScopeServicer_to_server,
)
from perturbscope.protocol.protobuf_streams import (
    stream_answer_to_proto,
    stream_cells_from_proto,
    stream_start_from_proto,
)
from perturbscope.protocol.streams import StreamChunk, StreamOpened, StreamTotals
from perturbscope.scoring.control import score_perturbations
from perturbscope.scoring.pairs import compare_perturbations


class FakeServer:
    """A server that answers requests in this process.

    Attributes
    ----------
    failures
        Failures that the next requests meet in place of an answer.
    requests
        Requests that arrived, decoded.
    metadata
        Metadata of each gRPC call.
    change
        Function that is applied to every answer of embed; may raise.
    keep
        Whether to keep the requests.
    silent
        Whether streams get no answer.
    stream_ended
        Set when a stream is over, for whatever reason.
    model_id
        Id of the model that embeds.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.failures: list[Any] = []
        self.requests: list[Any] = []
        self.metadata: list[tuple[tuple[str, str], ...]] = []
        self.change: Callable[[Any], Any] = lambda answer: answer
        self.keep = True
        self.silent = False
        self.stream_ended = threading.Event()
        self.model_id = embedder.model_id

    def answer(self, request: Any) -> Any:
        if self.keep:
            self.requests.append(request)
        match request:
            case protocol.EmbedRequest():
                found = replace(self.embedder.embed(request.cells), model_id=self.model_id)
                return self.change(found)
            case protocol.ScoreRequest():
                return protocol.ScoreAnswer(
                    result=score_perturbations(
                        self._vectors(request),
                        request.perturbations,
                        control=request.control,
                        batches=request.batches,
                        options=request.options,
                    )
                )
            case protocol.CompareRequest():
                return protocol.CompareAnswer(
                    result=compare_perturbations(
                        self._vectors(request),
                        request.perturbations,
                        pairs=request.pairs,
                        control=request.control,
                        batches=request.batches,
                        options=request.options,
                    )
                )
            case protocol.ModelsRequest():
                return protocol.ModelsAnswer(models=tuple(map(model_info, ("first", "second"))))

    def _vectors(self, request: protocol.ScoreRequest | protocol.CompareRequest) -> Any:
        return self.embedder.embed(request.cells).values if request.cells is not None else request.embeddings

    def http(self, call: httpx.Request) -> httpx.Response:
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return failure
        name = call.url.path.rpartition("/")[2]
        if name == "models":
            return httpx.Response(
                200,
                json=None,
                content=protocol.answer_to_json(self.answer(protocol.ModelsRequest())),
                headers={"content-type": protocol.JSON},
            )
        kind = call.headers["content-type"]
        assert call.headers["accept"] == kind
        form = {protocol.JSON: "json", protocol.ARROW: "arrow"}[kind]
        request = getattr(protocol, f"request_from_{form}")(_KINDS[name], call.content)
        try:
            answer = self.answer(request)
        except PerturbScopeError as error:
            status = 413 if error.code == "limit_exceeded" else 422
            return httpx.Response(
                status, content=protocol.error_to_json(error), headers={"content-type": protocol.JSON}
            )
        content = getattr(protocol, f"answer_to_{form}")(answer)
        return httpx.Response(200, content=content, headers={"content-type": f"{kind}; charset=utf-8"})

    @contextmanager
    def grpc(self) -> Iterator[str]:
        """Serve on a free port; yields the target."""
        server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 2**20)])
        add_PerturbScopeServicer_to_server(_Servicer(self), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


_KINDS: dict[str, type[Any]] = {
    "embed": protocol.EmbedRequest,
    "score": protocol.ScoreRequest,
    "compare": protocol.CompareRequest,
    "models": protocol.ModelsRequest,
}


class Abort(Exception):  # noqa: N818
    """A gRPC status that a test asks for."""

    def __init__(self, status: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self.status, self.details, self.metadata = status, details, metadata


class _Servicer(PerturbScopeServicer):
    def __init__(self, server: FakeServer) -> None:
        self._server = server

    def _serve(self, name: str, message: Any, context: Any) -> Any:
        self._server.metadata.append(tuple(map(tuple, context.invocation_metadata())))
        try:
            if self._server.failures:
                raise self._server.failures.pop(0)
            return protocol.answer_to_proto(self._server.answer(protocol.request_from_proto(_KINDS[name], message)))
        except Abort as abort:
            context.set_trailing_metadata(abort.metadata)
            context.abort(abort.status, abort.details)
        except PerturbScopeError as error:
            context.set_trailing_metadata(
                (("perturbscope-code", error.code), ("perturbscope-field", error.field or ""))
            )
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)

    def Embed(self, request: pb.EmbedRequest, context: Any) -> Any:  # noqa: N802
        return self._serve("embed", request, context)

    def EmbedStream(self, requests: Any, context: Any) -> Any:  # noqa: N802
        server = self._server
        try:
            if server.silent:
                server.stream_ended.wait(5)
            start = stream_start_from_proto(next(requests))
            row = start.first_row
            if start.model not in (None, server.model_id):
                raise UnknownModelError("no such model", field="model")
            coverage = server.embedder.tokenize(start.every_gene()).coverage
            opened = StreamOpened(
                model_id=server.model_id,
                vocabulary_hash=server.embedder.vocabulary_hash,
                coverage=coverage,
                width=server.embedder.width,
                chunks_in_progress=1,
                max_chunk_cells=1000,
                max_chunk_bytes=2**20,
                variant=server.embedder.variant,
            )
            yield stream_answer_to_proto(opened)
            totals = StreamTotals()
            for message in requests:
                if server.failures:
                    raise server.failures.pop(0)
                cells = stream_cells_from_proto(message, start.gene_ids, row)
                found = server.answer(protocol.EmbedRequest(cells=cells))
                totals.add(found)
                yield stream_answer_to_proto(StreamChunk(first_row=row, embeddings=found))
                row += len(cells)
            yield stream_answer_to_proto(totals.end(opened))
        except Abort as abort:
            context.set_trailing_metadata(abort.metadata)
            context.abort(abort.status, abort.details)
        except PerturbScopeError as error:
            context.set_trailing_metadata(
                (("perturbscope-code", error.code), ("perturbscope-field", error.field or ""))
            )
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
        finally:
            server.stream_ended.set()

    def Score(self, request: pb.ScoreRequest, context: Any) -> Any:  # noqa: N802
        return self._serve("score", request, context)

    def Compare(self, request: pb.CompareRequest, context: Any) -> Any:  # noqa: N802
        return self._serve("compare", request, context)

    def Models(self, request: pb.ModelsRequest, context: Any) -> Any:  # noqa: N802
        return self._serve("models", request, context)


def model_info(name: str) -> protocol.ModelInfo:
    return protocol.ModelInfo(
        name=name,
        version="1",
        model_id=f"{name}-1-0123456789ab",
        family="rank",
        width=8,
        vocabulary_hash="0" * 64,
        layer="penultimate",
        pooling="mean",
        licence="CC0-1.0",
        variant="fp32",
        device="cpu",
    )
