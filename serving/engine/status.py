"""What a caller is told when a request fails: the one table of HTTP statuses and gRPC codes.

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
)


class Status(NamedTuple):
    """How one kind of error travels."""

    http: int
    grpc: grpc.StatusCode


STATUS: dict[type[PerturbScopeError], Status] = {
    InvalidInputError: Status(422, grpc.StatusCode.INVALID_ARGUMENT),
    UnsupportedMediaTypeError: Status(415, grpc.StatusCode.INVALID_ARGUMENT),
    LimitExceededError: Status(413, grpc.StatusCode.INVALID_ARGUMENT),
    UnauthenticatedError: Status(401, grpc.StatusCode.UNAUTHENTICATED),
    PermissionDeniedError: Status(403, grpc.StatusCode.PERMISSION_DENIED),
    UnknownModelError: Status(404, grpc.StatusCode.NOT_FOUND),
    BundleError: Status(409, grpc.StatusCode.FAILED_PRECONDITION),
    OverloadedError: Status(429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    DeadlineExceededError: Status(504, grpc.StatusCode.DEADLINE_EXCEEDED),
    ServerUnreachableError: Status(502, grpc.StatusCode.UNAVAILABLE),
    PerturbScopeError: Status(500, grpc.StatusCode.INTERNAL),
}
"""The table."""


def status_of(error: PerturbScopeError) -> Status:
    """The row of an error."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def internal(request_id: str) -> PerturbScopeError:
    """What a caller is told of a bug of ours: where the operator finds it, and nothing of its inside."""
    return PerturbScopeError(
        f"The server failed on this request. Its log has the reason under the request id {request_id}."
    )
