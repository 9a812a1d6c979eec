"""Differentially expressed genes in every way: library, HTTP as JSON, Arrow and upload, gRPC, the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import httpx
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import perturbscope as ps
from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.cli.app import run
from perturbscope.client import Client, GrpcClient
from perturbscope.errors import ControlLabelMissingError, InvalidParameterError, LimitExceededError
from perturbscope.operations.degs import DegsAnswer, DegsRequest
from tests.integration.in_process import Running, running

LABELS = np.repeat(["ctrl_a", "ctrl_b", "up", "nothing"], [60, 40, 40, 30])
BATCHES = np.tile(["x", "y"], 85)


@pytest.fixture(scope="module")
def cells() -> CountMatrix:
    rng = np.random.default_rng(3)
    rates = np.full((170, 30), 3.0)
    rates[LABELS == "up", 4:7] *= 3
    rates[BATCHES == "y", 20:] *= 2
    return CountMatrix.from_matrix(rng.poisson(rates) + (rates > 8), [f"g{i}" for i in range(30)])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server"), max_score_seconds=3.0) as found:
        yield found


@pytest.fixture(scope="module")
def file(cells: CountMatrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "in.h5ad"
    obs = pd.DataFrame({"what": LABELS, "lane": BATCHES}, index=[f"c{i}" for i in range(170)])
    obs.loc["c169", "what"] = None
    adata = anndata.AnnData(sparse.csr_matrix(cells.counts.astype(np.float32)), obs=obs)
    adata.var_names = cells.gene_ids.tolist()
    adata.write_h5ad(path)
    return path


def request(cells: CountMatrix, **changes: Any) -> DegsRequest:
    fields = {"perturbations": tuple(LABELS), "batches": tuple(BATCHES), "control": ("ctrl_a", "ctrl_b"), "top": 8}
    return DegsRequest(cells=cells, **{**fields, **changes})


def test_every_transport_gives_the_genes_of_the_library(server: Running, cells: CountMatrix) -> None:
    true = ps.degs(cells, LABELS.tolist(), control=["ctrl_a", "ctrl_b"], batches=BATCHES.tolist(), top=8)
    up = true.table[true.table["perturbation"] == "up"]
    assert set(up["gene"][:3]) == {"g4", "g5", "g6"}
    nothing, several = true.counts["n_degs"].tolist()
    assert (nothing, several >= 3) == (0, True)
    answers: list[DegsAnswer] = []
    for client in (
        Client(f"http://{server.http}", api_key=server.key),
        Client(f"http://{server.http}", api_key=server.key, body="json"),
        GrpcClient(server.grpc, api_key=server.key),
    ):
        with client:
            answers.append(client.ask(request(cells)))
    with httpx.Client(base_url=f"http://{server.http}", headers=server.headers) as http:
        body = protocol.request_to_json(request(cells))
        reply = http.post("/v1/degs", content=body, headers={"content-type": protocol.JSON})
    assert reply.status_code == 200, reply.text
    assert reply.json()["genes"] == true.table["gene"].tolist()
    for answer in answers:
        assert list(answer.perturbations) == true.table["perturbation"].tolist()
        assert list(answer.genes) == true.table["gene"].tolist()
        for name in ("log2_fold_change", "statistic", "p", "q", "p_normal", "expressed", "mean_control"):
            np.testing.assert_array_equal(getattr(answer, name), true.table[name])
        assert list(answer.p_source) == true.table["p_source"].tolist()
        assert answer.n_degs.tolist() == [0] * 8 + [several] * 8
        provenance = answer.meta.provenance
        assert provenance is not None
        assert provenance["counts"] == true.counts.to_dict("records")
        assert (provenance["test"], provenance["controls"]) == ("van_elteren", ["ctrl_a", "ctrl_b"])
        assert answer.meta.timings["score"] > 0


def test_an_uploaded_file_and_the_command(server: Running, file: Path, tmp_path: Path) -> None:
    with httpx.Client(base_url=f"http://{server.http}", headers=server.headers) as http:
        fields = {"perturbation_key": "what", "batch_key": "lane", "control": '["ctrl_a", "ctrl_b"]', "top": "5"}
        reply = http.post("/v1/degs", files={"file": ("in.h5ad", file.read_bytes())}, data=fields)
        assert reply.status_code == 200, reply.text
        del fields["top"]
        fields["gene_sets"] = "up\t\tg4\tg5\tg6\nother\t\tg10\tg11\tg12\tg13\n"
        sets = http.post(
            "/v1/enrich_genes", files={"file": ("in.h5ad", file.read_bytes())}, data={**fields, "min_members": "3"}
        )
        assert sets.status_code == 200, sets.text
        q = pd.DataFrame(sets.json() | {"meta": None}).set_index(["perturbations", "gene_sets"])["q"]
        assert q["up", "up"] < 0.05 < q["nothing", "up"]
    found = reply.json()
    assert "1 of 170 cells have no value" in " ".join(found["meta"]["warnings"])
    command = ["degs", str(file), "--perturbation-key", "what", "--batch-key", "lane"]
    command += ["--control", "ctrl_a", "--control", "ctrl_b", "--top", "0"]
    counts, genes = tmp_path / "counts.csv", tmp_path / "genes.parquet"
    assert run([*command, str(counts), "--genes", str(genes), "--top-genes", "5"]) == 0
    table = pd.read_parquet(genes)
    assert table["gene"].tolist() == found["genes"]
    assert table["p"].tolist() == found["p"]
    assert pd.read_csv(counts)["n_degs"].tolist() == [row["n_degs"] for row in found["meta"]["provenance"]["counts"]]
    every = tmp_path / "every.csv"
    assert run([*command, "--genes", str(every), "--correction", "screen", "--check-null"]) == 0
    assert len(pd.read_csv(every)) == 2 * 30
    said = json.loads((tmp_path / "every.csv.provenance.json").read_text())
    assert (said["options"]["correction"], said["batch_key"]) == ("screen", "lane")
    assert said["null"]
    before = sorted(tmp_path.iterdir())
    assert run([*command]) == 2
    assert run([*command, str(tmp_path / "a.csv"), "--genes", str(tmp_path / "a.csv")]) == 2
    assert run(["degs", str(file), str(tmp_path / "a.csv"), "--perturbation-key", "what", "--control", "ctrl"]) == 2
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_refused(server: Running, cells: CountMatrix, file: Path) -> None:
    with Client(f"http://{server.http}", api_key=server.key) as client:
        with pytest.raises(ControlLabelMissingError, match="'ctrl'"):
            client.ask(request(cells, control="ctrl"))
        with pytest.raises(InvalidParameterError, match="correction is"):
            client.ask(request(cells, correction="all"))
        with pytest.raises(InvalidParameterError, match="top is 0"):
            client.ask(request(cells, top=0))
        # 17,000 perturbations of a cell: refused before anything is tested.
        many = CountMatrix(
            sparse.vstack([cells.counts] * 100, format="csr"), cells.gene_ids, np.tile(cells.totals, 100)
        )
        labels = ("ctrl", *(f"p{i}" for i in range(len(many) - 1)))
        with pytest.raises(LimitExceededError, match=r"perturbations \("):
            client.ask(DegsRequest(cells=many, perturbations=labels, control="ctrl"))
    with pytest.raises(InvalidParameterError, match="not a key"):
        ps.degs(cells, control="ctrl_a", perturbation_key="what")
    with pytest.raises(InvalidParameterError, match="perturbation_key"):
        ps.degs(file, LABELS.tolist(), control="ctrl_a")
