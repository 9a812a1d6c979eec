"""JSON that is hardly JSON, on every route that takes some: each a typed 422, never a 500."""

from __future__ import annotations

import itertools
import json
from typing import Any

import httpx
import pytest

from perturbscope.protocol.operations import OPERATIONS
from serving.http import schemas

SPOILT: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \n",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "UTF-32": "{}".encode("utf-32-le"),
    "bytes that are not UTF-8": b'{"model": "\xff"}',
    "a surrogate in UTF-8": b'{"model": "\xed\xa0\x80"}',
    "deep lists": b"[" * 100_000,
    "deep lists that end": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a long number": b'{"model": ' + b"1" * 10_000 + b"}",
    "a name twice": b'{"model": "a", "model": "a"}',
    "two values": b"{} {}",
    "a comma too many": b'{"a": 1,}',
    "single quotes": b"{'a': 1}",
    "a comment": b"{} // x",
    "NUL": b"\x00",
    "a number": b"7",
    "null": b"null",
    "text": b'"cells"',
    "NaN": b"NaN",
    "-Infinity": b"-Infinity",
}
ROUTES = ("/v1/embed", "/v1/score", "/v1/compare", "/v1/report", "/v2/models/fake/infer", "/v2/repository/index")


@pytest.mark.parametrize("route", ROUTES)
async def test_hardly_json(http: httpx.AsyncClient, route: str, caplog: pytest.LogCaptureFixture) -> None:
    for case, content in SPOILT.items():
        if route.startswith("/v2/repository") and case == "nothing":
            continue  # which is what its callers send
        reply = await http.post(route, content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 422, f"{case}: {reply.text}"
        error = reply.json()["error"]
        assert (error if isinstance(error, str) else error["message"]).strip()
        assert len(reply.content) < 1000
    assert not [record for record in caplog.records if record.exc_info]


STRANGE: dict[str, Any] = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
    "an integer past 64 bits": 2**64,
    "a negative integer past 64 bits": -(2**63) - 1,
    "an integer past any float": 10**400,
    "a lone surrogate": "\ud800",
    "an object": {},
    "a list": [[]],
    "a truth value": True,
    "null": None,
    "text": "1",
}
NEVER = ("NaN", "infinity", "minus infinity", "an integer past any float", "a lone surrogate")
"""Those that are good nowhere."""
FIELDS: dict[str, list[tuple[str | int, ...]]] = {
    "/v1/embed": [("cells", name, 0) for name in ("gene_ids", "indptr", "indices", "data")]
    + [("cells", name) for name in ("gene_ids", "indptr", "indices", "data", "first_row")]
    + [("cells",), ("model",)],
    "/v1/score": [
        *(("embeddings", 0, 0), ("embeddings", 0), ("embeddings",), ("perturbations", 0), ("control",)),
        *(("options", "min_cells"), ("options", "permutations"), ("options",), ("batches",)),
    ],
    "/v1/compare": [("pairs", 0, 0), ("pairs", 0), ("pairs",), ("control",), ("options", "seed")],
    "/v2/models/fake/infer": [("inputs", 0, name) for name in ("name", "datatype", "shape", "data", "parameters")]
    + [("inputs", 0, "shape", 0), ("inputs", 0, "data", 0), ("inputs", 0), ("inputs",), ("id",), ("outputs",)]
    + [("parameters",), ("parameters", "binary_data_output")],
}
"""Where strange values are put, in the examples of the OpenAPI document."""


def example(route: str) -> dict[str, Any]:
    from serving.openinference.documents import EXAMPLE

    operation = OPERATIONS.get(route.rpartition("/")[2])
    found = schemas.example(operation) if operation is not None else {**EXAMPLE, "parameters": {}}
    copied: dict[str, Any] = json.loads(json.dumps(found))
    return copied


@pytest.mark.parametrize("route", FIELDS)
async def test_strange_values_anywhere(http: httpx.AsyncClient, route: str, caplog: pytest.LogCaptureFixture) -> None:
    for path, case in itertools.product(FIELDS[route], STRANGE):
        body = example(route)
        inner: Any = body
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = STRANGE[case]
        reply = await http.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
        # Some of them are good in some places: null for what may be left out, a text for a name.
        assert reply.status_code in (200, 404, 413, 422), f"{path}, {case}: {reply.text}"
        if case in NEVER:
            assert reply.status_code == 422, f"{path}, {case}: {reply.text}"
    assert not [record for record in caplog.records if record.exc_info]


async def test_the_examples_themselves_are_good(http: httpx.AsyncClient) -> None:
    for route in FIELDS:
        reply = await http.post(route, json=example(route))
        assert reply.status_code == 200, f"{route}: {reply.text}"


async def test_a_name_of_a_path_may_be_anything(http: httpx.AsyncClient) -> None:
    for name in ("%FF", "%00", "%ED%A0%80", "a%2Fb", "..%2F..", "x" * 5000, "%F0%9F%A7%AC"):
        for end in ("", "/ready", "/infer"):
            reply = await http.request("POST" if end == "/infer" else "GET", f"/v2/models/{name}{end}")
            assert reply.status_code == (422 if len(name) > 512 else 404), f"{name[:20]}{end}: {reply.text[:500]}"
            assert len(reply.content) < 1000
