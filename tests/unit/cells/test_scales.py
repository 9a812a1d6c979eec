"""Estimated counts are told from normalised ones, and only they are rounded."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import cells_from_anndata
from perturbscope.errors import NotRawCountsError

RNG = np.random.default_rng(3)
COUNTS = RNG.poisson(RNG.gamma(0.4, 4, (60, 300)) * RNG.uniform(0.4, 2, (60, 1))).astype(float)
COUNTS[:, 0] += 1
GENES = [f"ENSG{number:011d}" for number in range(300)]
TOTALS = COUNTS.sum(axis=1, keepdims=True)
IS_COUNTED = COUNTS > 0


def _some(share: float, change: Any) -> Any:
    """Change some of the values that are not zero."""
    return np.where(IS_COUNTED & (RNG.random(COUNTS.shape) < share), COUNTS + change, COUNTS)


ESTIMATED = {
    "alevin: a read of two or three genes is divided": _some(0.2, RNG.choice([1 / 2, 1 / 3, 2 / 3], COUNTS.shape)),
    "alevin: nearly all whole": _some(0.002, 1 / 3),
    "STARsolo EM: long decimals": _some(0.5, RNG.random(COUNTS.shape)),
    "RSEM: two decimals, many reads": np.round(_some(0.6, RNG.random(COUNTS.shape)) * 40, 2),
    "CellBender: a little less than whole": np.where(IS_COUNTED, COUNTS - RNG.uniform(0.001, 0.2, COUNTS.shape), 0),
    "small values only": np.minimum(_some(0.3, 0.5), 6),
}
SIZE = TOTALS / np.median(TOTALS)
NORMALISED: dict[str, tuple[Any, str]] = {
    "log1p of 10,000 a cell": (np.log1p(COUNTS / TOTALS * 1e4), "log-normalised"),
    "log2 of CPM": (np.log2(COUNTS / TOTALS * 1e6 + 1), "log2-normalised"),
    "log1p, some of the genes": (np.log1p(COUNTS / TOTALS * 1e4)[:, :150], "log-normalised"),
    "log1p of raw counts": (np.log1p(COUNTS), "log-transformed"),
    "log2 of raw counts": (np.log2(COUNTS + 1), "log2-transformed"),
    "square root": (np.sqrt(COUNTS), "square-root transformed"),
    "CPM": (COUNTS / TOTALS * 1e6, "normalised: each cell adds up to 1,000,000"),
    "TPM": (
        (tpm := COUNTS / RNG.uniform(0.3, 9, 300)) / tpm.sum(axis=1, keepdims=True) * 1e6,
        "normalised: each cell adds up to 1,000,000",
    ),
    "size factors, to the median": (COUNTS / SIZE, "normalised"),
    "size factors, some of the genes": ((COUNTS / SIZE)[:, :150], "normalised"),
    "scaled": ((COUNTS - COUNTS.mean(axis=0)) / (COUNTS.std(axis=0) + 1), "scaled or centred"),
}


def _matrix(values: Any, **options: Any) -> CountMatrix:
    return CountMatrix.from_matrix(values, GENES[: values.shape[1]], **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ESTIMATED)
def test_estimated_counts_are_called_so_and_rounded_when_asked(name: str, dtype: str) -> None:
    values = ESTIMATED[name].astype(dtype)
    with pytest.raises(NotRawCountsError, match=r"estimated counts.*--round-counts") as caught:
        _matrix(values)
    assert "normalised;" not in caught.value.message
    assert np.array_equal(_matrix(sparse.csc_matrix(values), round_counts=True).counts.toarray(), np.rint(values))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NORMALISED)
def test_normalised_values_are_called_so_and_never_rounded(name: str, dtype: str) -> None:
    values, what = NORMALISED[name]
    for options in ({}, {"round_counts": True}):
        with pytest.raises(NotRawCountsError, match=f"the data look {what}") as caught:
            _matrix(values.astype(dtype), **options)
        assert "estimated" not in caught.value.message


def test_values_of_no_known_kind_are_rounded_for_whoever_says_that_they_are_estimates() -> None:
    values = COUNTS * RNG.uniform(0.5, 1, COUNTS.shape)  # SoupX, without its rounding
    with pytest.raises(NotRawCountsError, match=r"is fractional \(.*If these are estimated counts.*--round-counts"):
        _matrix(values)
    rounded = np.rint(values)
    assert np.array_equal(_matrix(values, round_counts=True).counts.toarray(), rounded)


def test_whole_counts_are_the_same_with_rounding() -> None:
    assert (_matrix(COUNTS, round_counts=True).counts != _matrix(COUNTS).counts).nnz == 0


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (
            {"spliced": COUNTS, "a": COUNTS, "counts": COUNTS},
            "The layer 'counts' holds whole numbers: give layer='counts'",
        ),
        ({"mine": sparse.csr_matrix(COUNTS)}, "The layer 'mine' holds whole numbers: give layer='mine' (--layer mine)"),
        ({"spliced": COUNTS, "mask": (COUNTS > 0).astype(int)}, "Give the raw counts: a layer"),
        ({"raw": None}, "raw holds whole numbers: give layer='raw'"),
    ],
)
def test_a_layer_with_counts_is_named(layers: dict[str, Any], named: str) -> None:
    adata = ad.AnnData(np.log1p(COUNTS / TOTALS * 1e4), var=pd.DataFrame(index=GENES))
    for name, values in layers.items():
        if values is None:
            adata.raw = ad.AnnData(COUNTS, var=adata.var)
        else:
            adata.layers[name] = values
    with pytest.raises(NotRawCountsError, match="log-normalised") as caught:
        cells_from_anndata(adata)
    assert named in caught.value.message


def test_the_layer_that_was_asked_for_is_not_named() -> None:
    adata = ad.AnnData(COUNTS, var=pd.DataFrame(index=GENES), layers={"logged": np.log1p(COUNTS)})
    with pytest.raises(NotRawCountsError, match="X holds whole numbers: give layer='X'"):
        cells_from_anndata(adata, layer="logged")
