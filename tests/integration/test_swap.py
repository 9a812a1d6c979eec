"""The real service replaces its model while callers over both transports use it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.client import Client, GrpcClient, RetryPolicy
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.golden_making import add_golden
from serving.access.keys import keys_to_json, make_key
from tests.bundles import write_tiny_bundle
from tests.integration.server import RunningServer

TOLERANCE = 1e-6
N_CALLERS = 4
WAIT = 60
"""Seconds; a test that works waits far less."""


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """Three sets of weights of one model, with golden vectors."""
    folder = tmp_path_factory.mktemp("versions")
    return [add_golden(write_tiny_bundle(folder / str(seed), seed=seed)) for seed in range(3)]


def deploy(bundle: Bundle, folder: Path, **changes: Path | bytes) -> None:
    """Put a bundle in place of another as the library does: written aside, then renamed."""
    files: dict[str, Path | bytes] = {name: bundle.path / name for name in bundle.manifest.files}
    Bundle.write(folder, bundle.manifest, files | changes, overwrite=True)


class Callers:
    """Threads that embed the same cells again and again, over HTTP and gRPC."""

    def __init__(self, server: RunningServer, key: str, cells: CountMatrix) -> None:
        self._server, self._key, self._cells = server, key, cells
        self._stop = threading.Event()
        self.answers: list[tuple[str, NDArray[np.float32]]] = []
        self.errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._run, args=(n % 2 == 0,)) for n in range(N_CALLERS)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT)

    def _run(self, http: bool) -> None:
        retries = RetryPolicy(attempts=1)
        client: Client | GrpcClient
        if http:
            client = Client(self._server.url, api_key=self._key, retries=retries)
        else:
            client = GrpcClient(self._server.target, api_key=self._key, retries=retries)
        with client:
            while not self._stop.is_set() and not self.errors:
                try:
                    found = client.embed_cells(self._cells)
                except Exception as error:  # noqa: BLE001  the test shows it
                    self.errors.append(error)
                else:
                    self.answers.append((found.model_id, found.values))

    def wait_for(self, model_id: str) -> None:
        """Until every transport has had time to be answered by a model."""
        waiting = threading.Event()
        for _ in range(WAIT * 20):
            if self.errors or sum(name == model_id for name, _ in self.answers[-20:]) >= N_CALLERS:
                return
            waiting.wait(0.05)
        raise AssertionError(f"no answer by {model_id}; the last: {self.answers[-1:]}")


@pytest.fixture
def service(versions: list[Bundle], tmp_path: Path) -> Iterator[tuple[RunningServer, Path, str]]:
    """A service with a repository that it looks into every second; the folder of its model, and a key for all."""
    key, text = make_key("operator", rights=("infer", "admin"))
    (tmp_path / "keys.json").write_bytes(keys_to_json((key,)))
    (tmp_path / "models").mkdir()
    live = tmp_path / "models" / "live"
    deploy(versions[0], live)
    models, keys = tmp_path / "models", tmp_path / "keys.json"
    with RunningServer(tmp_path, repository=models, repository_poll=1, keys=keys) as running:
        yield running, live, text


def test_callers_never_notice(
    service: tuple[RunningServer, Path, str], versions: list[Bundle], tiny_cells: CountMatrix
) -> None:
    server, live, key = service
    admin = httpx.Client(base_url=server.url, headers={"x-api-key": key}, timeout=WAIT)
    with Callers(server, key, tiny_cells) as callers:
        callers.wait_for(versions[0].model_id)
        deploy(versions[1], live)
        loaded = admin.post("/v1/models/live/load")
        assert loaded.status_code == 200, loaded.text
        assert (loaded.json()["model_id"], loaded.json()["golden"]) == (versions[1].model_id, "matched")
        callers.wait_for(versions[1].model_id)

        # Weights that are not those of the golden vectors, under checksums that agree.
        deploy(versions[1], live, **{"model.onnx": versions[0].path / "model.onnx"})
        refused = admin.post("/v1/models/live/load")
        assert refused.status_code == 409, refused.text
        assert refused.json()["error"]["code"] == "golden_mismatch"
        (listed,) = admin.get("/v1/repository").json()["bundles"]
        assert listed["state"] == "READY"
        assert "does not give the vectors" in listed["reason"]
        assert httpx.get(f"{server.url}/readyz").status_code == 200

        # Nobody asks: the server sees it.
        deploy(versions[2], live)
        callers.wait_for(versions[2].model_id)
    admin.close()
    assert callers.errors == []
    assert server.log.count("model_freed") >= 1
    embedders = {bundle.model_id: Embedder.from_bundle(bundle, threads=1) for bundle in versions}
    expected = {model_id: embedder.embed(tiny_cells).values for model_id, embedder in embedders.items()}
    assert {model_id for model_id, _ in callers.answers} == set(expected)
    for model_id, values in callers.answers:
        np.testing.assert_allclose(values, expected[model_id], rtol=0, atol=TOLERANCE)
