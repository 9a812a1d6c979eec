"""Requests and answers as JSON, Arrow and protobuf, used by clients and server alike.

The folder imports cells, inference and scoring. For each of the formats ``json``, ``arrow`` and ``proto`` there are::

    request_to_<format>(request)      request_from_<format>(EmbedRequest, body)
    answer_to_<format>(answer)        answer_from_<format>(ScoreAnswer, body)

What travels follows from the fields of a message (:mod:`perturbscope.protocol.fields`). Models do not travel as Arrow.
Streams of cells, which have several messages in both directions, are in :mod:`perturbscope.protocol.streams`, as
protobuf in :mod:`perturbscope.protocol.protobuf_streams` and as Arrow in :mod:`perturbscope.protocol.arrow_streams`.

JSON and Arrow are ``bytes``; protobuf is the message of :mod:`perturbscope.protocol.proto`. Input is not trusted: every
decoder raises an error of :mod:`perturbscope.errors` that names the field, and counts always pass through
:meth:`perturbscope.CountMatrix.from_csr`, so the same mistake gives the same error in each format.
"""

from perturbscope.protocol.arrow import answer_from_arrow, answer_to_arrow, request_from_arrow, request_to_arrow
from perturbscope.protocol.fields import Meta
from perturbscope.protocol.json import (
    answer_from_json,
    answer_to_json,
    error_to_json,
    request_from_json,
    request_to_json,
)
from perturbscope.protocol.messages import (
    CompareAnswer,
    CompareRequest,
    EmbedAnswer,
    EmbedRequest,
    ModelInfo,
    ModelProblem,
    ModelsAnswer,
    ModelsRequest,
    OutputInfo,
    ScoreAnswer,
    ScoreRequest,
)
from perturbscope.protocol.protobuf import answer_from_proto, answer_to_proto, request_from_proto, request_to_proto

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
HDF5 = "application/x-hdf5"
"""Body of a request that is an .h5ad file."""

__all__ = [
    "ARROW",
    "HDF5",
    "JSON",
    "CompareAnswer",
    "CompareRequest",
    "EmbedAnswer",
    "EmbedRequest",
    "Meta",
    "ModelInfo",
    "ModelProblem",
    "ModelsAnswer",
    "ModelsRequest",
    "OutputInfo",
    "ScoreAnswer",
    "ScoreRequest",
    "answer_from_arrow",
    "answer_from_json",
    "answer_from_proto",
    "answer_to_arrow",
    "answer_to_json",
    "answer_to_proto",
    "error_to_json",
    "request_from_arrow",
    "request_from_json",
    "request_from_proto",
    "request_to_arrow",
    "request_to_json",
    "request_to_proto",
]
