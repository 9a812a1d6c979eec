"""Requests and answers as JSON, Arrow and protobuf; used by clients and server alike.

For each message there are ``<message>_to_<format>`` and ``<message>_from_<format>``::

    embed_request   score_request   compare_request                  json  arrow  proto
    embed_answer    score_answer    compare_answer                   json  arrow  proto
    models_answer                                                    json         proto

Streams of cells, which have several messages in both directions, are in :mod:`perturbscope.protocol.streams`, as
protobuf in :mod:`perturbscope.protocol.protobuf_streams` and as Arrow in :mod:`perturbscope.protocol.arrow_streams`.

JSON and Arrow are ``bytes``; protobuf is the message of :mod:`perturbscope.protocol.proto`. What comes in is not
trusted: every decoder raises an error of :mod:`perturbscope.errors` that names the field, and counts always pass
through :meth:`perturbscope.CountMatrix.from_csr`, so that the same mistake has the same error by every route.
"""

from perturbscope.protocol.arrow import (
    compare_answer_from_arrow,
    compare_answer_to_arrow,
    compare_request_from_arrow,
    compare_request_to_arrow,
    embed_answer_from_arrow,
    embed_answer_to_arrow,
    embed_request_from_arrow,
    embed_request_to_arrow,
    score_answer_from_arrow,
    score_answer_to_arrow,
    score_request_from_arrow,
    score_request_to_arrow,
)
from perturbscope.protocol.json import (
    compare_answer_from_json,
    compare_answer_to_json,
    compare_request_from_json,
    compare_request_to_json,
    embed_answer_from_json,
    embed_answer_to_json,
    embed_request_from_json,
    embed_request_to_json,
    error_to_json,
    models_answer_from_json,
    models_answer_to_json,
    score_answer_from_json,
    score_answer_to_json,
    score_request_from_json,
    score_request_to_json,
)
from perturbscope.protocol.messages import (
    Answer,
    CompareAnswer,
    CompareRequest,
    EmbedAnswer,
    EmbedRequest,
    Meta,
    ModelInfo,
    ModelsAnswer,
    ModelsRequest,
    Request,
    ScoreAnswer,
    ScoreRequest,
)
from perturbscope.protocol.protobuf import (
    compare_answer_from_proto,
    compare_answer_to_proto,
    compare_request_from_proto,
    compare_request_to_proto,
    embed_answer_from_proto,
    embed_answer_to_proto,
    embed_request_from_proto,
    embed_request_to_proto,
    models_answer_from_proto,
    models_answer_to_proto,
    score_answer_from_proto,
    score_answer_to_proto,
    score_request_from_proto,
    score_request_to_proto,
)

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
HDF5 = "application/x-hdf5"
"""Body of a request that is an .h5ad file."""

__all__ = [
    "ARROW",
    "HDF5",
    "JSON",
    "Answer",
    "CompareAnswer",
    "CompareRequest",
    "EmbedAnswer",
    "EmbedRequest",
    "Meta",
    "ModelInfo",
    "ModelsAnswer",
    "ModelsRequest",
    "Request",
    "ScoreAnswer",
    "ScoreRequest",
    "compare_answer_from_arrow",
    "compare_answer_from_json",
    "compare_answer_from_proto",
    "compare_answer_to_arrow",
    "compare_answer_to_json",
    "compare_answer_to_proto",
    "compare_request_from_arrow",
    "compare_request_from_json",
    "compare_request_from_proto",
    "compare_request_to_arrow",
    "compare_request_to_json",
    "compare_request_to_proto",
    "embed_answer_from_arrow",
    "embed_answer_from_json",
    "embed_answer_from_proto",
    "embed_answer_to_arrow",
    "embed_answer_to_json",
    "embed_answer_to_proto",
    "embed_request_from_arrow",
    "embed_request_from_json",
    "embed_request_from_proto",
    "embed_request_to_arrow",
    "embed_request_to_json",
    "embed_request_to_proto",
    "error_to_json",
    "models_answer_from_json",
    "models_answer_from_proto",
    "models_answer_to_json",
    "models_answer_to_proto",
    "score_answer_from_arrow",
    "score_answer_from_json",
    "score_answer_from_proto",
    "score_answer_to_arrow",
    "score_answer_to_json",
    "score_answer_to_proto",
    "score_request_from_arrow",
    "score_request_from_json",
    "score_request_from_proto",
    "score_request_to_arrow",
    "score_request_to_json",
    "score_request_to_proto",
]
