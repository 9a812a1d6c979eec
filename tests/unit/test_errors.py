"""The error tree: stable codes, and the way from a code back to its class."""

from __future__ import annotations

import inspect
import re

import pytest

from perturbscope import errors
from perturbscope.errors import (
    BundleError,
    CorruptBundleError,
    InvalidInputError,
    NotRawCountsError,
    OverloadedError,
    PerturbScopeError,
    ServerError,
    error_classes,
    from_code,
)

ALL = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, PerturbScopeError) and cls.__module__ == errors.__name__
]


def test_the_codes_are_stable():
    """Clients in other languages compare these strings: a change here is a breaking change."""
    assert {cls.code for cls in ALL} == {
        "internal",
        "invalid_input",
        "not_raw_counts",
        "malformed_matrix",
        "empty_cell",
        "unknown_genes",
        "duplicate_genes",
        "missing_column",
        "control_label_missing",
        "too_few_cells",
        "too_few_controls",
        "invalid_embedding",
        "invalid_parameter",
        "unreadable_file",
        "unsupported_media_type",
        "limit_exceeded",
        "unknown_model",
        "unsupported_operation",
        "bundle",
        "corrupt_bundle",
        "unsupported_bundle",
        "vocab_mismatch",
        "golden_mismatch",
        "provider_unavailable",
        "inference_failed",
        "solver_failed",
        "untrusted_bundle",
        "overloaded",
        "rate_limited",
        "deadline_exceeded",
        "unauthenticated",
        "permission_denied",
        "server_unreachable",
        "server_error",
    }


def test_every_class_has_a_code_of_its_own():
    classes = error_classes()  # of the library, and of whatever else is imported
    assert len({cls.code for cls in ALL}) == len(ALL)
    assert all(classes[cls.code] is cls for cls in ALL)


def test_the_docstring_draws_the_whole_tree():
    drawn = re.findall(r"(\w+Error)\b", (errors.__doc__ or "").split("Each class")[0])
    assert sorted(drawn) == sorted(cls.__name__ for cls in ALL)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.code)
def test_an_error_survives_the_wire(cls):
    sent = cls("Row 3 is empty.", field="counts")
    wire = sent.to_dict()
    assert wire == {"code": cls.code, "message": "Row 3 is empty.", "field": "counts"}
    received = from_code(wire["code"], wire["message"], field=wire["field"])
    assert type(received) is cls
    assert (str(received), received.message, received.field) == ("Row 3 is empty.", "Row 3 is empty.", "counts")


def test_a_field_is_optional():
    assert NotRawCountsError("x").to_dict()["field"] is None


def test_an_unknown_code_becomes_a_server_error():
    assert type(from_code("from_the_future", "no idea")) is ServerError


def test_overload_says_when_to_come_back():
    assert OverloadedError("full").retry_after == 1.0
    assert OverloadedError("full", retry_after=2.5).retry_after == 2.5


def test_callers_can_catch_a_whole_branch():
    assert issubclass(NotRawCountsError, InvalidInputError)
    assert issubclass(CorruptBundleError, BundleError)
    assert not issubclass(BundleError, InvalidInputError)


def test_error_classes_include_those_of_other_packages():
    class PluginError(PerturbScopeError):
        code = "plugin_of_a_test"

    try:
        assert error_classes()["plugin_of_a_test"] is PluginError
    finally:
        PluginError.code = "internal"
