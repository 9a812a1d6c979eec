"""Replies of servers, proxies and BentoML, and the answers or failures that they become."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbscope import protocol
from perturbscope.client import Client, RetryPolicy
from perturbscope.client.conversation import LONGEST_HINT, Failure
from perturbscope.client.transports import grpc_failure, http_answer, http_call, unreachable
from perturbscope.errors import (
    InvalidInputError,
    LimitExceededError,
    NotRawCountsError,
    OverloadedError,
    PermissionDeniedError,
    PerturbScopeError,
    ServerError,
    ServerUnreachableError,
    UnauthenticatedError,
    error_classes,
)
from perturbscope.scoring.results import SCORE_COLUMNS

MODELS = protocol.ModelsRequest()
OURS = {"code": "not_raw_counts", "message": "Raw counts are needed.", "field": "counts"}


def failed(status: int, content: Any, headers: dict[str, str] | None = None) -> Failure:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    with pytest.raises(Failure) as caught:
        http_answer(MODELS, status, headers or {}, body)
    return caught.value


@pytest.mark.parametrize(
    "body",
    [{"error": OURS}, [{"error": OURS}], OURS, [OURS]],
    ids=["object", "list-of-bentoml", "bare", "bare-in-a-list"],
)
def test_our_error_in_any_wrapping(body: Any) -> None:
    failure = failed(422, body)
    assert type(failure.error) is NotRawCountsError
    assert failure.error.to_dict() == OURS
    assert not failure.retry


@pytest.mark.parametrize("code", sorted(error_classes()))
def test_every_error_of_the_tree_arrives_as_itself(code: str) -> None:
    from_http = failed(500, {"error": {"code": code, "message": "m", "field": None}})
    from_grpc = grpc_failure("INTERNAL", "m", [("perturbscope-code", code)], "server")
    assert type(from_http.error) is type(from_grpc.error) is error_classes()[code]
    assert from_http.retry == from_grpc.retry == (code in {"overloaded", "rate_limited", "server_unreachable"})


@pytest.mark.parametrize(
    ("status", "body", "kind", "retry"),
    [
        (400, {"error": "1 validation error", "detail": []}, InvalidInputError, False),
        (400, [{"error": "bad"}], InvalidInputError, False),
        (401, b"", UnauthenticatedError, False),
        (403, b"<html>", PermissionDeniedError, False),
        (404, {"detail": "Not Found"}, ServerError, False),
        (413, b"<html>", LimitExceededError, False),
        (429, {"error": "Too many requests"}, OverloadedError, True),
        (500, {"error": "An unexpected error has occurred, please check the server log."}, ServerError, False),
        (500, b"", ServerError, False),
        (500, b"\xff\xfe", ServerError, False),
        (502, b"<html>bad gateway</html>", ServerUnreachableError, True),
        (503, {"error": "Service Busy"}, ServerUnreachableError, True),
        (504, b"", ServerError, False),
        (302, b"", ServerError, False),
        (500, {"error": {"code": 7}}, ServerError, False),
        (500, [{"error": "a"}, {"error": "b"}], ServerError, False),
    ],
)
def test_errors_of_others_by_their_status(status: int, body: Any, kind: type[PerturbScopeError], retry: bool) -> None:
    failure = failed(status, body)
    assert type(failure.error) is kind
    assert failure.retry is retry
    assert str(status) in failure.error.message


def test_the_text_of_others_is_kept_but_not_at_any_length() -> None:
    assert "Too many requests" in failed(429, {"error": "Too many requests"}).error.message
    assert len(failed(500, {"error": "x" * 10**6}).error.message) < 1000


@pytest.mark.parametrize(
    ("hint", "seconds"), [("2.5", 2.5), ("0", 0.0), ("nan", 1.0), ("-3", 1.0), ("inf", 1.0), ("Wed, 21 Oct 2026", 1.0)]
)
def test_retry_hints(hint: str, seconds: float) -> None:
    ours = {"error": {"code": "overloaded", "message": "full", "field": None}}
    for body in (ours, {"error": "Too many requests"}):
        error = failed(429, body, {"retry-after": hint}).error
        assert isinstance(error, OverloadedError)
        assert error.retry_after == seconds
    error = grpc_failure(
        "RESOURCE_EXHAUSTED", "full", [("perturbscope-code", "overloaded"), ("retry-after", hint)], "s"
    ).error
    assert isinstance(error, OverloadedError)
    assert error.retry_after == seconds


@pytest.mark.parametrize(
    ("status", "details", "kind", "retry"),
    [
        ("UNAVAILABLE", "failed to connect", ServerUnreachableError, True),
        ("DEADLINE_EXCEEDED", None, ServerUnreachableError, False),
        ("RESOURCE_EXHAUSTED", "Received message larger than max (9 vs. 4)", LimitExceededError, False),
        ("RESOURCE_EXHAUSTED", "Concurrent RPC limit exceeded!", OverloadedError, True),
        ("INVALID_ARGUMENT", "no", InvalidInputError, False),
        ("UNAUTHENTICATED", "no", UnauthenticatedError, False),
        ("PERMISSION_DENIED", "no", PermissionDeniedError, False),
        ("UNAVAILABLE", "SSL: CERTIFICATE_VERIFY_FAILED", ServerUnreachableError, False),
        ("UNIMPLEMENTED", "Method not found!", ServerError, False),
        ("CANCELLED", "", ServerError, False),
    ],
)
def test_grpc_statuses_of_others(status: str, details: str | None, kind: type[PerturbScopeError], retry: bool) -> None:
    failure = grpc_failure(status, details, None, "host:1")
    assert type(failure.error) is kind
    assert failure.retry is retry


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/html", b"<html>"),
        ("", b""),
        (protocol.JSON, b"{"),
        (protocol.JSON, b"{}"),
        (protocol.JSON, b'{"models": [{}]}'),
        (protocol.JSON, b'{"models": 3}'),
        (protocol.ARROW, b""),
    ],
)
def test_what_is_no_answer(content_type: str, body: bytes) -> None:
    with pytest.raises(Failure) as caught:
        http_answer(MODELS, 200, {"content-type": content_type}, body)
    assert type(caught.value.error) is ServerError


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["embeddings", "lengths", "n_detected", "known_share", "meta", "results", "models"]


DECODERS = [
    partial(protocol.answer_from_json, protocol.EmbedAnswer),
    partial(protocol.answer_from_json, protocol.ScoreAnswer),
    partial(protocol.answer_from_json, protocol.CompareAnswer),
]


@given(
    answer=st.dictionaries(st.sampled_from(FIELDS), ANYTHING | st.lists(st.lists(st.floats(width=32))), min_size=3),
    decode=st.sampled_from(DECODERS),
)
def test_no_answer_breaks_a_client(answer: dict[str, Any], decode: Callable[[bytes], protocol.Answer]) -> None:
    try:
        found: object = decode(json.dumps(answer).encode())
    except InvalidInputError as error:
        found = error
    assert isinstance(found, (protocol.EmbedAnswer, protocol.ScoreAnswer, protocol.CompareAnswer, InvalidInputError))


@pytest.mark.parametrize(
    "meta",
    [
        {"timings": {"score": 10**400}},
        {"timings": [1]},
        {"provenance": [1]},
        {"coverage": [1]},
        {"coverage": {"n_genes": math.inf}},
        {"warnings": 3},
        {"model_id": 3},
    ],
    ids=str,
)
def test_bad_meta_of_an_answer(meta: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        protocol.answer_from_json(protocol.ScoreAnswer, json.dumps({"results": [], "meta": meta}).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [("z", 10**400), ("z", "1"), ("n_cells", 1.5), ("n_cells", -1), ("n_cells", 2**70), ("flags", None), ("q", ...)],
)
def test_bad_row_of_an_answer(name: str, value: Any) -> None:
    row: dict[str, Any] = dict.fromkeys(SCORE_COLUMNS, 0.5)
    row |= {"perturbation": "a", "metric": "e_distance", "flags": "", "n_cells": 3, "n_controls": 3}
    row |= {"n_used": 3, "p_source": "sequential", "exchanges": 30, "p_tail_source": "", "fired": "", name: value}
    sent = {column: item for column, item in row.items() if item is not ...}
    with pytest.raises(InvalidInputError) as caught:
        protocol.answer_from_json(protocol.ScoreAnswer, json.dumps({"results": [sent], "meta": {}}).encode())
    assert caught.value.field == name


def test_back_off_doubles_with_jitter_and_is_capped() -> None:
    policy, rng = RetryPolicy(first=1.0, longest=8.0), np.random.default_rng(0)
    error = ServerUnreachableError("gone")
    for attempt, longest in [(1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (9, 8.0)]:
        pauses = [policy.pause(attempt, error, rng).seconds for _ in range(50)]
        assert longest / 2 <= min(pauses)
        assert max(pauses) <= longest
        assert len(set(pauses)) > 40
    asked = OverloadedError("full", retry_after=5.0)
    assert all(5.5 <= policy.pause(1, asked, rng).seconds <= 6.0 for _ in range(50))
    forever = OverloadedError("full", retry_after=1e9)
    assert policy.pause(1, forever, rng).seconds <= LONGEST_HINT + 1.0


def test_pauses_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("perturbscope.client.base.time.sleep", waited.append)
    replies = iter([429, 503, 200])

    def serve(request: httpx.Request) -> httpx.Response:
        status = next(replies)
        headers = {"retry-after": "3"} if status == 429 else {}
        return httpx.Response(status, json={"models": []} if status == 200 else {"error": "busy"}, headers=headers)

    with Client("http://server", transport=httpx.MockTransport(serve), seed=1) as client:
        assert client.models() == ()
    assert 3.25 <= waited[0] <= 3.5
    assert 0.5 <= waited[1] <= 1.0


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (httpx.ConnectError("refused"), 3),
        (httpx.ConnectTimeout("slow"), 3),
        (httpx.ReadError("reset"), 3),
        (httpx.RemoteProtocolError("closed"), 3),
        (httpx.ReadTimeout("slow"), 1),
        (httpx.WriteTimeout("slow"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_did_not_arrive_is_retried_and_what_timed_out_is_not(error: Exception, attempts: int) -> None:
    calls = []

    def serve(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        raise error

    policy = RetryPolicy(attempts=3, first=0.0)
    with (
        Client("http://server:1", transport=httpx.MockTransport(serve), retries=policy) as client,
        pytest.raises(ServerUnreachableError, match="http://server:1") as caught,
    ):
        client.models()
    assert len(calls) == attempts
    assert caught.value.__cause__ is error


def test_a_failure_without_words_names_its_kind() -> None:
    assert "ReadError" in unreachable("http://s", httpx.ReadError(""), timed_out=False).error.message


def test_calls_name_what_they_send_and_want() -> None:
    request = protocol.ScoreRequest(embeddings=np.ones((2, 2), dtype=np.float32), perturbations=("a", "b"), control="b")
    arrow, text = http_call(request, "arrow"), http_call(request, "json")
    assert (arrow.method, arrow.path) == ("POST", "/v1/score")
    assert arrow.headers == {"content-type": protocol.ARROW, "accept": protocol.ARROW}
    assert text.headers == {"content-type": protocol.JSON, "accept": protocol.JSON}
    assert http_call(MODELS, "arrow").method == "GET"


def test_headers_of_the_caller_are_sent() -> None:
    def serve(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer token"
        assert request.url == "https://server/api/v1/models"
        return httpx.Response(200, json={"models": []})

    with Client(
        "https://server/api/", headers={"Authorization": "Bearer token"}, transport=httpx.MockTransport(serve)
    ) as client:
        assert client.models() == ()
