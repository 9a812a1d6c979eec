"""The OpenAPI document is true: schemathesis, all checks, every route."""

from __future__ import annotations

from pathlib import Path

import httpx

from serving.http.gate import OPEN
from tests.integration.in_process import MODEL, Running, running
from tests.integration.openapi import check, patient_with_bad_keys


def test_schemathesis_finds_nothing_with_all_its_checks(tmp_path: Path) -> None:
    with patient_with_bad_keys(), running(tmp_path) as server:
        every_example_is_answered(server)
        done = check(server, tmp_path, "--max-examples", "2", "--seed", "1")
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    assert "cases:" in done.stdout


def every_example_is_answered(server: Running) -> None:
    """And each route that is not open says which keys it takes."""
    with httpx.Client(base_url=f"http://{server.http}", headers=server.admin_headers, timeout=60) as http:
        document = http.get("/v1/openapi.json").json()
        tried = []
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert path in OPEN or [*map(list, operation["security"])] == [["bearer"], ["apiKey"]], path
                example = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
                if example:
                    reply = http.post(path.format(name=MODEL, version="0.1"), json=example)
                    assert reply.status_code == 200, f"{path}: {reply.text}"
                    tried.append(path)
    assert len(tried) == 6, tried
