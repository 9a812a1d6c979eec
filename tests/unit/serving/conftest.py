"""An engine over a fake model, and the two transports in front of it, in the test's own event loop."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anndata as ad
import grpc
import httpx
import numpy as np
import pandas as pd
import pytest

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import EmbedRequest, ModelInfo
from perturbscope.protocol.messages import OutputInfo
from perturbscope.protocol.proto.perturbscope_v1_pb2_grpc import PerturbScopeStub
from serving.engine.engine import Engine
from serving.grpc.server import GrpcServer
from serving.models.loading import ServedModel
from serving.models.registry import ModelRegistry
from serving.queue import Dispatcher
from serving.settings import Settings
from tests.apps import app_of, grpc_server_of

LABELS = ("control",) * 12 + ("KO",) * 12
FAST = {"permutations": 19, "min_cells": 4, "repeats": 2}
"""Options of a score that takes milliseconds."""


def served(embedder: Embedder, name: str = "fake", **options: int) -> ServedModel:
    info = ModelInfo(
        name=name,
        version="1.0",
        model_id=f"{name}-1.0-000000000000",
        family="rank",
        width=embedder.width,
        vocabulary_hash=embedder.vocabulary_hash,
        layer="none",
        pooling="none",
        licence="Apache-2.0",
        variant="fp32",
        device="cpu",
        golden="absent",
        outputs=tuple(
            OutputInfo(name=spec.name, per=spec.per, width=spec.width, meaning=spec.meaning, names=spec.names or ())
            for spec in embedder.outputs
        ),
    )
    probe = CountMatrix.from_matrix([[1]], ["ENSG00000000003"])
    return ServedModel(info, embedder, Dispatcher(embedder, **options), probe)


MakeEngine = Callable[..., Engine]


@pytest.fixture
async def make_engine(fake_embedder: Embedder) -> AsyncIterator[MakeEngine]:
    """Engines over the fake model; keyword arguments are settings. Closed at the end."""
    made: list[Engine] = []

    def make(**settings: Any) -> Engine:
        chosen = Settings(**settings)
        model = served(fake_embedder, max_queued_tokens=chosen.max_queued_tokens)
        engine = Engine(ModelRegistry(chosen, [model]), chosen)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        gate = getattr(fake_embedder.encoder, "gate", None)
        if gate is not None:
            gate.set()
        await engine.close()


@pytest.fixture
async def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


Connect = Callable[[Engine], httpx.AsyncClient]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """An HTTP client of an engine."""
    clients: list[httpx.AsyncClient] = []

    def make(engine: Engine) -> httpx.AsyncClient:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app_of(engine)), base_url="http://test")
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
async def http(engine: Engine, connect: Connect) -> httpx.AsyncClient:
    return connect(engine)


@pytest.fixture
async def stub_of() -> AsyncIterator[Callable[[Engine], Any]]:
    """A gRPC stub of an engine, on a free port."""
    servers: list[GrpcServer] = []
    channels: list[grpc.aio.Channel] = []

    async def make(engine: Engine) -> Any:
        server = grpc_server_of(engine)
        port = await server.start()
        servers.append(server)
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        channels.append(channel)
        return PerturbScopeStub(channel)

    yield make
    for channel in channels:
        await channel.close()
    for server in servers:
        await server.stop()


@pytest.fixture
def embed_json(tiny_cells: CountMatrix) -> dict[str, Any]:
    """A good JSON body, to be spoilt."""
    body: dict[str, Any] = json.loads(protocol.request_to_json(EmbedRequest(cells=tiny_cells)))
    return body


@pytest.fixture
def h5ad(tiny_cells: CountMatrix, tmp_path: Path) -> Path:
    """The tiny cells as a file with labels, batches and an embedding; two cells have no label."""
    return write_h5ad(tiny_cells, tmp_path / "cells.h5ad")


def write_h5ad(cells: CountMatrix, path: Path, *, labels: tuple[str | None, ...] = LABELS) -> Path:
    obs = pd.DataFrame(
        {"perturbation": list(labels), "batch": ["a", "b"] * (len(cells) // 2)},
        index=[f"cell{i}" for i in range(len(cells))],
    )
    adata = ad.AnnData(cells.counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=cells.gene_ids.astype(object)))
    adata.obsm["X_pca"] = np.random.default_rng(1).standard_normal((len(cells), 5)).astype(np.float32)
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(path)
    return path
