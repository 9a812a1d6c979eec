"""The answer to a request that fails: the one table of HTTP statuses and gRPC codes, and the message for a bug.

A class that is not listed takes the row of its nearest listed base. Bad input is 422 on every route, whether it was the
JSON, the matrix or a parameter. A request that is too large is ``INVALID_ARGUMENT`` over gRPC, so that
``RESOURCE_EXHAUSTED`` from here always means "try again later". Overload is 429 and never 503, because proxies take a
server that says 503 out of service.
"""

from __future__ import annotations

from typing import NamedTuple

import grpc

from perturbscope.errors import (
    BundleError,
    DeadlineExceededError,
    InvalidInputError,
    LimitExceededError,
    OverloadedError,
    PermissionDeniedError,
    PerturbScopeError,
    ServerUnreachableError,
    UnauthenticatedError,
    UnknownModelError,
    UnsupportedMediaTypeError,
    UnsupportedOperationError,
)
from serving.call import Call
from serving.telemetry import log


class Status(NamedTuple):
    """The HTTP status and gRPC code of one kind of error."""

    http: int
    grpc: grpc.StatusCode


STATUS: dict[type[PerturbScopeError], Status] = {
    InvalidInputError: Status(422, grpc.StatusCode.INVALID_ARGUMENT),
    UnsupportedMediaTypeError: Status(415, grpc.StatusCode.INVALID_ARGUMENT),
    LimitExceededError: Status(413, grpc.StatusCode.INVALID_ARGUMENT),
    UnauthenticatedError: Status(401, grpc.StatusCode.UNAUTHENTICATED),
    PermissionDeniedError: Status(403, grpc.StatusCode.PERMISSION_DENIED),
    UnknownModelError: Status(404, grpc.StatusCode.NOT_FOUND),
    UnsupportedOperationError: Status(409, grpc.StatusCode.FAILED_PRECONDITION),
    BundleError: Status(409, grpc.StatusCode.FAILED_PRECONDITION),
    OverloadedError: Status(429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    DeadlineExceededError: Status(504, grpc.StatusCode.DEADLINE_EXCEEDED),
    ServerUnreachableError: Status(502, grpc.StatusCode.UNAVAILABLE),
    PerturbScopeError: Status(500, grpc.StatusCode.INTERNAL),
}
"""The table."""


def status_of(error: PerturbScopeError) -> Status:
    """Return the row of an error's nearest listed class."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def explain(error: Exception, call: Call) -> PerturbScopeError:
    """Return the error that the caller is told; called in an except block.

    A :class:`PerturbScopeError` is told as it is. Anything else is a bug of ours: its traceback goes to the log, and
    the caller gets the id under which it stands there, and nothing else.
    """
    if isinstance(error, PerturbScopeError):
        # Other messages quote what the caller sent, which is none of the log's business.
        if not isinstance(error, (InvalidInputError, LimitExceededError, UnknownModelError)):
            call.message = error.message
        return error
    log.bug(call)
    return PerturbScopeError(
        f"The server failed on this request. Its log has the reason under the request id {call.id}."
    )
