"""Counts of every dtype, in every layout, in every container; and columns of every type of pandas.

The same cells come out of all of them, or one error of ours says why not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import zarr
from anndata._io.specs.registry import IORegistryError
from scipy import sparse

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import open_cells
from perturbscope.cells.readers.memory import AnnDataSource
from perturbscope.cells.readers.source import CellSource
from perturbscope.errors import InvalidParameterError, MalformedMatrixError

GENES = [f"ENSG{number:011d}" for number in range(5)]
COUNTS = np.array(
    [[1, 0, 3, 0, 0], [0, 2, 0, 0, 9], [4, 0, 0, 1, 0], [0, 0, 0, 0, 7], [5, 6, 7, 8, 100], [1, 1, 0, 0, 0]]
)
DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "longdouble", ">i2", ">i4", ">u8", ">f2", ">f4", ">f8"),
]
LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "dense": np.ascontiguousarray,
    "dense, columns first": np.asfortranarray,
    "strided": lambda counts: np.repeat(np.repeat(counts, 2, axis=0), 3, axis=1)[::2, ::3],
    "csr": lambda counts: _sparse(sparse.csr_matrix, counts),
    "csr_array": lambda counts: _sparse(sparse.csr_array, counts),
    "csc": lambda counts: _sparse(sparse.csc_matrix, counts),
    "csc_array": lambda counts: _sparse(sparse.csc_array, counts),
}


def _sparse(kind: Any, counts: Any) -> Any:
    """Return a sparse matrix whose values are of any dtype, also of one that scipy does not compute with."""
    matrix = kind(counts.astype(np.int64))
    matrix.data = matrix.data.astype(counts.dtype)
    return matrix


def _in_memory(matrix: Any) -> CellSource:
    return AnnDataSource(ad.AnnData(matrix, var=pd.DataFrame(index=GENES)))


def _view(matrix: Any) -> CellSource:
    whole = ad.AnnData(matrix, var=pd.DataFrame(index=GENES))
    return AnnDataSource(whole[np.arange(len(COUNTS)), np.arange(len(GENES))])


def _layer(matrix: Any) -> CellSource:
    adata = ad.AnnData(np.zeros(COUNTS.shape), var=pd.DataFrame(index=GENES), layers={"counts": matrix})
    return AnnDataSource(adata, layer="counts")


def _as_stored(dtype: str) -> Any:
    return (COUNTS > 0 if dtype == "bool" else COUNTS).astype(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", [_in_memory, _view, _layer])
def test_counts_in_memory_are_the_same_in_every_dtype_and_layout(
    container: Callable[[Any], CellSource], layout: str
) -> None:
    for dtype in DTYPES:
        counts = _as_stored(dtype)
        try:
            source = container(LAYOUTS[layout](counts))
        except ValueError:
            # scipy, and so anndata, cannot take a view of a sparse matrix of these.
            assert container is _view, dtype
            assert ">" in dtype or dtype == "float16", dtype
            continue
        assert np.array_equal(source.read().counts.toarray(), counts.astype(int)), dtype


@pytest.mark.parametrize("layout", ["dense", "csr", "csc"])
@pytest.mark.parametrize("container", ["h5ad", "h5ad in packed chunks", "backed", "zarr 2", "zarr 3"])
def test_counts_in_files_are_the_same_in_every_dtype_and_layout(container: str, layout: str, tmp_path: Path) -> None:
    # An array of zarr takes 20 ms to make.
    dtypes = ["bool", "uint8", "int64", "float16", "float32", ">f4"] if "zarr" in container else list(DTYPES)
    path = tmp_path / ("cells.zarr" if "zarr" in container else "cells.h5ad")
    with ExitStack() as closing:
        if "zarr" in container:
            root: Any = zarr.open_group(path, mode="w", zarr_format=int(container[-1]))
        else:
            root = closing.enter_context(h5py.File(path, "w"))
        _write(root, layout, dtypes, packed="packed" in container)
    if container == "backed":  # only X stays in the file
        with h5py.File(path, "r+") as file:
            file.move("layers", "stored")
    for dtype in dtypes:
        if container == "backed":
            with h5py.File(path, "r+") as file:
                del file["X"]
                file["X"] = file["stored"][dtype]
            adata = ad.read_h5ad(path, backed="r")
            cells = AnnDataSource(adata).read()
            adata.file.close()
        else:
            with open_cells(path, layer=dtype, chunk_cells=4) as source:
                parts = [part.counts for part in source]
                cells = CountMatrix.from_matrix(sparse.vstack(parts), GENES)
        assert np.array_equal(cells.counts.toarray(), _as_stored(dtype).astype(int)), dtype


def _write(root: Any, layout: str, dtypes: list[str], *, packed: bool) -> None:
    """Write an AnnData file with a layer of each dtype, also of those that anndata does not write."""
    is_zarr = not hasattr(root, "id")

    def put(group: Any, name: str, values: Any) -> None:
        if is_zarr and values.dtype.kind == "U":
            group.create_array(name, shape=values.shape, dtype="string")[...] = values
        elif is_zarr:
            group.create_array(name, data=values)
        elif values.dtype.kind == "U":
            group.create_dataset(name, data=values.astype(object), dtype=h5py.string_dtype())
        else:
            options = {"chunks": tuple(min(2, n) for n in values.shape), "compression": "gzip"} if packed else {}
            group.create_dataset(name, data=values, **options)

    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name, index in (("obs", [f"cell-{row}" for row in range(len(COUNTS))]), ("var", GENES)):
        group = root.create_group(name)
        group.attrs.update({"_index": "_index", "encoding-type": "dataframe", "encoding-version": "0.2.0"})
        group.attrs["column-order"] = [] if is_zarr else np.array([], dtype="S1")
        put(group, "_index", np.array(index))
        if not is_zarr:
            group["_index"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    put(root, "X", np.zeros(COUNTS.shape))
    layers = root.create_group("layers")
    layers.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    for dtype in dtypes:
        matrix = LAYOUTS[layout](_as_stored(dtype))
        if layout == "dense":
            put(layers, dtype, matrix)
            if not is_zarr:
                layers[dtype].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            continue
        group = layers.create_group(dtype)
        shape = list(COUNTS.shape)
        group.attrs.update({"encoding-type": f"{layout}_matrix", "encoding-version": "0.1.0", "shape": shape})
        for name in ("data", "indices", "indptr"):
            put(group, name, getattr(matrix, name))


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "S2", "object"])
@pytest.mark.parametrize("build", [_in_memory, lambda matrix: CountMatrix.from_matrix(matrix, GENES)])
def test_other_values_are_no_counts(dtype: str, build: Any) -> None:
    values = COUNTS.astype(dtype)
    with pytest.raises(MalformedMatrixError, match="have dtype"):
        build(values)


ARROW = [pd.ArrowDtype(pa.string()), pd.ArrowDtype(pa.dictionary(pa.int32(), pa.string()))]
TEXTS = ["object", "string[python]", "string[pyarrow]", "category", *ARROW]
NUMBERS = [
    "Int64",
    "UInt16",
    "Float64",
    "float64",
    "object",
    "category",
    *map(pd.ArrowDtype, (pa.int64(), pa.float64())),
]


def _column(values: list[Any], dtype: Any) -> Any:
    return pd.array(values, dtype=dtype)


def _read_all(adata: ad.AnnData, path: Path, **options: Any) -> list[CellSource]:
    """Open the object, a view of it, and the file of it if anndata writes one."""
    found: list[CellSource] = [AnnDataSource(adata, **options), AnnDataSource(adata[:, ::-1][:, ::-1], **options)]
    try:
        with ad.settings.override(allow_write_nullable_strings=True):
            adata.write_h5ad(file := path / f"{len(list(path.iterdir()))}.h5ad")
    except (TypeError, IORegistryError):  # it writes no columns of pyarrow, nor None
        return found
    return [*found, open_cells(file, **options)]


@pytest.fixture
def adata() -> ad.AnnData:
    obs = pd.DataFrame(index=[f"cell-{row}" for row in range(len(COUNTS))])
    return ad.AnnData(COUNTS, obs=obs, var=pd.DataFrame(index=GENES))


@pytest.mark.parametrize("dtype", TEXTS, ids=str)
def test_texts_are_the_same_in_every_type_of_pandas(adata: ad.AnnData, dtype: Any, tmp_path: Path) -> None:
    adata.var["id"] = _column([GENES[4], None, *GENES[2:4], GENES[0]], dtype)
    adata.obs["label"] = _column(["control", None, "KO", "KO", "control", "KO"], dtype)
    for source in _read_all(adata, tmp_path, gene_key="id"):
        assert list(source.gene_ids) == [GENES[4], "unnamed-1", *GENES[2:4], GENES[0]]
        assert source.labels("label").tolist() == ["control", None, "KO", "KO", "control", "KO"]
        assert list(source.obs["label"].isna()) == [False, True, False, False, False, False]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_numbers_are_the_same_in_every_type_of_pandas(adata: ad.AnnData, dtype: Any, tmp_path: Path) -> None:
    adata.obs["total"] = _column([200 + row for row in range(len(COUNTS))], dtype)
    whole = "loat" not in str(dtype) and "double" not in str(dtype)
    for source in _read_all(adata, tmp_path, total_counts_key="total"):
        assert source.read().totals.tolist() == [200, 201, 202, 203, 204, 205]
        if whole:
            assert source.labels("total").tolist() == [str(200 + row) for row in range(len(COUNTS))]
    adata.obs["total"] = _column([None, *range(201, 200 + len(COUNTS))], dtype)
    for source in _read_all(adata, tmp_path, total_counts_key="total"):
        assert source.labels("total")[0] is None
        with pytest.raises(MalformedMatrixError, match="Total counts of row 0 are nan"):
            source.read()


@pytest.mark.filterwarnings("ignore:Transforming to str index", "ignore:\\nAnnData expects")
@pytest.mark.parametrize("dtype", TEXTS[1:], ids=str)
def test_an_index_of_any_type_of_pandas(adata: ad.AnnData, dtype: Any) -> None:
    adata.var = pd.DataFrame(index=pd.Index(GENES, dtype=dtype))
    adata.obs = pd.DataFrame(index=pd.Index(list(adata.obs_names), dtype=dtype))
    source = AnnDataSource(adata)
    assert list(source.gene_ids) == GENES
    assert source.cell_ids[1] == "cell-1"


@pytest.mark.filterwarnings("ignore:Transforming to str index", "ignore:\\nAnnData expects")
def test_two_columns_of_one_name_are_an_error_only_where_they_are_asked_for() -> None:
    obs = pd.DataFrame([["A", "B", "C"]] * len(COUNTS), columns=["twice", "twice", 3])
    var = pd.DataFrame([["A", "B"]] * len(GENES), columns=["twice", "twice"], index=GENES)
    adata = ad.AnnData(COUNTS, obs=obs, var=var)
    source = AnnDataSource(adata)
    assert list(source.gene_ids) == GENES
    assert source.labels("3")[0] == "C"
    with pytest.raises(InvalidParameterError, match="obs has 2 columns called 'twice'"):
        source.labels("twice")
    with pytest.raises(InvalidParameterError, match="var has 2 columns called 'twice'"):
        AnnDataSource(adata, gene_key="twice")
