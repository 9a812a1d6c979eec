from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import io, sparse

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import CellSource, cells_from_anndata, open_cells
from perturbscope.cells.readers.memory import AnnDataSource
from perturbscope.errors import (
    DuplicateGenesError,
    EmptyCellError,
    InvalidEmbeddingError,
    InvalidParameterError,
    LimitExceededError,
    MalformedMatrixError,
    MissingColumnError,
    NotRawCountsError,
    PerturbScopeError,
    UnreadableFileError,
)

GENES = [f"ENSG{number:011d}" for number in range(12)]
SYMBOLS = [f"GENE{number}" for number in range(12)]


@pytest.fixture
def counts(rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int32]]:
    counts = rng.poisson(1.0, size=(23, 12)).astype(np.int32)
    counts[:, 3] += 1
    return counts


@pytest.fixture
def adata(counts: np.ndarray) -> ad.AnnData:
    obs = pd.DataFrame(
        {
            "perturbation": pd.Categorical(["control", "TP53", "MYC"] * 7 + ["control", None]),
            "guide": [f"g{i % 4}" for i in range(23)],
            "total": counts.sum(axis=1) * 2.0,
            "passed": pd.array([True] * 22 + [None], dtype="boolean"),
            "lane": np.arange(23) % 3,
        },
        index=[f"cell-{i}" for i in range(23)],
    )
    var = pd.DataFrame({"symbol": pd.Categorical(SYMBOLS), "short": ["A"] * 12}, index=GENES)
    adata = ad.AnnData(X=sparse.csr_matrix(counts), obs=obs, var=var)
    adata.layers["counts"] = adata.X * 2
    adata.layers["by_column"] = sparse.csc_matrix(counts)
    adata.layers["dense"] = counts.astype(np.float32)
    adata.layers["logged"] = np.log1p(counts).astype(np.float32)
    adata.obsm["X_pca"] = np.arange(46, dtype=np.float64).reshape(23, 2)
    adata.obsm["frame"] = pd.DataFrame({"a": np.arange(23.0), "b": 1.0}, index=obs.index)
    adata.obsm["sparse"] = sparse.csr_matrix(counts[:, :4])
    adata.raw = adata[:, :8].copy()
    return adata


@pytest.fixture
def h5ad(adata: ad.AnnData, tmp_path: Path) -> Path:
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    return path


def join(chunks: list[CountMatrix]) -> np.ndarray:
    return sparse.vstack([chunk.counts for chunk in chunks]).toarray()


@pytest.mark.parametrize(
    ("layer", "factor"),
    [(None, 1), ("X", 1), ("counts", 2), ("by_column", 1), ("dense", 1)],
    ids=["default", "X", "csr layer", "csc layer", "dense float layer"],
)
def test_h5ad_is_streamed_from_any_storage(h5ad: Path, counts: np.ndarray, layer: str | None, factor: int) -> None:
    with open_cells(h5ad, layer=layer, chunk_cells=5) as source:
        chunks = list(source)
        assert [len(chunk) for chunk in chunks] == [5, 5, 5, 5, 3]
        assert [chunk.first_row for chunk in chunks] == [0, 5, 10, 15, 20]
        assert (join(chunks) == counts * factor).all()
        assert (source.read().counts.toarray() == counts * factor).all()
        assert list(source.gene_ids) == GENES
        assert source.cell_ids[2] == "cell-2"
        assert len(source) == source.n_cells == 23


def test_csc_is_turned_in_bounded_blocks(h5ad: Path, counts: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perturbscope.cells.readers.matrices._SPARSE_VALUES", 7)
    with open_cells(h5ad, layer="by_column", chunk_cells=4) as source:
        assert (join(list(source)) == counts).all()


def test_dense_is_read_in_bounded_blocks(h5ad: Path, counts: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perturbscope.cells.readers.matrices._DENSE_BYTES", 100)
    with open_cells(h5ad, layer="dense") as source:
        assert (source.read().counts.toarray() == counts).all()


def test_raw_has_its_own_genes(h5ad: Path, adata: ad.AnnData, counts: np.ndarray) -> None:
    with open_cells(h5ad, layer="raw") as source:
        assert list(source.gene_ids) == GENES[:8]
        assert (source.read().counts.toarray() == counts[:, :8]).all()
    assert (cells_from_anndata(adata, layer="raw").counts.toarray() == counts[:, :8]).all()


def test_gene_key_and_total_counts_key(h5ad: Path, adata: ad.AnnData, counts: np.ndarray) -> None:
    with open_cells(h5ad, gene_key="symbol", total_counts_key="total", chunk_cells=10) as source:
        assert list(source.gene_ids) == SYMBOLS
        assert np.concatenate([chunk.totals for chunk in source]).tolist() == (counts.sum(axis=1) * 2.0).tolist()
    cells = cells_from_anndata(adata, gene_key="symbol", total_counts_key="total")
    assert list(cells.gene_ids) == SYMBOLS
    assert cells.totals.tolist() == (counts.sum(axis=1) * 2.0).tolist()


def test_genes_without_identifier_become_unknown_genes(adata: ad.AnnData, tmp_path: Path) -> None:
    adata.var["id"] = pd.Categorical([*GENES[:10], None, None])
    adata.write_h5ad(tmp_path / "a.h5ad")
    with open_cells(tmp_path / "a.h5ad", gene_key="id") as source:
        assert list(source.gene_ids[9:]) == [GENES[9], "unnamed-10", "unnamed-11"]
    assert list(cells_from_anndata(adata, gene_key="id").gene_ids[10:]) == ["unnamed-10", "unnamed-11"]


def test_labels_keep_what_is_missing_apart(h5ad: Path) -> None:
    with open_cells(h5ad) as source:
        assert source.labels("perturbation").tolist()[-3:] == ["MYC", "control", None]
        assert source.labels("guide").tolist()[:2] == ["g0", "g1"]
        assert source.labels("lane").tolist()[:4] == ["0", "1", "2", "0"]
        assert source.labels("passed").tolist()[-2:] == ["True", None]


def test_obs_equals_what_anndata_reads(h5ad: Path) -> None:
    with open_cells(h5ad) as source:
        found = source.obs
    wanted = ad.read_h5ad(h5ad).obs
    assert list(found.columns) == list(wanted.columns)
    assert list(found.index) == list(wanted.index)
    for name in ["perturbation", "guide", "total", "lane"]:
        assert found[name].astype(object).equals(wanted[name].astype(object)), name


@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "file"])
def test_representations(h5ad: Path, adata: ad.AnnData, counts: np.ndarray, in_memory: bool) -> None:
    from perturbscope.cells.readers.memory import AnnDataSource

    source: CellSource = AnnDataSource(adata) if in_memory else open_cells(h5ad)
    with source:
        pca = source.representation("X_pca")
        assert pca.dtype == np.float32
        assert pca.tolist() == np.arange(46.0).reshape(23, 2).tolist()
        assert source.representation("frame")[:, 0].tolist() == np.arange(23.0).tolist()
        assert (source.representation("sparse") == counts[:, :4]).all()
        with pytest.raises(MissingColumnError, match=r"obsm 'X_pc'.*'X_pca'.*Did you mean 'X_pca'"):
            source.representation("X_pc")


def test_representation_must_be_numbers(adata: ad.AnnData, tmp_path: Path) -> None:
    adata.obsm["names"] = np.array([["a", "b"]] * 23, dtype=object)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with open_cells(tmp_path / "a.h5ad") as source, pytest.raises(InvalidEmbeddingError, match="dtype object"):
        source.representation("names")


def test_anndata_in_memory_is_not_changed(adata: ad.AnnData) -> None:
    before = adata.copy()
    cells = cells_from_anndata(adata)
    cells.counts.data[:] = 7
    assert (adata.X != before.X).nnz == 0
    assert adata.obs.equals(before.obs)
    assert list(adata.obsm) == list(before.obsm)


@pytest.mark.parametrize("layer", [None, "by_column", "dense", "raw"])
def test_views_and_backed_objects_read_like_others(h5ad: Path, adata: ad.AnnData, layer: str | None) -> None:
    wanted = cells_from_anndata(adata, layer=layer).counts.toarray()
    assert (cells_from_anndata(adata[5:9], layer=layer).counts.toarray() == wanted[5:9]).all()
    backed = ad.read_h5ad(h5ad, backed="r")
    assert (cells_from_anndata(backed, layer=layer).counts.toarray() == wanted).all()
    backed.file.close()


def test_categories_as_anndata_0_7_wrote_them(h5ad: Path) -> None:
    with h5py.File(h5ad, "r+") as file:
        obs = file["obs"]
        codes, names = obs["perturbation/codes"][...], obs["perturbation/categories"][...]
        del obs["perturbation"]
        obs.create_dataset("__categories/perturbation", data=names, dtype=h5py.string_dtype())
        obs["perturbation"] = codes
        obs["perturbation"].attrs["categories"] = obs["__categories/perturbation"].ref
    with open_cells(h5ad) as source:
        assert source.labels("perturbation").tolist()[-4:] == ["TP53", "MYC", "control", None]
        assert "__categories" not in source.columns


def test_compound_frames_as_anndata_0_6_wrote_them(counts: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "old.h5ad"
    csr = sparse.csr_matrix(counts)
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", counts.shape
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(csr, name)
        obs = np.zeros(23, dtype=[("index", "S8"), ("guide", "i1"), ("depth", "f4")])
        obs["index"] = [f"c{i}".encode() for i in range(23)]
        obs["guide"] = np.arange(23) % 2
        file["obs"] = obs
        file["uns/guide_categories"] = np.array([b"control", b"TP53"])
        var = np.zeros(12, dtype=[("index", "S16")])
        var["index"] = [gene.encode() for gene in GENES]
        file["var"] = var
        file["raw.X"], file["raw.var"] = counts[:, :3], var[:3]
    with open_cells(path) as source:
        assert (source.read().counts.toarray() == counts).all()
        assert source.labels("guide").tolist()[:3] == ["control", "TP53", "control"]
        assert source.cell_ids[1] == "c1"
    with open_cells(path, layer="raw") as source:
        assert list(source.gene_ids) == GENES[:3]


def write_10x_h5(path: Path, counts: np.ndarray, *, old: bool = False) -> Path:
    csc = sparse.csc_matrix(counts.T)
    with h5py.File(path, "w") as file:
        group = file.create_group("GRCh38" if old else "matrix")
        group["barcodes"] = np.array([f"AAAC-{i}".encode() for i in range(len(counts))])
        group["shape"] = np.array(csc.shape, dtype=np.int32)
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(csc, name).astype(np.int64)
        ids, names = (np.array([item.encode() for item in items]) for items in (GENES, SYMBOLS))
        if old:
            group["genes"], group["gene_names"] = ids, names
        else:
            group["features/id"], group["features/name"] = ids, names
            group["features/feature_type"] = np.array([b"Gene Expression"] * 10 + [b"Antibody Capture"] * 2)
    return path


def write_10x_mtx(folder: Path, counts: np.ndarray, *, old: bool = False, prefix: str = "") -> Path:
    folder.mkdir()
    opener: Callable[..., Any] = open if old else gzip.open
    end = "" if old else ".gz"
    io.mmwrite(folder / "plain.mtx", sparse.coo_matrix(counts.T))
    with opener(folder / f"{prefix}matrix.mtx{end}", "wb") as file:
        file.write((folder / "plain.mtx").read_bytes())
    (folder / "plain.mtx").unlink()
    kinds = ["Gene Expression"] * 10 + ["CRISPR Guide Capture"] * 2
    rows = [
        f"{gene}\t{symbol}" if old else f"{gene}\t{symbol}\t{kind}"
        for gene, symbol, kind in zip(GENES, SYMBOLS, kinds, strict=True)
    ]
    with opener(folder / f"{prefix}{'genes' if old else 'features'}.tsv{end}", "wt") as file:
        file.write("\n".join(rows) + "\n")
    with opener(folder / f"{prefix}barcodes.tsv{end}", "wt") as file:
        file.write("".join(f"AAAC-{i}\n" for i in range(len(counts))))
    return folder


@pytest.mark.parametrize("old", [True, False], ids=["old", "current"])
@pytest.mark.parametrize("write", [write_10x_h5, write_10x_mtx], ids=["h5", "mtx"])
def test_10x_keeps_gene_expression(tmp_path: Path, counts: np.ndarray, write: Callable[..., Path], old: bool) -> None:
    path = write(tmp_path / "filtered.h5", counts, old=old)
    n_genes = 12 if old else 10
    with open_cells(path, chunk_cells=6) as source:
        assert list(source.gene_ids) == GENES[:n_genes]
        assert (join(list(source)) == counts[:, :n_genes]).all()
        assert source.cell_ids[3] == "AAAC-3"
        assert source.obs.shape == (23, 0)
    with open_cells(path, gene_key="gene_symbols") as source:
        assert list(source.gene_ids) == SYMBOLS[:n_genes]
    with pytest.raises(MissingColumnError, match=r"gene_symbol'.*'gene_symbols'"):
        open_cells(path, gene_key="gene_symbol")
    with pytest.raises(UnreadableFileError, match="no layers"):
        open_cells(path, layer="counts")
    with pytest.raises(MissingColumnError, match="there are: none"), open_cells(path) as source:
        source.column("perturbation")
    with pytest.raises(LimitExceededError, match=r"23 cells; at most 22"):
        open_cells(path, max_cells=22)


def test_mtx_with_a_prefix_is_named_by_its_matrix(tmp_path: Path, counts: np.ndarray) -> None:
    folder = write_10x_mtx(tmp_path / "geo", counts, prefix="GSM1_")
    with open_cells(folder / "GSM1_matrix.mtx.gz") as source:
        assert source.n_cells == 23


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.filterwarnings("ignore:Writing zarr v2", "ignore:zarr v3 autosharding", "ignore:Consolidated metadata")
def test_zarr_reads_like_h5ad(adata: ad.AnnData, counts: np.ndarray, tmp_path: Path, zarr_format: int) -> None:
    with ad.settings.override(zarr_write_format=zarr_format):
        adata.write_zarr(tmp_path / "cells.zarr")
    for layer in [None, "by_column", "dense"]:
        with open_cells(tmp_path / "cells.zarr", layer=layer, chunk_cells=9) as source:
            assert (join(list(source)) == counts).all()
    with open_cells(tmp_path / "cells.zarr", gene_key="symbol") as source:
        assert list(source.gene_ids) == SYMBOLS
        assert source.labels("perturbation").tolist()[-2:] == ["control", None]
        assert source.representation("X_pca").shape == (23, 2)


# --- bad input ---------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_inside_the_signature(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("gene,cell\n1,2\n")


def other_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["weights"] = np.arange(3)


def mudata(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("mod/rna")


def without(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            del file[name]

    return damage


def replaced(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            values = file[name][...]
            del file[name]
            file[name] = change(values)

    return damage


def set_at(position: int, value: float) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values = values.astype(np.float64)
        values[position] = value
        return values

    return change


def zero_row_17(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        start, stop = file["X/indptr"][17:19]
        file["X/data"][start:stop] = 0


def external_link(path: Path) -> None:
    with h5py.File(path.with_name("secret.h5"), "w") as file:
        file["X"] = np.ones((23, 12))
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = h5py.ExternalLink("secret.h5", "/X")


def external_storage(path: Path) -> None:
    secret = path.with_name("secret.bin")
    secret.write_bytes(bytes(23 * 12))
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", (23, 12), np.uint8, external=[(str(secret), 0, 23 * 12)])


def last_row_past_data(values: Any) -> Any:
    values[-1] += 1
    return values


def swapped(values: Any) -> Any:
    values[5], values[6] = values[6], values[5]
    return values


FIRST_OF_ROW_17 = "first value of row 17"

BAD_FILES = [
    pytest.param(truncated, {}, UnreadableFileError, "truncated", id="truncated"),
    pytest.param(cut_inside_the_signature, {}, UnreadableFileError, "not an HDF5 file", id="first bytes only"),
    pytest.param(empty, {}, UnreadableFileError, "is empty", id="empty"),
    pytest.param(text, {}, UnreadableFileError, "not an HDF5 file", id="text"),
    pytest.param(other_hdf5, {}, UnreadableFileError, "it has weights", id="another HDF5 file"),
    pytest.param(mudata, {}, UnreadableFileError, "MuData", id="MuData"),
    pytest.param(without("X"), {}, UnreadableFileError, "no X.*counts", id="no X"),
    pytest.param(without("X/indptr"), {}, UnreadableFileError, "no /X/indptr", id="no indptr"),
    pytest.param(without("var/_index"), {}, UnreadableFileError, "no index", id="var without index"),
    pytest.param(external_link, {}, UnreadableFileError, "points outside the file", id="external link"),
    pytest.param(external_storage, {}, UnreadableFileError, "points outside the file", id="external storage"),
    pytest.param(replaced("X/indptr", last_row_past_data), {}, MalformedMatrixError, "ragged", id="indptr too long"),
    pytest.param(
        replaced("X/indptr", swapped), {}, MalformedMatrixError, "ragged.*row [45]", id="indptr not ascending"
    ),
    pytest.param(replaced("X/indptr", lambda v: v[:-1]), {}, MalformedMatrixError, "24 are needed", id="indptr short"),
    pytest.param(replaced("X/data", lambda v: v[:-1]), {}, MalformedMatrixError, "ragged", id="data short"),
    pytest.param(replaced("X/indices", lambda v: v + 9), {}, MalformedMatrixError, "column index", id="index too big"),
    pytest.param(
        replaced("layers/by_column/indices", lambda v: v + 9),
        {"layer": "by_column"},
        MalformedMatrixError,
        "index outside 0..22",
        id="csc index too big",
    ),
    pytest.param(
        replaced("X/data", lambda v: v.astype("S3")), {}, MalformedMatrixError, "dtype", id="text where counts are due"
    ),
    pytest.param(replaced("obs/_index", lambda v: v[:-1]), {}, MalformedMatrixError, "obs has 22", id="obs short"),
    pytest.param(replaced("X/data", set_at(-1, -1)), {}, NotRawCountsError, "row 22 is negative", id="negative"),
    pytest.param(replaced("X/data", set_at(-1, np.nan)), {}, NotRawCountsError, "row 22 is not a finite", id="NaN"),
    pytest.param(None, {"layer": "logged"}, NotRawCountsError, "row 0 is fractional.*log-tr.*layer='counts'", id="log"),
    pytest.param(zero_row_17, {}, EmptyCellError, "first: row 17", id="empty cell"),
    pytest.param(None, {"gene_key": "short"}, DuplicateGenesError, "'A'", id="duplicate genes"),
    pytest.param(None, {"layer": "count"}, MissingColumnError, r"'count'.*Did you mean 'counts'", id="layer"),
    pytest.param(None, {"gene_key": "Symbols"}, MissingColumnError, "Did you mean 'symbol'", id="gene key"),
    pytest.param(None, {"total_counts_key": "totals"}, MissingColumnError, "Did you mean 'total'", id="totals key"),
    pytest.param(None, {"total_counts_key": "guide"}, MalformedMatrixError, "'guide' has dtype", id="totals text"),
    pytest.param(None, {"total_counts_key": "lane"}, MalformedMatrixError, "Total counts of row 0", id="totals small"),
    pytest.param(None, {"chunk_cells": 0}, InvalidParameterError, "chunk_cells is 0", id="chunk of nothing"),
    pytest.param(None, {"max_cells": 3}, LimitExceededError, "23 cells; at most 3", id="too many cells"),
]


@pytest.mark.parametrize(("damage", "options", "error", "message"), BAD_FILES)
def test_bad_files(
    h5ad: Path,
    damage: Callable[[Path], None] | None,
    options: dict[str, Any],
    error: type[PerturbScopeError],
    message: str,
) -> None:
    if damage:
        damage(h5ad)
    with (
        pytest.raises(error, match=message) as caught,
        open_cells(h5ad, **{"chunk_cells": 4, **options}) as source,
    ):
        list(source)
    assert caught.value.field


def test_a_missing_file_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match=r"nowhere\.h5ad does not exist"):
        open_cells(tmp_path / "nowhere.h5ad")
    with pytest.raises(UnreadableFileError, match="without matrix"):
        open_cells(tmp_path)


def test_a_missing_label_names_what_there_is(h5ad: Path) -> None:
    with open_cells(h5ad) as source, pytest.raises(MissingColumnError) as caught:
        source.labels("Perturbations", field="perturbation_key")
    assert "'perturbation', 'guide', 'total'" in caught.value.message
    assert "Did you mean 'perturbation'?" in caught.value.message
    assert caught.value.field == "perturbation_key"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "barcodes.tsv.gz").unlink(), "no barcodes.tsv"),
        (lambda folder: (folder / "features.tsv.gz").write_bytes(b"\x1f\x8bnot gzip"), "cannot be read"),
        (lambda folder: (folder / "matrix.mtx.gz").write_bytes(gzip.compress(b"hello")), "cannot be read"),
        (lambda folder: truncated(folder / "matrix.mtx.gz"), "cannot be read"),
    ],
    ids=["no barcodes", "damaged features", "not a matrix", "truncated matrix"],
)
def test_bad_mtx_folders(tmp_path: Path, counts: np.ndarray, damage: Callable[[Path], None], message: str) -> None:
    folder = write_10x_mtx(tmp_path / "mtx", counts)
    damage(folder)
    with pytest.raises(UnreadableFileError, match=message):
        open_cells(folder)


def test_mtx_and_its_tables_must_agree(tmp_path: Path, counts: np.ndarray) -> None:
    folder = write_10x_mtx(tmp_path / "mtx", counts, old=True)
    (folder / "barcodes.tsv").write_text("AAAC-1\n")
    with pytest.raises(MalformedMatrixError, match="23 cells, but there are 1 barcodes"):
        open_cells(folder)
    (folder / "genes.tsv").write_text("ENSG1\tA\n")
    with pytest.raises(MalformedMatrixError, match="12 rows, but there are 1 genes"):
        open_cells(folder)


def test_several_genomes_are_refused(tmp_path: Path, counts: np.ndarray) -> None:
    path = write_10x_h5(tmp_path / "a.h5", counts, old=True)
    with h5py.File(path, "r+") as file:
        file.copy("GRCh38", "mm10")
    with pytest.raises(UnreadableFileError, match="GRCh38, mm10"):
        open_cells(path)


@pytest.mark.parametrize("kind", ["h5ad", "10x"])
def test_any_damage_gives_a_typed_error_or_cells(
    h5ad: Path, counts: np.ndarray, tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    path = h5ad if kind == "h5ad" else write_10x_h5(tmp_path / "a.h5", counts)
    whole = path.read_bytes()
    damaged = tmp_path / "damaged.h5"
    outcomes = {"cells": 0, "error": 0}
    for trial in range(150):
        content = bytearray(whole)
        if trial % 3 == 0:
            content = content[: int(rng.integers(1, len(whole)))]
        else:
            # The first kilobytes hold the structure; damage to values alone can go unnoticed.
            for at in rng.integers(0, 6000, size=8):
                content[int(at)] = int(rng.integers(256))
        damaged.write_bytes(bytes(content))
        try:
            with open_cells(damaged, chunk_cells=7) as source:
                list(source)
                assert len(source.obs) == source.n_cells
            outcomes["cells"] += 1
        except PerturbScopeError:
            outcomes["error"] += 1
    assert outcomes["error"] > 50


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("place", ["compressor", "filters"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_pickled_zarr_columns_are_never_loaded(adata: ad.AnnData, tmp_path: Path, place: str) -> None:
    store, mark = tmp_path / "a.zarr", tmp_path / "the bomb went off"
    with ad.settings.override(zarr_write_format=2):
        adata.write_zarr(store)
    column = store / "obs" / "lane"
    described = json.loads((column / ".zarray").read_text())
    described |= {"compressor": None, "filters": None, place: {"id": "pickle"}}
    if place == "filters":
        described["filters"] = [{"id": "delta", "dtype": "<i8"}, {"id": "pickle"}]
    (column / ".zarray").write_text(json.dumps(described))
    (column / "0").write_bytes(pickle.dumps(_Bomb(mark)))
    (store / ".zmetadata").unlink(missing_ok=True)
    with pytest.raises(UnreadableFileError), open_cells(store) as source:
        source.labels("lane")
    assert not mark.exists()


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A file whose matrix takes 240 MB in memory is streamed within a fraction of that."""
    path = tmp_path / "large.h5ad"
    n_cells, per_cell, n_genes = 20_000, 1000, 1000
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", (n_cells, n_genes)
        n_values = n_cells * per_cell
        file.create_dataset("X/data", (n_values,), np.float64, chunks=(2**16,), compression="lzf", fillvalue=1)
        indices = file.create_dataset("X/indices", (n_values,), np.int32, chunks=(2**16,), compression="lzf")
        for start in range(0, n_cells, 1000):
            indices[start * per_cell : (start + 1000) * per_cell] = np.tile(np.arange(per_cell), 1000)
        file["X/indptr"] = np.arange(0, n_values + 1, per_cell)
        for name, length in (("obs", n_cells), ("var", n_genes)):
            file[f"{name}/_index"] = np.array([f"{name}{i}".encode() for i in range(length)])
            file[name].attrs["_index"] = "_index"
    script = (
        "import sys, resource\n"
        "from perturbscope.cells.readers import open_cells\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "source = open_cells(sys.argv[1], chunk_cells=500)\n"
        "next(iter(source)); before = peak()\n"
        "total = sum(int(cells.counts.sum()) for cells in source)\n"
        "print(total, peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    total, grown = map(int, done.stdout.split())
    assert total == n_cells * per_cell
    assert grown < 40_000, f"{grown} kB"


@pytest.mark.parametrize(
    ("values", "labels"),
    [(["a", None, "b", "a"], ["a", None, "b", "a"]), ([2.5, None, 1, 2.5], ["2.5", None, "1.0", "2.5"])],
)
def test_labels_of_a_category_are_one_string(values: list[object], labels: list[str | None]) -> None:
    obs = pd.DataFrame({"label": pd.Categorical(values)}, index=list("wxyz"))
    found = AnnDataSource(ad.AnnData(np.ones((4, 2), np.float32), obs=obs)).labels("label")
    assert found.tolist() == labels
    assert found[0] is found[3]
