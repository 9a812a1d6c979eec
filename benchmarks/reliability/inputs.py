"""Real cells, their right vectors, and one request over every interface."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import open_cells
from perturbscope.client import AsyncClient, AsyncGrpcClient, RetryPolicy
from perturbscope.client.conversation import ChunkLimits, Failure
from perturbscope.client.transports import http_answer, unreachable
from perturbscope.inference.bundle import Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import EmbedRequest
from serving.settings import DEFAULT_BUNDLE
from tests.fuzz.seeds import h5ad
from tests.integration.server import ROOT, RunningServer

TOLERANCE = 1e-5
"""Largest difference of a value from the library's, since a padded sum may be added in another order."""
FILES = {
    "papalexi": ("papalexi2021_eccite_thp1_panel", "total_umi_full_transcriptome"),
    "pbmc3k": ("pbmc3k_10x", None),
    "jurkat": ("datlinger_jurkat_cropseq", "total_umi_full_transcriptome"),
    "hill": ("hill2018_cropseq_mcf10a_panel", None),
}
ONCE = RetryPolicy(attempts=1)


@functools.cache
def real_cells(name: str, n: int) -> CountMatrix:
    """Read the first `n` cells of a data set of data/."""
    file, totals = FILES[name]
    with open_cells(ROOT / "data" / f"{file}.h5ad", total_counts_key=totals) as source:
        return source.rows(0, n)


@functools.cache
def labels(name: str, n: int) -> tuple[str, ...]:
    """Read the perturbations of those cells."""
    with open_cells(ROOT / "data" / f"{FILES[name][0]}.h5ad") as source:
        return tuple(str(label) for label in source.labels("perturbation")[:n])


@functools.cache
def embedder(bundle: Path = DEFAULT_BUNDLE) -> Embedder:
    """Load a bundle in this process."""
    return Embedder.from_bundle(Bundle.open(bundle), threads=1)


@functools.cache
def right_vectors(name: str, n: int, bundle: Path = DEFAULT_BUNDLE) -> NDArray[np.float32]:
    """Embed these cells offline, with the library."""
    return embedder(bundle).embed(real_cells(name, n)).values


def right_vectors_of(cells: CountMatrix, bundle: Path = DEFAULT_BUNDLE) -> NDArray[np.float32]:
    """Embed any cells offline, with the library."""
    return embedder(bundle).embed(cells).values


def is_right(values: NDArray[np.float32] | None, expected: NDArray[np.float32]) -> bool:
    """Return whether vectors are those of the library."""
    return values is not None and values.shape == expected.shape and bool(np.abs(values - expected).max() <= TOLERANCE)


class Asker:
    """Requests for vectors to one service, over every interface; failures are the clients' typed errors.

    Parameters
    ----------
    server
        The service.
    retries
        Retry policy of the clients.
    timeout
        Seconds that one answer may take.
    api_key
        API key of all requests; empty: none.
    """

    def __init__(
        self, server: RunningServer, *, retries: RetryPolicy = ONCE, timeout: float = 300, api_key: str = ""
    ) -> None:
        whole = ChunkLimits(cells=20_000, values=100_000_000)
        settings: dict[str, Any] = {
            "retries": retries,
            "timeout": timeout,
            "chunks": whole,
            "seed": 0,
            "api_key": api_key,
        }
        self.url = server.url
        self.arrow = AsyncClient(server.url, body="arrow", **settings)
        self.json = AsyncClient(server.url, body="json", **settings)
        self.grpc = AsyncGrpcClient(server.target, **settings)
        headers = {"x-api-key": api_key} if api_key else None
        self.http = httpx.AsyncClient(base_url=server.url, timeout=timeout, headers=headers)
        self.ways: dict[str, Callable[[CountMatrix], Awaitable[NDArray[np.float32]]]] = {
            "HTTP JSON": lambda cells: _values(self.json.embed_cells(cells)),
            "HTTP Arrow": lambda cells: _values(self.arrow.embed_cells(cells)),
            "HTTP h5ad": lambda cells: self._file(cells, form=False),
            "HTTP form": lambda cells: self._file(cells, form=True),
            "gRPC": lambda cells: _values(self.grpc.embed_cells(cells)),
        }

    async def warm(self, cells: CountMatrix) -> None:
        """Ask over every interface, several times at once: what the service starts on demand is then there."""
        await asyncio.gather(*(way(cells) for way in self.ways.values() for _ in range(8)))

    async def post(self, path: str, **request: Any) -> httpx.Response:
        """Send a request with httpx; its failures are raised as the client's errors."""
        try:
            return await self.http.post(path, **request)
        except httpx.TransportError as error:
            raise unreachable(self.url, error, timed_out=isinstance(error, httpx.TimeoutException)).error from error

    async def _file(self, cells: CountMatrix, *, form: bool) -> NDArray[np.float32]:
        content = h5ad(cells)
        if form:
            reply = await self.post("/v1/embed", files={"file": ("cells.h5ad", content)})
        else:
            reply = await self.post("/v1/embed", content=content, headers={"content-type": protocol.HDF5})
        try:
            answer = http_answer(EmbedRequest(cells=cells), reply.status_code, reply.headers, reply.content)
        except Failure as failure:
            raise failure.error from failure
        values: NDArray[np.float32] = answer.values  # type: ignore[union-attr]
        return values

    async def close(self) -> None:
        """Close all connections."""
        for client in (self.arrow, self.json, self.grpc):
            await client.close()
        await self.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _values(answer: Awaitable[Any]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = (await answer).values
    return values
