"""The vocabulary of a model: over HTTP with an ETag, and the same from every client, the library and the command."""

from __future__ import annotations

import io
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest

from perturbscope import protocol
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.cli import app
from perturbscope.operations.vocabulary import VocabularyAnswer, VocabularyRequest
from perturbscope.protocol.proto import perturbscope_v1_pb2 as pb
from perturbscope.tasks.backends import open_backend
from serving.engine.engine import Engine
from tests.unit.serving.conftest import Connect, MakeEngine

KNOWN = GeneVocabulary.geneformer_gc30m()


def same(answer: VocabularyAnswer) -> None:
    assert answer.gene_id == KNOWN.gene_ids
    np.testing.assert_array_equal(answer.token, KNOWN.tokens)
    np.testing.assert_array_equal(answer.median, KNOWN.medians)
    assert dict(zip(answer.special_tokens, map(int, answer.special_ids), strict=True)) == KNOWN.special_tokens
    assert (answer.max_length, answer.source) == (2048, KNOWN.source)
    assert answer.meta.vocabulary_hash == KNOWN.hash


async def test_over_http_it_is_named_and_not_sent_twice(engine: Engine, http: httpx.AsyncClient) -> None:
    path = "/v1/models/fake/vocabulary"
    reply = await http.get(path)
    assert reply.status_code == 200, reply.text
    same(protocol.answer_from_json(VocabularyAnswer, reply.content))
    tag = reply.headers["etag"]
    for sent in (tag, f'W/{tag}, "x"', "*"):
        again = await http.get(path, headers={"if-none-match": sent})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    for name in ("fake@1.0", "fake-1.0-000000000000"):
        assert (await http.get(f"/v1/models/{name}/vocabulary")).content == reply.content
    assert (await http.get(path, headers={"if-none-match": '"other"'})).status_code == 200
    assert (await http.get("/v1/models/none/vocabulary")).status_code == 404
    assert (await http.get(f"{path}?limit=3")).status_code == 422
    assert engine.admission.held_bytes == 0


async def test_it_counts_for_the_memory_of_the_server(make_engine: MakeEngine, connect: Connect) -> None:
    small = connect(make_engine(max_held_bytes=2**20, max_body_bytes=2**20))
    assert (await small.get("/v1/models/fake/vocabulary")).status_code == 413


@pytest.mark.parametrize("body", ["json", "arrow"])
async def test_as_an_operation(http: httpx.AsyncClient, engine: Engine, stub_of: Any, body: str) -> None:
    request = VocabularyRequest(model="fake")
    if body == "json":
        content, kind = protocol.request_to_json(request), protocol.JSON
        read = protocol.answer_from_json
    else:
        content, kind = protocol.request_to_arrow(request), protocol.ARROW
        read = protocol.answer_from_arrow
    reply = await http.post("/v1/vocabulary", content=content, headers={"content-type": kind, "accept": kind})
    assert reply.status_code == 200, reply.text
    same(read(VocabularyAnswer, reply.content))
    refused = await http.post("/v1/vocabulary", content=b"x", headers={"content-type": protocol.HDF5})
    assert (refused.status_code, "h5ad" in refused.text) == (415, False)
    assert (await (await stub_of(engine)).Models(pb.ModelsRequest())).models


def test_from_a_bundle_and_as_a_command(tiny_bundle: Any, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    backend = open_backend(str(tiny_bundle))
    answer = backend.ask(VocabularyRequest())
    backend.close()
    assert isinstance(answer, VocabularyAnswer)
    assert app.run(["vocabulary", "--bundle", str(tiny_bundle)]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out), float_precision="round_trip")
    assert list(table.gene_id) == list(answer.gene_id)
    np.testing.assert_array_equal(table.token, answer.token)
    np.testing.assert_array_equal(table["median"], answer.median)
    assert app.run(["vocabulary", str(tmp_path / "v.parquet"), "--bundle", str(tiny_bundle)]) == 0
    assert len(pd.read_parquet(tmp_path / "v.parquet")) == len(answer.gene_id)
