"""The result page, the labels of a file, and the page on which it is uploaded."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import anndata as ad
import httpx
import numpy as np
import pandas as pd
import pytest

from perturbscope import open_cells, protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import ProviderUnavailableError
from perturbscope.inference.bundle import sha256
from perturbscope.inference.embedder import Embedder
from perturbscope.protocol import ScoreRequest
from perturbscope.scoring.results import ScoreOptions
from serving.call import Call
from serving.engine import reports
from serving.engine.columns import likely_controls, read_columns
from serving.engine.progress import STAGES
from serving.http import schemas
from serving.http.upload_page import EXAMPLE, EXAMPLE_FILE
from tests.reports import EVIL, first_two
from tests.unit.serving.conftest import FAST, LABELS, Connect, MakeEngine, write_h5ad

HDF5 = {"content-type": protocol.HDF5}
PARAMETERS = {"perturbation_key": "perturbation", "control": "control", "options": json.dumps(FAST)}


@pytest.fixture(autouse=True)
def _quick_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map is made by scranpy in a process of its own, which has its own test."""

    def stand_in(values, /, *, n_neighbors, min_dist, seed, check):
        check()
        return first_two(values, n_neighbors=n_neighbors, min_dist=min_dist, seed=seed)

    monkeypatch.setattr(reports, "umap_in_process", stand_in)


async def test_every_kind_of_body_gives_the_page(http: httpx.AsyncClient, tiny_cells: CountMatrix, h5ad: Path) -> None:
    request = ScoreRequest(cells=tiny_cells, perturbations=LABELS, control="control", options=ScoreOptions(**FAST))
    file = h5ad.read_bytes()
    replies = [
        await http.post(
            "/v1/report", content=protocol.request_to_json(request), headers={"content-type": protocol.JSON}
        ),
        await http.post(
            "/v1/report", content=protocol.request_to_arrow(request), headers={"content-type": protocol.ARROW}
        ),
        await http.post("/v1/report", params=PARAMETERS, content=file, headers=HDF5),
        await http.post("/v1/report", files={"file": ("a.h5ad", file)}, data={**PARAMETERS, "title": EVIL}),
    ]
    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert reply.text.startswith("<!doctype html>")
        assert ">KO</td>" in reply.text
        assert "1 perturbation in 24 cells" in reply.text
        assert "differentially expressed genes" in reply.text  # the counts were there
        assert "Low gene coverage" in reply.text
        assert "fake-1.0-000000000000" in reply.text
    assert replies[3].text.count("<script>") == 1
    assert "<h1>&lt;script&gt;" in replies[3].text


async def test_an_embedding_of_the_file_keeps_its_counts(http: httpx.AsyncClient, h5ad: Path) -> None:
    parameters = {**PARAMETERS, "use_rep": "X_pca"}
    reply = await http.post("/v1/report", params=parameters, content=h5ad.read_bytes(), headers=HDF5)
    assert reply.status_code == 200, reply.text
    assert "differentially expressed genes" in reply.text
    assert "fake-1.0" not in reply.text


async def test_parts_that_cannot_be_had_say_why(
    http: httpx.AsyncClient, tiny_cells: CountMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_, **__):
        raise ProviderUnavailableError("No scranpy here.")

    monkeypatch.setattr(reports, "umap_in_process", fail)
    vectors = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
    request = ScoreRequest(embeddings=vectors, perturbations=LABELS, control="control", options=ScoreOptions(**FAST))
    reply = await http.post(
        "/v1/report", content=protocol.request_to_json(request), headers={"content-type": protocol.JSON}
    )
    assert reply.status_code == 200, reply.text
    for part in ("No scranpy here.", "without counts", "no two perturbations", "takes no gene sets"):
        assert part in reply.text


async def test_left_out_cells_are_named_on_the_page(
    http: httpx.AsyncClient, tiny_cells: CountMatrix, tmp_path: Path
) -> None:
    labels = (None, " ", *LABELS[2:])
    file = write_h5ad(tiny_cells, tmp_path / "some.h5ad", labels=labels).read_bytes()
    reply = await http.post("/v1/report", params=PARAMETERS, content=file, headers=HDF5)
    assert "2 of 24 cells have no value in obs[&#x27;perturbation&#x27;]" in reply.text


@pytest.mark.parametrize("route", ["score", "compare", "report"])
async def test_a_model_that_was_trained_on_the_upload_says_so_first(
    make_engine: MakeEngine,
    connect: Connect,
    fake_embedder: Embedder,
    tiny_cells: CountMatrix,
    h5ad: Path,
    tmp_path: Path,
    route: str,
) -> None:
    source = {"name": "thp1", "sha256": sha256(h5ad), "cells": 24}
    fake_embedder.training = {"objective": "mixed batches", "data": {"sources": [source]}}
    http = connect(make_engine())
    parameters = {**PARAMETERS}
    if route == "compare":
        del parameters["control"]  # there is one perturbation, to be compared with the controls

    async def said(path: Path, **more: str) -> list[str]:
        reply = await http.post(f"/v1/{route}", params={**parameters, **more}, content=path.read_bytes(), headers=HDF5)
        assert reply.status_code == 200, reply.text
        if route == "report":
            return reply.text.partition("Read with care")[2].split("<li>")[1:]
        meta = reply.json()["meta"]
        assert ("seen_in_training" in meta["provenance"]) == ("fine_tuned" in meta["warnings"][0])
        return list(meta["warnings"])

    assert "fine-tuned on cells of this file (thp1)" in (await said(h5ad))[0]
    # The same cells with other labels are another file.
    other = write_h5ad(tiny_cells, tmp_path / "gaps.h5ad", labels=(None, *LABELS[1:]))
    assert "24 cells here, as many as in a file" in (await said(other))[0]
    # Vectors that the file brought are not this model's.
    assert not any("fine-tuned" in line for line in await said(other, use_rep="X_pca"))


async def test_errors_and_limits_are_those_of_a_score(make_engine: MakeEngine, connect: Connect, h5ad: Path) -> None:
    http = connect(make_engine(max_cells=10, max_permutations=500))
    file = h5ad.read_bytes()
    for parameters, status, code in (
        (PARAMETERS, 413, "limit_exceeded"),
        ({**PARAMETERS, "options": '{"permutations": 600}', "use_rep": "X_pca"}, 413, "limit_exceeded"),
        ({**PARAMETERS, "control": "nobody", "use_rep": "X_pca"}, 422, "control_label_missing"),
        ({"perturbation_key": "perturbation"}, 422, "invalid_parameter"),
    ):
        reply = await http.post("/v1/report", params=parameters, content=file, headers=HDF5)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        assert reply.headers["content-type"] == protocol.JSON


async def test_the_columns_of_a_file(http: httpx.AsyncClient, tmp_path: Path, tiny_cells: CountMatrix) -> None:
    obs = pd.DataFrame(
        {
            "depth": np.linspace(0, 1, 24),
            "one": ["same"] * 24,
            "barcode": [f"c{i}" for i in range(24)],
            "lane": pd.Categorical(["a", "b"] * 12),
            "Perturbation": ["Non-Targeting_1"] * 4 + ["KO1"] * 12 + [EVIL] * 8,
            "number": [1, 2] * 12,
        },
        index=[f"cell{i}" for i in range(24)],
    )
    adata = ad.AnnData(tiny_cells.counts, obs=obs, var=pd.DataFrame(index=tiny_cells.gene_ids.astype(object)))
    adata.obsm["X_pca"] = np.ones((24, 2))
    adata.write_h5ad(tmp_path / "labels.h5ad")
    file = (tmp_path / "labels.h5ad").read_bytes()
    reply = await http.post("/v1/columns", files={"file": ("labels.h5ad", file)})
    assert reply.status_code == 200, reply.text
    schemas.ColumnsAnswer.model_validate_json(reply.content)
    answer = reply.json()
    assert (answer["n_cells"], answer["n_genes"], answer["representations"]) == (24, 40, ["X_pca"])
    assert [column["name"] for column in answer["columns"]] == ["Perturbation", "lane", "number"]
    first = answer["columns"][0]
    assert (first["control"], first["controls"]) == ("Non-Targeting_1", ["Non-Targeting_1"])
    assert first["labels"][0] == {"label": "KO1", "n_cells": 12}
    assert (await http.post("/v1/columns", content=b"no file", headers=HDF5)).status_code == 422
    assert (await http.post("/v1/columns", content=b"{}", headers={"content-type": protocol.JSON})).status_code == 415


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["TP53", "NT", "control"], ("control", "NT")),
        (["KO", "NT_1", "NT_2"], ("NT_1", "NT_2")),
        (["non-targeting", "BRD4"], ("non-targeting",)),
        (["NTRK1", "NT5E", "VEHICLE1", "NEGR1", "CTRL1P"], ("VEHICLE1",)),
        (["B cells", "Neutrophils", "NT5E high", "Controlled"], ()),
    ],
)
def test_likely_controls(labels: list[str], expected: tuple[str, ...]) -> None:
    assert likely_controls(labels) == expected


def test_a_column_is_recognised_by_its_name_or_its_controls_alone(tmp_path: Path) -> None:
    """Nothing is chosen for who uploads a file but what was recognised."""
    columns = {
        "cell_type": ["B", "T", "NK"], "genes_of_interest": ["a", "b", "c"], "genotype": ["wt", "mut", "het"],
        "sgRNA_id": ["g1", "g2", "g3"], "arm": ["ctrl", "IFN", "TNF"], "target_gene": ["A", "B", "C"],
    }  # fmt: skip
    obs = pd.DataFrame({name: 3 * values for name, values in columns.items()}, index=list("abcdefghi"))
    var = pd.DataFrame({"symbol": ["A", "B"], "mean": [0.5, 1.0]}, index=["g0", "g1"])
    adata = ad.AnnData(np.ones((9, 2), dtype=np.float32), obs=obs, var=var, layers={"counts": np.ones((9, 2))})
    adata.write_h5ad(tmp_path / "a.h5ad")
    with open_cells(tmp_path / "a.h5ad") as source:
        found = read_columns(source)
    assert {column.name: column.recognised for column in found.columns} == {
        "target_gene": True, "sgRNA_id": True, "arm": True, "genes_of_interest": False, "cell_type": False,
        "genotype": False,
    }  # fmt: skip
    assert found.columns[0].name == "target_gene"
    assert (found.layers, found.gene_columns) == (("counts",), ("symbol",))
    assert {column.name: column.control for column in found.columns if column.control} == {"arm": "ctrl"}


async def test_an_upload_is_called_by_its_own_name(http: httpx.AsyncClient, h5ad: Path) -> None:
    whole, form = h5ad.read_bytes(), {**PARAMETERS, "use_rep": "X_pca"}
    for name, shown in (("my screen.h5ad", "my screen.h5ad"), ("C:\\data\\a\u202eb.h5ad", "ab.h5ad")):
        reply = await http.post("/v1/report", files={"file": (name, whole[:-2000])}, data=form)
        assert reply.status_code == 422
        assert shown in reply.json()["error"]["message"]
        assert "upload.h5ad" not in reply.json()["error"]["message"]
        reply = await http.post("/v1/embed", files={"file": (name, whole)}, data={"layer": "nope"})
        assert "upload.h5ad" not in reply.text


async def test_who_waits_is_told_how_far_the_page_is(
    make_engine: MakeEngine, connect: Connect, h5ad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    http, reached, go_on = connect(make_engine()), threading.Event(), threading.Event()

    def waits(values, /, *, n_neighbors, min_dist, seed, check):
        reached.set()
        assert go_on.wait(30)
        return np.zeros((len(values), 2), dtype=np.float32)

    monkeypatch.setattr(reports, "umap_in_process", waits)
    headers = {**HDF5, "x-request-id": "page-1"}
    task = asyncio.create_task(http.post("/v1/report", params=PARAMETERS, content=h5ad.read_bytes(), headers=headers))
    assert await asyncio.to_thread(reached.wait, 30)
    found = await http.get("/v1/progress", params={"id": "page-1"})
    schemas.ProgressAnswer.model_validate_json(found.content)
    assert found.json() == {"stage": "map", "percent": sum(list(STAGES.values())[: list(STAGES).index("map")])}
    go_on.set()
    assert (await task).status_code == 200
    for wanted, status in (("page-1", 404), ("", 422), ("another", 404)):
        assert (await http.get("/v1/progress", params={"id": wanted})).status_code == status
    assert sum(STAGES.values()) == 100
    # An id is a caller's own: nobody else learns of it.
    engine = make_engine()
    engine.front._calls["other", "page-1"] = Call("/v1/report", "http")
    assert (await connect(engine).get("/v1/progress", params={"id": "page-1"})).status_code == 404


async def test_the_example_is_the_shipped_file(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = await http.get(EXAMPLE)
    assert reply.content == EXAMPLE_FILE.read_bytes()
    assert EXAMPLE in (await http.get("/")).text
    monkeypatch.setattr("serving.http.app.EXAMPLE_FILE", Path("/nowhere"))
    assert (await http.get(EXAMPLE)).status_code == 404


async def test_the_upload_page_names_the_limits_and_loads_nothing(make_engine: MakeEngine, connect: Connect) -> None:
    http = connect(make_engine(max_cells=1234, max_body_bytes=7 * 2**20))
    reply = await http.get("/")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "1,234 cells" in reply.text
    assert "7 MB" in reply.text
    assert "{{" not in reply.text
    assert "http" not in reply.text
    assert (await http.get("/v1/openapi.json")).json()["paths"]["/v1/report"]["post"]["responses"]["200"][
        "content"
    ] == {"text/html": {"schema": {"type": "string"}}}


async def test_a_report_leaves_the_event_loop_free(
    http: httpx.AsyncClient, h5ad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(values, /, *, n_neighbors, min_dist, seed, check):
        time.sleep(0.5)
        return np.zeros((len(values), 2), dtype=np.float32)

    monkeypatch.setattr(reports, "umap_in_process", slow)
    task = asyncio.create_task(http.post("/v1/report", params=PARAMETERS, content=h5ad.read_bytes(), headers=HDF5))
    ticks = 0
    while not task.done():
        assert (await http.get("/v1/models")).status_code == 200
        ticks += 1
        await asyncio.sleep(0.02)
    assert (await task).status_code == 200
    assert ticks > 5
