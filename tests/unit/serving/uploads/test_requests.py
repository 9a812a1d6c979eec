"""Uploads cannot reach outside of themselves, and cannot grow without bound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import httpx
import numpy as np
import pytest

from perturbscope import protocol
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import InvalidParameterError, LimitExceededError, UnreadableFileError
from perturbscope.protocol import EmbedRequest
from serving.settings import Settings
from serving.uploads import requests
from serving.uploads.hdf5_checks import check_file
from serving.uploads.requests import read_upload


def test_a_plain_file_is_taken(h5ad: Path) -> None:
    check_file(h5ad, Settings(max_values=10**6))


def test_an_external_link_is_refused(h5ad: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.arange(24)
    with h5py.File(h5ad, "a") as file:
        file["obs/leak"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "secret")
    with pytest.raises(UnreadableFileError, match="/obs/leak lies outside of the file"):
        check_file(h5ad, Settings(max_values=10**6))


def test_external_storage_is_refused(h5ad: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_bytes(bytes(24))
    with h5py.File(h5ad, "a") as file:
        external = [(str(tmp_path / "secret.txt"), 0, 24)]
        file.create_dataset("obs/leak", (24,), dtype="u1", external=external)
    with pytest.raises(UnreadableFileError, match="/obs/leak lies outside"):
        check_file(h5ad, Settings(max_values=10**6))


def test_a_virtual_dataset_is_refused(h5ad: Path, tmp_path: Path) -> None:
    layout = h5py.VirtualLayout(shape=(24,), dtype="i8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "secret", shape=(24,))
    with h5py.File(h5ad, "a") as file:
        file.create_virtual_dataset("obs/leak", layout)
    with pytest.raises(UnreadableFileError, match="/obs/leak lies outside"):
        check_file(h5ad, Settings(max_values=10**6))


def test_links_in_a_ring_end(h5ad: Path) -> None:
    with h5py.File(h5ad, "a") as file:
        file["obs/self"] = file["obs"]
        file["uns/soft"] = h5py.SoftLink("/uns/soft")
    check_file(h5ad, Settings(max_values=10**6))


def test_a_compressed_bomb_is_noticed_before_it_is_read(h5ad: Path) -> None:
    with h5py.File(h5ad, "a") as file:
        file.create_dataset("obs/bomb", (10**9,), dtype="i8", chunks=(10**6,), compression="gzip")
    with pytest.raises(LimitExceededError, match=r"/obs/bomb has 1,000,000,000 values"):
        check_file(h5ad, Settings(max_values=10**6))


def test_cells_read_in_pieces_are_the_same(
    h5ad: Path, tiny_cells: CountMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "_CHUNK_VALUES", 40 * 5)
    request = read_upload("embed", h5ad, {}, Settings()).request
    assert isinstance(request, EmbedRequest)
    np.testing.assert_array_equal(request.cells.counts.toarray(), tiny_cells.counts.toarray())
    np.testing.assert_array_equal(request.cells.totals, tiny_cells.totals)
    assert request.cells.gene_ids.tolist() == tiny_cells.gene_ids.tolist()


@pytest.mark.parametrize(
    "limits", [{"max_cells": 10}, {"max_genes": 10}, {"max_values": 400}], ids=["cells", "genes", "values"]
)
def test_limits_hold_for_uploads(h5ad: Path, limits: dict[str, Any]) -> None:
    with pytest.raises(LimitExceededError):
        read_upload("embed", h5ad, {}, Settings(**limits))


def test_too_many_vectors_in_a_file(h5ad: Path) -> None:
    parameters = {"perturbation_key": "perturbation", "control": "control", "use_rep": "X_pca"}
    with pytest.raises(LimitExceededError, match="24 vectors"):
        read_upload("score", h5ad, parameters, Settings(max_vectors=10))


def test_a_column_without_any_label(h5ad: Path) -> None:
    with h5py.File(h5ad, "a") as file:
        del file["obs/perturbation"]
        labels = file.create_dataset("obs/perturbation", data=np.array([""] * 24, dtype=h5py.string_dtype()))
        labels.attrs["encoding-type"], labels.attrs["encoding-version"] = "string-array", "0.2.0"
    with pytest.raises(InvalidParameterError, match=r"No cell has a value in obs\['perturbation'\]"):
        read_upload("score", h5ad, {"perturbation_key": "perturbation", "control": "control"}, Settings())


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_mudata_file_gives_its_genes(h5ad: Path, tmp_path: Path, compression: str | None) -> None:
    """It begins with a user block, and its modality has other cells than the whole."""
    rna = ad.read_h5ad(h5ad)
    path = tmp_path / "upload.h5mu"
    with h5py.File(path, "w", userblock_size=512) as file:
        options = {"compression": compression} if compression else {}
        for name, part in (("rna", rna), ("prot", rna[:, :2].copy())):
            ad.io.write_elem(file, f"mod/{name}", part, dataset_kwargs=options)
        ad.io.write_elem(file, "obs", rna.obs[[]], dataset_kwargs=options)
        ad.io.write_elem(file, "var", rna.var[[]], dataset_kwargs=options)
    upload = read_upload("embed", path, {}, Settings())
    wanted = read_upload("embed", h5ad, {}, Settings()).request.cells
    assert (upload.request.cells.counts != wanted.counts).nnz == 0
    columns = read_upload("columns", path, {}, Settings()).request
    assert columns == read_upload("columns", h5ad, {}, Settings()).request


async def test_what_a_file_holds_beside_genes_is_said_in_the_answer(http: httpx.AsyncClient, h5ad: Path) -> None:
    adata = ad.read_h5ad(h5ad)
    adata.var["feature_types"] = ["Gene Expression"] * (adata.n_vars - 2) + ["Antibody Capture"] * 2
    adata.X = adata.X.astype(np.float32)
    adata.X.data[::5] += 0.3
    adata.write_h5ad(h5ad)
    file = {"content": h5ad.read_bytes(), "headers": {"content-type": protocol.HDF5}}
    refused = (await http.post("/v1/embed", **file)).json()["error"]
    assert refused["code"] == "not_raw_counts"
    assert "estimated counts" in refused["message"]
    assert "round_counts=true beside an uploaded file" in refused["message"]
    options = {"perturbation_key": "perturbation", "control": "control", "round_counts": "true"}
    options["options"] = json.dumps({"permutations": 9, "min_cells": 4})
    for route, given in (("embed", {"round_counts": "on"}), ("score", options)):
        answer = (await http.post(f"/v1/{route}", params=given, **file)).json()
        meta = answer["meta"]
        said = " ".join([*meta["warnings"], *answer.get("warnings", [])])
        assert "2 features are no gene and were left out: 2 Antibody Capture." in said
        assert "were rounded to the nearest one" in said
        assert meta["coverage"]["n_genes"] == adata.n_vars - 2
        assert meta["coverage"]["left_out"] == {"Antibody Capture": 2}
        if route == "score":
            assert meta["provenance"]["round_counts"] is True
    page = (await http.post("/v1/report", params=options, **file)).text
    assert "2 features are no gene and were left out: 2 Antibody Capture." in page
    wrong = (await http.post("/v1/embed", params={"round_counts": "maybe"}, **file)).json()["error"]
    assert (wrong["code"], wrong["field"]) == ("invalid_parameter", "round_counts")
