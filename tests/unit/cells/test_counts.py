"""CountMatrix: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from perturbscope.cells.counts import MAX_COUNT, CountMatrix
from perturbscope.errors import (
    DuplicateGenesError,
    EmptyCellError,
    InvalidInputError,
    MalformedMatrixError,
    NotRawCountsError,
)

GENES = ["CD3D", "LYZ", "MS4A1"]
COUNTS = np.array([[1, 0, 2], [0, 3, 0]])


def csr(data=(1, 2, 3), indices=(0, 2, 1), indptr=(0, 2, 3), genes=GENES, **options):
    return CountMatrix.from_csr(np.array(data), np.array(indices), np.array(indptr), genes, **options)


# What it takes


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64, np.float16])
def test_dense_counts_of_any_dtype(dtype):
    counts = COUNTS.astype(dtype)
    cells = CountMatrix.from_matrix(counts, GENES)
    assert cells.counts.dtype == np.int32
    np.testing.assert_array_equal(cells.counts.toarray(), counts)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil", "dok", "bsr"])
@pytest.mark.parametrize("container", ["matrix", "array"])
def test_sparse_counts_of_any_form(form, container):
    matrix = getattr(sparse, f"{form}_{container}")(COUNTS)
    cells = CountMatrix.from_matrix(matrix, GENES)
    assert isinstance(cells.counts, sparse.csr_matrix)
    np.testing.assert_array_equal(cells.counts.toarray(), COUNTS)
    np.testing.assert_array_equal(cells.totals, [3, 3])


@pytest.mark.parametrize(
    "genes",
    [
        GENES,
        tuple(GENES),
        np.array(GENES),
        np.array(GENES, dtype=object),
        pd.Index(GENES),
        pd.Categorical(GENES),
        pd.array(GENES, dtype="string"),
    ],
    ids=["list", "tuple", "str", "object", "index", "categorical", "nullable"],
)
def test_gene_ids_of_any_kind(genes):
    cells = CountMatrix.from_matrix(COUNTS, genes)
    assert cells.gene_ids.dtype.kind == "U"
    assert cells.gene_ids.tolist() == GENES


def test_floats_that_are_almost_integers_are_those_integers():
    cells = CountMatrix.from_matrix(COUNTS + np.array([[4e-7, 0, -4e-7], [0, 0, 0]]), GENES)
    np.testing.assert_array_equal(cells.counts.toarray(), COUNTS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint32])
def test_one_more_than_the_largest_count_is_refused(dtype):
    """float32 cannot tell 2^31 from 2^31 - 1; int32 cannot hold it."""
    with pytest.raises(NotRawCountsError, match="larger than 2147483647"):
        csr(data=np.array([MAX_COUNT + 1, 1, 1], dtype=dtype))


def test_half_precision_holds_its_own_counts():
    assert csr(data=np.array([60000, 1, 1], dtype=np.float16)).counts.max() == 60000


def test_the_largest_count():
    assert CountMatrix.from_matrix([[MAX_COUNT, 0, 1]], GENES).counts.max() == MAX_COUNT


def test_repeated_entries_are_added_and_indices_sorted():
    cells = csr(data=(1, 2, 4, 3), indices=(2, 0, 2, 1), indptr=(0, 3, 4))
    np.testing.assert_array_equal(cells.counts.toarray(), [[2, 0, 5], [0, 3, 0]])
    assert cells.counts.has_canonical_format


def test_stored_zeros_are_dropped():
    cells = csr(data=(1, 0, 3), indices=(0, 1, 1))
    assert cells.counts.nnz == 2


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("data", [(2, 0, 1, 3), (2, 5, 1, 3)], ids=["stored zero", "no zero"])
@pytest.mark.parametrize("indices", [(0, 1, 2, 1), (2, 1, 0, 1), (1, 0, 1, 1)], ids=["sorted", "unsorted", "repeated"])
def test_the_callers_arrays_stay_as_they_are(data, indices, index_dtype):
    given_arrays = np.array(data, np.int32), np.array(indices, index_dtype), np.array((0, 3, 4), index_dtype)
    before = [array.copy() for array in given_arrays]
    cells = CountMatrix.from_csr(*given_arrays, GENES)
    cells.counts.data[:] = 7
    for array, old in zip(given_arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


@given(hnp.arrays(np.int32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.integers(0, 50)))
def test_any_matrix_of_counts_survives(counts):
    counts[:, 0] += 1
    genes = [f"g{number}" for number in range(counts.shape[1])]
    for matrix in (counts, counts.astype(float), sparse.csc_array(counts)):
        cells = CountMatrix.from_matrix(matrix, genes)
        np.testing.assert_array_equal(cells.counts.toarray(), counts)
        np.testing.assert_array_equal(cells.totals, counts.sum(axis=1))
        assert (len(cells), cells.n_genes) == counts.shape


# Totals


def test_totals_may_come_from_the_caller():
    assert csr(totals=[10, 3]).totals.tolist() == [10.0, 3.0]


def test_totals_are_doubles():
    """A cell's total may pass 2**31, though no count does."""
    assert CountMatrix.from_matrix([[MAX_COUNT, MAX_COUNT, 0]], GENES).totals.tolist() == [2.0 * MAX_COUNT]


@pytest.mark.parametrize(
    ("totals", "says"),
    [
        ([10, 2], r"row 7 are 2, but its genes sum to 3"),
        ([np.nan, 3], r"row 6 are nan"),
        ([10, np.inf], r"row 7 are inf"),
        ([10], r"shape \(1,\).*2 numbers are needed"),
        ([[10], [3]], r"shape \(2, 1\)"),
        (["10", "3"], r"dtype <U2"),
    ],
)
def test_totals_that_cannot_be(totals, says):
    with pytest.raises(MalformedMatrixError, match=says) as caught:
        csr(totals=totals, first_row=6)
    assert caught.value.field == "total_counts"


# Values that are not raw counts


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (-1.0, "is negative"),
        (np.nan, "is not a finite number"),
        (np.inf, "is not a finite number"),
        (-np.inf, "is not a finite number"),
        (0.6931, "the data look like estimated counts"),
        (33.25, "is fractional; the data look like estimated counts"),
        (2.0**31, "is larger than 2147483647"),
        (2.00001, "is fractional"),
    ],
)
def test_bad_values_name_row_gene_and_remedy(value, why):
    counts = COUNTS.astype(float)
    counts[1, 1] = value
    with pytest.raises(NotRawCountsError) as caught:
        CountMatrix.from_matrix(counts, GENES, first_row=100)
    message = str(caught.value)
    assert why in message
    assert "gene 'LYZ' in row 101" in message
    assert "(1 such values)" in message
    assert "layer='counts'" in message
    assert caught.value.field == "counts"


def test_negative_integers():
    with pytest.raises(NotRawCountsError, match="'MS4A1' in row 0 is negative"):
        csr(data=(1, -2, 3))


def test_integers_beyond_the_limit():
    with pytest.raises(NotRawCountsError, match="is larger than"):
        csr(data=np.array([1, 2**40, 3]))


def test_repeated_entries_that_add_up_beyond_the_limit():
    with pytest.raises(NotRawCountsError, match="add up to more than"):
        csr(data=(MAX_COUNT, MAX_COUNT, 3), indices=(0, 0, 1))


def test_a_log_normalised_matrix_is_recognised(tiny_cells):
    normalised = np.log1p(tiny_cells.counts.toarray() / tiny_cells.totals[:, None] * 1e4)
    with pytest.raises(NotRawCountsError, match="log-normalised"):
        CountMatrix.from_matrix(normalised, tiny_cells.gene_ids)


@given(st.integers(0, 5), st.integers(0, 3))
def test_the_first_bad_value_is_the_one_named(row, column):
    counts = np.ones((6, 4))
    counts[row:, column] = 0.5
    with pytest.raises(NotRawCountsError, match=f"gene 'g{column}' in row {row} .*{6 - row} such values"):
        CountMatrix.from_matrix(counts, ["g0", "g1", "g2", "g3"])


# Shapes and structure


@pytest.mark.parametrize(
    ("change", "field", "says"),
    [
        ({"indptr": (0, 2, 4)}, "indptr", "must be equal"),
        ({"indices": (0, 2)}, "indptr", "must be equal"),
        ({"indptr": (0, 4, 3)}, "indptr", "decreases at row 1"),
        ({"indptr": (1, 2, 3)}, "indptr", "must start with 0"),
        ({"indptr": np.zeros(0, int)}, "indptr", "must start with 0"),
        ({"indices": (0, 3, 1)}, "indices", "column index 3 lies outside the 3"),
        ({"indices": (0, -1, 1)}, "indices", "column index -1 lies outside"),
        ({"indices": (0.0, 2.0, 1.0)}, "indices", "dtype float64; integers are needed"),
        ({"indptr": (0.0, 2.0, 3.0)}, "indptr", "dtype float64; integers are needed"),
        ({"data": [[1, 2, 3]]}, "data", "2 dimensions"),
        ({"data": ("1", "2", "3")}, "counts", "dtype <U1"),
        ({"data": (1j, 2j, 3j)}, "counts", "dtype complex128"),
        ({"data": (), "indices": (), "indptr": (0,)}, "counts", "no cells"),
    ],
)
def test_malformed_csr(change, field, says):
    with pytest.raises(MalformedMatrixError, match=says) as caught:
        csr(**change)
    assert caught.value.field == field


@pytest.mark.parametrize("matrix", [np.ones(3), np.ones((1, 1, 3)), 5])
def test_two_dimensions_are_needed(matrix):
    with pytest.raises(MalformedMatrixError, match="dimension"):
        CountMatrix.from_matrix(matrix, GENES)


def test_text_is_not_counts():
    with pytest.raises(MalformedMatrixError, match="integers or floats"):
        CountMatrix.from_matrix(COUNTS.astype(str), GENES)


def test_one_gene_id_a_column():
    with pytest.raises(MalformedMatrixError, match=r"3 columns.*2 gene identifiers"):
        CountMatrix.from_matrix(COUNTS, GENES[:2])
    with pytest.raises(MalformedMatrixError, match=r"3 columns.*4 gene identifiers"):
        CountMatrix.from_matrix(COUNTS, [*GENES, "CD8A"])


@pytest.mark.parametrize(
    "genes", [[1, 2, 3], [b"a", b"b", b"c"], [["a"], ["b"], ["c"]]], ids=["int", "bytes", "nested"]
)
def test_gene_ids_are_strings(genes):
    with pytest.raises(MalformedMatrixError, match="list of strings") as caught:
        CountMatrix.from_matrix(COUNTS, genes)
    assert caught.value.field == "gene_ids"


def test_a_gene_id_stands_for_one_column():
    with pytest.raises(DuplicateGenesError, match=r"1 gene identifier\(s\).*'LYZ'.*--gene-key"):
        CountMatrix.from_matrix(COUNTS, ["LYZ", "CD3D", "LYZ"])


def test_cells_without_counts():
    counts = np.array([[1, 0, 0], [0, 0, 0], [0, 0, 0]])
    with pytest.raises(EmptyCellError, match=r"2 of 3 cells have no counts \(first: row 41\).*filter_cells"):
        CountMatrix.from_matrix(counts, GENES, first_row=40)


def test_all_of_these_are_invalid_input():
    with pytest.raises(InvalidInputError):
        CountMatrix.from_matrix(np.zeros((2, 0)), [])


# Choosing cells


def test_choosing_cells(tiny_cells):
    chosen = tiny_cells[[5, 0, 5]]
    np.testing.assert_array_equal(chosen.counts.toarray(), tiny_cells.counts.toarray()[[5, 0, 5]])
    np.testing.assert_array_equal(chosen.totals, tiny_cells.totals[[5, 0, 5]])
    assert chosen.gene_ids is tiny_cells.gene_ids


def test_a_run_of_rows_keeps_its_numbers():
    cells = CountMatrix.from_matrix(np.eye(9, 9, dtype=int), [f"g{n}" for n in range(9)], first_row=100)
    assert cells[4:].first_row == 104
    assert cells[4:][2:5].first_row == 106
    assert cells[-2:].first_row == 107
    assert cells[np.arange(9) > 5].first_row == 0
    assert cells[::2].first_row == 0
