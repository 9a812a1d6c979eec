"""A small SOMA store with the layout of the CELLxGENE census; needs tiledbsoma."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse


def write_store(
    path: Path,
    counts: Any,
    genes: Sequence[str],
    obs: Mapping[str, Sequence[Any] | NDArray[Any]],
    *,
    ids: NDArray[np.int64] | None = None,
    gene_ids: NDArray[np.int64] | None = None,
) -> Path:
    """Write counts [cells, genes] with labels; `ids` and `gene_ids` are the join ids, 0, 1, 2, ... by default."""
    import tiledbsoma

    matrix = sparse.coo_matrix(counts)
    ids = np.arange(matrix.shape[0]) if ids is None else ids
    gene_ids = np.arange(matrix.shape[1]) if gene_ids is None else gene_ids
    table = pa.table({"soma_joinid": pa.array(ids, pa.int64()), **{name: _array(obs[name]) for name in obs}})
    var = pa.table({"soma_joinid": pa.array(gene_ids, pa.int64()), "feature_id": _array(list(genes))})
    values = pa.table(
        {
            "soma_dim_0": pa.array(ids[matrix.row], pa.int64()),
            "soma_dim_1": pa.array(gene_ids[matrix.col], pa.int64()),
            "soma_data": pa.array(matrix.data.astype(np.float32)),
        }
    )
    shape = (int(ids.max()) + 1, int(gene_ids.max()) + 1)
    with tiledbsoma.Collection.create(str(path)) as store:
        data = store.add_new_collection("census_data")
        experiment = data.add_new_collection("homo_sapiens", tiledbsoma.Experiment)
        _frame(experiment, "obs", table, shape[0])
        measurement = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        _frame(measurement, "var", var, shape[1])
        raw = measurement.add_new_collection("X").add_new_sparse_ndarray("raw", type=pa.float32(), shape=shape)
        raw.write(values)
    return path


def _array(values: Any) -> pa.Array:
    array = pa.array(np.asarray(values).tolist())
    return array.cast(pa.large_string()) if pa.types.is_string(array.type) else array


def _frame(parent: Any, name: str, table: pa.Table, size: int) -> None:
    frame = parent.add_new_dataframe(
        name, schema=table.schema, index_column_names=["soma_joinid"], domain=[(0, size - 1)]
    )
    frame.write(table)
