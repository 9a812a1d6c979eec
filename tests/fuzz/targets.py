"""The targets of fuzzing: every decoder of untrusted bytes, as a function that takes bytes.

A target returns whether the bytes were accepted. It refuses them with an error of :mod:`perturbscope.errors`; any other
exception is a finding. Accepted input is used as the server would: counts are tokenized, and a request is encoded and
read again, which must work.
"""

from __future__ import annotations

import asyncio
import functools
import io
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from google.protobuf.message import DecodeError

from perturbscope import protocol
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import PerturbScopeError
from perturbscope.families import Family, load_family
from perturbscope.protocol.arrow_streams import (
    PREFIX_BYTES,
    StreamRequestReader,
    message_length,
    metadata_length,
)
from perturbscope.protocol.operations import COMPARE, EMBED, SCORE
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.protocol.proto.open_inference_pb2 import ModelInferRequest
from perturbscope.protocol.protobuf_streams import stream_cells_from_proto, stream_start_from_proto
from serving.engine.operations import COLUMNS, REPORT
from serving.openinference.json_codec import request_from_body
from serving.openinference.proto_codec import request_from_proto
from serving.settings import Settings
from serving.uploads.readers import file_readers
from serving.uploads.requests import FILE_NAME
from tests.arrow_client import stream_answers_from_arrow
from tests.fuzz.mutators import mutate_arrow, mutate_bytes, mutate_json, mutate_proto
from tests.fuzz.seeds import cells as seed_cells

SMALL = Settings(max_cells=2000, max_vectors=2000, max_values=100_000, max_genes=5000, file_timeout=5)
"""Limits of the targets, which keep every input short."""
KINDS = (protocol.EmbedRequest, protocol.ScoreRequest, protocol.CompareRequest)


@functools.cache
def family() -> Family:
    """Return the tokenizer behind the decoders."""
    return load_family("rank", {}, GeneVocabulary.geneformer_gc30m())


def fuzz_json(data: bytes) -> bool:
    """Decode JSON; the first byte chooses the message, the rest is the body."""
    decoders: list[Callable[[bytes], Any]] = [
        *(_again(kind, "json") for kind in KINDS),
        partial(protocol.answer_from_json, protocol.EmbedAnswer),
        partial(protocol.answer_from_json, protocol.ScoreAnswer),
        partial(protocol.answer_from_json, protocol.CompareAnswer),
        partial(protocol.answer_from_json, protocol.ModelsAnswer),
    ]
    return _tried(decoders, data)


def fuzz_arrow(data: bytes) -> bool:
    """Decode Arrow, as :func:`fuzz_json` does JSON."""
    decoders: list[Callable[[bytes], Any]] = [
        *(_again(kind, "arrow") for kind in KINDS),
        partial(protocol.answer_from_arrow, protocol.EmbedAnswer),
        partial(protocol.answer_from_arrow, protocol.ScoreAnswer),
        partial(protocol.answer_from_arrow, protocol.CompareAnswer),
    ]
    return _tried(decoders, data)


def fuzz_proto(data: bytes) -> bool:
    """Decode protobuf, as :func:`fuzz_json` does JSON; protobuf itself refuses bytes that are no message."""

    def parsed(kind: type[Any], read: Callable[[Any], Any]) -> Callable[[bytes], Any]:
        return lambda body: read(kind.FromString(body))

    readers: list[Callable[[Any], Any]] = [
        *(_again(kind, "proto") for kind in KINDS),
        partial(protocol.answer_from_proto, protocol.EmbedAnswer),
        partial(protocol.answer_from_proto, protocol.ScoreAnswer),
        partial(protocol.answer_from_proto, protocol.CompareAnswer),
        partial(protocol.answer_from_proto, protocol.ModelsAnswer),
    ]
    decoders = [parsed(kind, read) for kind, read in zip(_MESSAGES, readers, strict=True)]
    try:
        return _tried(decoders, data)
    except DecodeError:
        return False


def fuzz_h5ad(data: bytes) -> bool:
    """Read a file in a separate process; the first byte chooses the route, the rest is the file."""
    uploads: list[tuple[str, Mapping[str, str]]] = [
        (EMBED.name, {}),
        (COLUMNS.name, {}),
        (SCORE.name, {"perturbation_key": "perturbation", "control": "control", "batch_key": "batch"}),
        (COMPARE.name, {"perturbation_key": "perturbation", "use_rep": "X_pca"}),
        (REPORT.name, {"perturbation_key": "perturbation", "control": "control", "use_rep": "X_pca"}),
    ]
    if not data:
        return False
    with tempfile.TemporaryDirectory(prefix="perturbscope-fuzz-") as folder:
        path = Path(folder) / FILE_NAME
        path.write_bytes(data[1:])
        route, parameters = uploads[data[0] % len(uploads)]
        try:
            upload = asyncio.run(file_readers().read(route, path, parameters, SMALL))
        except PerturbScopeError:
            return False
    _go_on(upload.request)
    return True


def fuzz_stream(data: bytes) -> bool:
    """Decode streams of cells and of answers, as Arrow or as one message of protobuf."""
    readers: list[Callable[[bytes], Any]] = [
        _arrow_stream,
        lambda body: list(stream_answers_from_arrow(io.BytesIO(body))),
        _proto_stream,
    ]
    try:
        return _tried(readers, data)
    except DecodeError:
        return False


def _arrow_stream(body: bytes) -> None:
    """Read a stream as the server does, message by message."""
    source, reader, start = io.BytesIO(body), StreamRequestReader(), None
    row = 0
    while length := metadata_length(prefix := source.read(PREFIX_BYTES), _MOST):
        metadata = source.read(length)
        message = prefix + metadata + source.read(message_length(metadata, _MOST))
        if start is None:
            start = reader.start(message)
            row = start.first_row
            continue
        cells = reader.cells(message, start.gene_ids, row)
        row += len(cells)
        family().tokenize(cells)


def _proto_stream(body: bytes) -> None:
    message = pb.EmbedStreamRequest.FromString(body)
    if message.HasField("start"):
        stream_start_from_proto(message)
    else:
        stream_cells_from_proto(message, seed_cells().gene_ids, 0)


def fuzz_kserve(data: bytes) -> bool:
    """Decode the Open Inference Protocol: HTTP bodies with and without bytes of tensors, and gRPC messages."""
    readers: list[Callable[[bytes], Any]] = [
        lambda body: request_from_body(body, None),
        lambda body: request_from_body(body[2:], str(int.from_bytes(body[:2], "little"))),
        lambda body: request_from_proto(ModelInferRequest.FromString(body)),
    ]
    try:
        return _tried(readers, data)
    except DecodeError:
        return False


_MOST = 2**20
"""Most bytes of a message of a stream."""
_MESSAGES = (
    pb.EmbedRequest,
    pb.ScoreRequest,
    pb.CompareRequest,
    pb.EmbedAnswer,
    pb.ScoreAnswer,
    pb.CompareAnswer,
    pb.ModelsAnswer,
)

TARGETS: dict[str, Callable[[bytes], bool]] = {
    "json": fuzz_json,
    "arrow": fuzz_arrow,
    "proto": fuzz_proto,
    "h5ad": fuzz_h5ad,
    "stream": fuzz_stream,
    "kserve": fuzz_kserve,
}
"""All targets by name."""
Mutator = Callable[[bytes, Random], bytes]
MUTATORS: dict[str, Callable[[int], Mutator]] = {
    "json": lambda _: mutate_json,
    "arrow": lambda _: mutate_arrow,
    "proto": lambda first: mutate_proto(_MESSAGES[first % len(_MESSAGES)]),
    "h5ad": lambda _: mutate_bytes,
    "stream": lambda first: (mutate_bytes, mutate_bytes, mutate_proto(pb.EmbedStreamRequest))[first % 3],
    "kserve": lambda first: (mutate_json, mutate_bytes, mutate_proto(ModelInferRequest))[first % 3],
}
"""Functions from an input's first byte to the mutator of a target."""


def _tried(decoders: list[Callable[[bytes], Any]], data: bytes) -> bool:
    if not data:
        return False
    try:
        decoders[data[0] % len(decoders)](data[1:])
    except PerturbScopeError:
        return False
    return True


def _again(kind: type[Any], form: str) -> Callable[[Any], Any]:
    """Decode, go on as the server does, encode, decode: what was accepted once is accepted again."""
    read = partial(getattr(protocol, f"request_from_{form}"), kind)
    write = getattr(protocol, f"request_to_{form}")

    def twice(body: Any) -> None:
        request = read(body)
        _go_on(request)
        try:
            read(write(request))
        except PerturbScopeError as error:
            raise AssertionError(f"accepted once, and then refused: {error.message}") from error

    return twice


def _go_on(request: Any) -> None:
    cells = getattr(request, "cells", None)
    if cells is None or len(cells) > SMALL.max_cells or cells.n_genes > SMALL.max_genes:
        return
    try:
        family().tokenize(cells)
    except PerturbScopeError:
        return
