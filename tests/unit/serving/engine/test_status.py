"""The one table of statuses covers every error, and says the same over both transports."""

from __future__ import annotations

import grpc
import pytest

from perturbscope.errors import (
    BundleError,
    DeadlineExceededError,
    InvalidInputError,
    LimitExceededError,
    OverloadedError,
    PermissionDeniedError,
    PerturbScopeError,
    UnauthenticatedError,
    UnknownModelError,
    UnsupportedMediaTypeError,
    UnsupportedOperationError,
    error_classes,
)
from serving.call import Call
from serving.engine.status import STATUS, explain, status_of

CLASSES = sorted(error_classes().values(), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_has_a_row_and_blame_is_the_same_on_both_transports(cls: type[PerturbScopeError]) -> None:
    status = status_of(cls("what happened"))
    callers_fault = {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
    assert (400 <= status.http < 500) == (status.grpc in callers_fault)
    assert (
        (status.http == 429) == (status.grpc is grpc.StatusCode.RESOURCE_EXHAUSTED) == issubclass(cls, OverloadedError)
    )
    assert (status.http in (415, 422)) == issubclass(cls, InvalidInputError)
    assert (status.http == 415) == issubclass(cls, UnsupportedMediaTypeError)
    assert (status.http == 413) == issubclass(cls, LimitExceededError)
    assert (status.http == 404) == issubclass(cls, UnknownModelError)
    assert (status.http == 409) == issubclass(cls, BundleError | UnsupportedOperationError)
    assert (status.http == 401) == issubclass(cls, UnauthenticatedError)
    assert (status.http == 403) == issubclass(cls, PermissionDeniedError)
    assert (status.http == 504) == issubclass(cls, DeadlineExceededError)


def test_the_table_names_classes_of_the_tree_only() -> None:
    assert set(STATUS) <= set(CLASSES)


def test_an_internal_error_says_where_to_look_and_nothing_else() -> None:
    error = explain(ValueError("a secret of ours"), Call("/v1/embed", "http", id="abc123"))
    assert status_of(error) == (500, grpc.StatusCode.INTERNAL)
    assert error.to_dict() == {
        "code": "internal",
        "message": "The server failed on this request. Its log has the reason under the request id abc123.",
        "field": None,
    }
