"""Folders with matrix.mtx, as Cell Ranger, repositories, spreadsheets and other programs leave them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import io, sparse

from perturbscope.cells.readers import open_cells
from perturbscope.errors import MalformedMatrixError, NotRawCountsError, UnreadableFileError

COUNTS = np.array([[1, 0, 3, 2], [0, 2, 0, 9], [4, 0, 0, 1]])
IDS = ["ENSG00000000003", "ENSG00000000005", "ENSG00000000419", "ENSG00000000457"]
SYMBOLS = ["TSPAN6", "TNMD", "DPM1", "SCYL3"]
ROWS = [f"{gene}\t{symbol}\tGene Expression" for gene, symbol in zip(IDS, SYMBOLS, strict=True)]
CELLS = ["AAAC-1", "AAAG-1", "AACC-1"]
QUOTED = ['"' + "\t".join(row.split("\t")) + '"' for row in ROWS]
FIELDS = ["\t".join(f'"{field}"' for field in row.split("\t")) for row in ROWS]


def write(folder: Path, counts: Any = COUNTS.T, **texts: str) -> Path:
    """Write a folder; the names of tables have no dots: ``features_tsv_gz``."""
    folder.mkdir(exist_ok=True)
    io.mmwrite(folder / "plain.mtx", sparse.coo_matrix(counts))
    written = {"matrix.mtx": (folder / "plain.mtx").read_bytes().decode()} | texts
    (folder / "plain.mtx").unlink()
    if "matrix" in texts:
        written[texts["matrix"]] = written.pop("matrix.mtx")
        del written["matrix"]
    for name, text in written.items():
        data = text.encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


def lines(rows: list[str], end: str = "\n") -> str:
    return "".join(f"{row}{end}" for row in rows)


FOLDERS: dict[str, dict[str, Any]] = {
    "version 3": {"matrix": "matrix.mtx.gz", "features.tsv.gz": lines(ROWS), "barcodes.tsv.gz": lines(CELLS)},
    "version 2": {"genes.tsv": lines([row.rsplit("\t", 1)[0] for row in ROWS]), "barcodes.tsv": lines(CELLS)},
    "two columns": {"features.tsv": lines([row.rsplit("\t", 1)[0] for row in ROWS]), "barcodes.tsv": lines(CELLS)},
    "one column": {"genes.tsv": lines(IDS), "barcodes.tsv": lines(CELLS)},
    "lines end as in Windows": {"features.tsv": lines(ROWS, "\r\n"), "barcodes.tsv": lines(CELLS, "\r\n")},
    "no end of the last line": {"features.tsv": lines(ROWS)[:-1], "barcodes.tsv": lines(CELLS)[:-1]},
    "byte order mark": {"features.tsv": "\ufeff" + lines(ROWS), "barcodes.tsv": "\ufeff" + lines(CELLS)},
    "headers": {"features.tsv": lines(["gene_id\tname\ttype", *ROWS]), "barcodes.tsv": lines(["x", *CELLS])},
    "R's quotes": {"features.tsv": lines(FIELDS), "barcodes.tsv": lines([f'"{cell}"' for cell in CELLS])},
    "lines in quotes": {"features.tsv": lines(QUOTED), "barcodes.tsv": lines(CELLS)},
    "a stray quote": {"features.tsv": lines([ROWS[0].replace("TSP", '"TSP'), *ROWS[1:]]), "barcodes.tsv": lines(CELLS)},
    "two stray quotes": {
        "features.tsv": lines([ROWS[0], ROWS[1].replace("TN", '"TN'), ROWS[2].replace("DP", '"DP'), ROWS[3]]),
        "barcodes.tsv": lines(CELLS),
    },
    "unknown types": {
        "features.tsv": lines([row.replace("Gene Expression", "hg38") for row in ROWS]),
        "barcodes.tsv": lines(CELLS),
    },
    "places of genes": {"features.tsv": lines([f"{row}\tchr1\t1\t2" for row in ROWS]), "barcodes.tsv": lines(CELLS)},
    "GEO": {
        "matrix": "GSM12_A-matrix.mtx.gz",
        "GSM12_A-features.tsv.gz": lines(ROWS),
        "GSM12_A-barcodes.tsv.gz": lines(CELLS),
    },
    "GEO, one table of genes": {
        "matrix": "GSM12_matrix.mtx.gz",
        "GSE9_features.tsv.gz": lines(ROWS),
        "GSM12_barcodes.tsv.gz": lines(CELLS),
    },
    "kallisto": {
        "matrix": "cells_x_genes.mtx",
        "turned": True,
        "cells_x_genes.genes.txt": lines(IDS),
        "cells_x_genes.barcodes.txt": lines(CELLS),
    },
    "alevin-fry": {
        "matrix": "quants_mat.mtx",
        "turned": True,
        "quants_mat_cols.txt": lines(IDS),
        "quants_mat_rows.txt": lines(CELLS),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_same_cells_come_out_of_every_kind_of_folder(kind: str, tmp_path: Path) -> None:
    texts = dict(FOLDERS[kind])
    turned = texts.pop("turned", False)
    folder = write(tmp_path / "sample", COUNTS if turned else COUNTS.T, **texts)
    paths = [folder, folder / texts.get("matrix", "matrix.mtx")]
    for path in paths:
        with open_cells(path) as source:
            assert list(source.gene_ids) == IDS
            assert list(source.cell_ids) == CELLS
            assert np.array_equal(source.read().counts.toarray(), COUNTS)
            assert not source.warnings


def test_one_of_several_samples_is_chosen_by_its_matrix(tmp_path: Path) -> None:
    folder = tmp_path / "GSE9"
    for number, counts in enumerate((COUNTS, COUNTS + 1)):
        prefix = f"GSM{number}_"
        texts = {f"{prefix}features.tsv.gz": lines(ROWS), f"{prefix}barcodes.tsv.gz": lines(CELLS)}
        write(folder, counts.T, matrix=f"{prefix}matrix.mtx.gz", **texts)
    with pytest.raises(UnreadableFileError, match=r"samples: GSM0_matrix.mtx.gz, GSM1_matrix.mtx.gz. Give the"):
        open_cells(folder)
    with open_cells(folder / "GSM1_matrix.mtx.gz") as source:
        assert np.array_equal(source.read().counts.toarray(), COUNTS + 1)
    (folder / "GSM1_features.tsv.gz").unlink()
    with pytest.raises(UnreadableFileError, match=r"has no GSM1_features.tsv\[.gz\] or GSM1_genes.tsv"):
        open_cells(folder / "GSM1_matrix.mtx.gz")  # the genes of GSM0 are not taken for its own
    with pytest.raises(UnreadableFileError, match="but its folders GSE9 are 10x directories: give one of these"):
        open_cells(tmp_path)


@pytest.mark.parametrize("cells", [CELLS[:2], [*CELLS, "AAGG-1"], []], ids=["fewer", "more", "none"])
def test_there_is_one_barcode_a_cell(cells: list[str], tmp_path: Path) -> None:
    folder = write(tmp_path / "a", **{"features.tsv": lines(ROWS), "barcodes.tsv": lines(cells)})
    with pytest.raises(MalformedMatrixError, match=f"3 cells, but there are {len(cells)} barcodes"):
        open_cells(folder)


def test_estimated_counts_beside_whole_ones_are_chosen_by_their_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "Solo", **{"features.tsv": lines(ROWS), "barcodes.tsv": lines(CELLS)})
    estimated = COUNTS + 0.25 * (COUNTS == 9)
    io.mmwrite(folder / "UniqueAndMult-EM.mtx", sparse.coo_matrix(estimated.T))
    with open_cells(folder) as source:
        assert np.array_equal(source.read().counts.toarray(), COUNTS)
    with (
        open_cells(folder / "UniqueAndMult-EM.mtx") as source,
        pytest.raises(NotRawCountsError, match="--round-counts"),
    ):
        source.read()
    with open_cells(folder / "UniqueAndMult-EM.mtx", round_counts=True) as source:
        assert np.array_equal(source.read().counts.toarray(), COUNTS)
        assert "were rounded to the nearest one" in source.warnings[0]
