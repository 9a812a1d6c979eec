"""Features that are no genes stay out of every container, whatever their column of types is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import io, sparse

import perturbscope as ps
from perturbscope.cells.genes import GeneResolver
from perturbscope.cells.readers import open_cells
from perturbscope.cells.readers.features import features_of_types
from perturbscope.cells.readers.memory import AnnDataSource
from perturbscope.cells.readers.source import CellSource
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import MalformedMatrixError

GENE = GeneVocabulary.geneformer_gc30m().gene_ids[:30]
OTHERS = {
    "Antibody Capture": ["CD3", "PTPRC"],
    "CRISPR Guide Capture": ["STAT1-1"],
    "Custom": ["GFP"],
    "Peaks": ["c:1-2"],
}
NAMES = [*GENE, *(name for names in OTHERS.values() for name in names)]
TYPES = ["Gene Expression"] * len(GENE) + [kind for kind, names in OTHERS.items() for _ in names]
LEFT_OUT = {"Antibody Capture": 2, "CRISPR Guide Capture": 1, "Custom": 1, "Peaks": 1}
"""What every container below must say."""


def mixed(types: Any = TYPES, column: str = "feature_types", matrix: Callable[[Any], Any] = sparse.csr_matrix) -> Any:
    rng = np.random.default_rng(0)
    counts = np.hstack([rng.poisson(2, (24, len(GENE))) + 1, rng.poisson(300, (24, len(NAMES) - len(GENE)))])
    obs = pd.DataFrame({"label": ["control", "KO"] * 12}, index=[f"cell-{row}" for row in range(24)])
    var = pd.DataFrame(index=NAMES) if types is None else pd.DataFrame({column: types}, index=NAMES)
    return ad.AnnData(matrix(counts.astype(np.float32)), obs=obs, var=var)


def h5mu(rna: Any, path: Path) -> CellSource:
    """Write what mudata writes, a user block included: cells of the whole in another order, with one more."""
    with h5py.File(path / "a.h5mu", "w", userblock_size=512) as file:
        for name, part in (("prot", rna[:, [-1]].copy()), ("rna", rna)):
            ad.io.write_elem(file, f"mod/{name}", part)
        order = [*rna.obs_names[::-1], "another"]
        shared = pd.DataFrame({"shared": [f"of {name}" for name in order]}, index=order)
        ad.io.write_elem(file, "obs", shared)
        ad.io.write_elem(file, "var", pd.DataFrame(index=["a"]))
        ad.io.write_elem(file, "obsmap", {"rna": np.array([*range(24, 0, -1), 0], dtype=np.uint32)})
        ad.io.write_elem(file, "obsm", {"X_all": np.arange(25.0)[:, None], "rna": np.ones(25, bool)})
    with (path / "a.h5mu").open("r+b") as file:
        file.write(b"MuData (format-version=0.1.0;creator=muon)")
    return open_cells(path / "a.h5mu")


def mudata(rna: Any, _: Path) -> CellSource:
    order = [*rna.obs_names[::-1], "another"]
    obs = pd.DataFrame({"shared": [f"of {name}" for name in order]}, index=order)
    modalities = {"prot": rna[:, [-1]].copy(), "rna": rna}
    whole = SimpleNamespace(mod=modalities, obs=obs, obs_names=obs.index, obsm={"X_all": np.arange(25.0)[:, None]})
    return AnnDataSource(whole)


def h5ad(rna: Any, path: Path) -> CellSource:
    rna.write_h5ad(path / "a.h5ad")
    return open_cells(path / "a.h5ad")


def raw(rna: Any, path: Path) -> CellSource:
    rna.raw = rna.copy()
    rna.X = np.log1p(rna.X)
    rna.write_h5ad(path / "a.h5ad")
    return open_cells(path / "a.h5ad", layer="raw")


def zarr(rna: Any, path: Path) -> CellSource:
    with ad.settings.override(zarr_write_format=3):
        rna.write_zarr(path / "a.zarr")
    return open_cells(path / "a.zarr")


def text_column(rna: Any, path: Path) -> CellSource:
    """A column of plain text, as other programs than anndata write it."""
    rna.write_h5ad(path / "a.h5ad")
    with h5py.File(path / "a.h5ad", "r+") as file:
        del file["var/feature_types"]
        file["var/feature_types"] = np.array(rna.var["feature_types"], dtype=object)
    return open_cells(path / "a.h5ad")


def tenx_h5(rna: Any, path: Path) -> CellSource:
    with h5py.File(path / "a.h5", "w") as file:
        group = file.create_group("matrix")
        counts = rna.X.astype(np.int32)
        arrays = {"data": counts.data, "indices": counts.indices, "indptr": counts.indptr, "shape": counts.shape[::-1]}
        for name, values in {**arrays, "barcodes": np.array(rna.obs_names, dtype="S")}.items():
            group[name] = np.asarray(values)
        for name, values in (("id", NAMES), ("name", NAMES), ("feature_type", rna.var["feature_types"])):
            group[f"features/{name}"] = np.array(values, dtype="S")
    return open_cells(path / "a.h5")


def tenx_folder(rna: Any, path: Path) -> CellSource:
    io.mmwrite(path / "matrix.mtx", rna.X.T.astype(np.int32))
    rows = [f"{name}\t{name}\t{kind}" for name, kind in zip(NAMES, rna.var["feature_types"], strict=True)]
    (path / "features.tsv").write_text("\n".join(rows))
    (path / "barcodes.tsv").write_text("\n".join(rna.obs_names))
    return open_cells(path)


def memory(rna: Any, _: Path) -> CellSource:
    return AnnDataSource(rna)


@pytest.mark.filterwarnings("ignore:zarr v3 autosharding", "ignore:Consolidated metadata")
@pytest.mark.parametrize(
    "container", [memory, mudata, h5ad, raw, zarr, text_column, h5mu, tenx_h5, tenx_folder], ids=lambda f: f.__name__
)
def test_genes_alone_are_read_and_the_others_named(
    container: Callable[[Any, Path], CellSource], tmp_path: Path
) -> None:
    adata = mixed()
    wanted = adata.X.toarray()[:, : len(GENE)].astype(int)
    with container(adata, tmp_path) as source:
        cells = source.read()
        assert source.features.left_out == LEFT_OUT
        assert source.warnings == [
            "5 features are no gene and were left out: 2 Antibody Capture, 1 CRISPR Guide Capture, 1 Custom, 1 Peaks."
        ]
        assert list(cells.gene_ids) == list(source.gene_ids) == list(GENE)
        assert np.array_equal(cells.counts.toarray(), wanted)
        assert cells.totals.tolist() == wanted.sum(axis=1).tolist()
        if container in (h5mu, mudata):
            assert source.labels("shared").tolist() == [f"of cell-{row}" for row in range(24)]
            assert source.labels("label").tolist()[:2] == ["control", "KO"]
            assert source.representation("X_all").ravel().tolist() == list(range(23, -1, -1))
            assert source.representations == ["X_all"]


@pytest.mark.parametrize("matrix", [np.asarray, sparse.csc_matrix], ids=["dense", "csc"])
@pytest.mark.parametrize(
    ("column", "genes", "others"),
    [
        ("modality", "Gene Expression", "Peaks"),
        ("feature_type", "rna", "hto"),
        ("feature_biotype", "gene", "spike-in"),
        ("FeatureType", "protein_coding", "Antibody Capture"),
        ("my own kind", "GEX", "sgRNA"),
        ("assay", pd.NA, "ADT"),
    ],
)
def test_a_column_of_types_is_known_by_its_values(
    column: str, genes: Any, others: str, matrix: Callable[[Any], Any], tmp_path: Path
) -> None:
    kinds = pd.array([genes] * len(GENE) + [others] * (len(NAMES) - len(GENE)), dtype="string")
    if column == "assay":
        kinds[0] = "RNA"
    adata = mixed(pd.Categorical(kinds), column, matrix)
    for source in (memory(adata, tmp_path), h5ad(adata, tmp_path)):
        assert source.features.left_out == {others: 5}
        assert list(source.read().gene_ids) == list(GENE)


@pytest.mark.parametrize(
    ("column", "kinds"),
    [
        ("feature_type", ["protein_coding", "lncRNA", "IG_C_gene", "TEC", "processed_pseudogene"]),
        ("genome", ["GRCh38"]),
        ("highly variable in", ["gene", "protein", "both"]),
        ("feature_types", ["Gene Expression"]),
        ("modality", [None]),
    ],
)
def test_other_columns_leave_no_feature_out(column: str, kinds: list[Any]) -> None:
    source = memory(mixed(pd.Categorical([kinds[row % len(kinds)] for row in range(len(NAMES))]), column), Path())
    assert source.features.keep is None or source.features.left_out == {"Peaks": 1}
    assert len(source.gene_ids) >= len(NAMES) - 1


def test_features_without_a_gene_are_refused() -> None:
    with pytest.raises(MalformedMatrixError, match="'Gene Expression': its 2 features are Antibody Capture, Custom"):
        features_of_types(np.array(["Antibody Capture", "Custom"], dtype=object), where="cells.h5")
    other = {"A": mixed().copy(), "B": mixed().copy()}
    with pytest.raises(MalformedMatrixError, match="several modalities that may hold the genes: A, B"):
        AnnDataSource(SimpleNamespace(mod=other))


SYMBOLS = ["PTPRC", "CD4", "STAT1", "JAK2", "NKX2-1", "AL627309.1", "HLA-A", "MT-ND1", "CD99", "TBCE"]


@pytest.mark.parametrize(
    ("names", "doubtful"),
    [
        (SYMBOLS, ""),
        ([*SYMBOLS, "CD3_TotalSeqB", "HTO-1", "anti-CD19"], "3 features (CD3_TotalSeqB, HTO-1, anti-CD19): named like"),
        ([*SYMBOLS, "STAT1-1", "JAK2_sg2"], "2 features (JAK2_sg2, STAT1-1): named like guides"),
        ([*SYMBOLS, "sgSTAT1"], "1 feature (sgSTAT1): named like guides"),
        ([*SYMBOLS, "TBCE-1"], "1 feature (TBCE-1): named like guides, or like a second feature of the same gene"),
        ([*SYMBOLS, "CD45"], "1 feature (CD45): named like antibodies of genes that are there too"),
        (list(GENE), ""),
        ([*GENE, "ERCC-00002", "7SK.2"], ""),
        ([*GENE, "STAT1", "CD45"], "2 features (STAT1, CD45): named by symbol among Ensembl ids"),
        ([*GENE, "STAT1-1"], "1 feature (STAT1-1): named like guides"),
    ],
)
def test_names_that_look_like_no_genes_are_warned_of(names: list[str], doubtful: str) -> None:
    adata = ad.AnnData(np.ones((2, len(names))), var=pd.DataFrame(index=names))
    source = AnnDataSource(adata)
    assert list(source.gene_ids) == names
    assert (doubtful in source.warnings[0] and len(source.warnings) == 1) if doubtful else not source.warnings
    adata.var["feature_types"] = "Gene Expression"
    assert not AnnDataSource(adata).warnings  # the file knows better


def test_intervals_are_peaks_without_a_type() -> None:
    names = [*GENE, "chr1:100-200", "chrX-5-60", "GL000194.1:1-9"]
    source = AnnDataSource(ad.AnnData(np.ones((2, len(names))), var=pd.DataFrame(index=names)))
    assert source.features.left_out == {"Peaks": 3}
    assert list(source.gene_ids) == list(GENE)


def test_a_model_says_what_was_left_out(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    adata = mixed()
    genes = adata[:, : len(GENE)].copy()
    said = "5 features are no gene and were left out"
    with ps.load(tiny_bundle) as model:
        found = model.embeddings(adata)
        assert said in caplog.text
        assert np.array_equal(found.values, model.embed(genes))
        assert found.coverage.n_genes == len(GENE)
        assert found.coverage.to_dict()["left_out"] == LEFT_OUT
        assert "left_out" not in model.embeddings(genes).coverage.to_dict()
        options = {"perturbation_key": "label", "control": "control", "permutations": 9, "min_cells": 4}
        table = model.score(adata, **options)
        assert said in table.attrs["warnings"][0]
        assert table.attrs["provenance"]["coverage"]["left_out"] == LEFT_OUT
        assert table.equals(model.score(genes, **options))
        assert said in ps.degs(adata, perturbation_key="label", control="control").warnings[0]
    assert GeneResolver.default().resolve("CD45")[0] == "ENSG00000081237"  # as a gene, it would have been read
