"""AnnData files of cells with their embeddings in obsm, two columns of obs, and provenance in uns."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perturbscope.cells.readers import CellSource
from perturbscope.inference.embeddings import Embeddings

OBSM_KEY = "X_perturbscope"
OBS_KNOWN_SHARE = "perturbscope_known_share"
OBS_N_GENES = "perturbscope_n_genes"
UNS_KEY = "perturbscope"


def write_embedded(staging: Path, source: CellSource, embeddings: Embeddings, provenance: Mapping[str, Any]) -> None:
    """Write the cells of a source with their embeddings to the file `staging`.

    An .h5ad file is copied and added to, so that its matrix never passes through memory and everything in it stays.
    Other formats, and .h5ad files of anndata < 0.7, become a new AnnData file with the counts (CSR) and the labels.
    """
    columns = {OBS_KNOWN_SHARE: embeddings.known_share, OBS_N_GENES: embeddings.n_detected}
    uns = {key: value for key, value in provenance.items() if value not in (None, [], {})}
    if source.path is not None and source.path.is_file() and _is_current_h5ad(source.path):
        shutil.copyfile(source.path, staging)
        _add(staging, embeddings, columns, uns)
        return
    import anndata as ad
    import pandas as pd

    obs = pd.DataFrame(index=pd.Index(source.cell_ids.astype(object)))
    for name in source.columns:
        column = source.column(name)
        is_text = column.dtype == object
        obs[name] = pd.Categorical(source.labels(name)) if is_text else column.array
    for name, values in columns.items():
        obs[name] = values
    var = pd.DataFrame(index=pd.Index(source.gene_ids.astype(object)))
    symbols = getattr(source, "gene_symbols", None)
    if symbols is not None:
        var["gene_symbols"] = symbols.astype(object)
    adata = ad.AnnData(X=source.read().counts, obs=obs, var=var)
    adata.obsm[OBSM_KEY] = embeddings.values
    adata.uns[UNS_KEY] = uns
    adata.write_h5ad(staging)


def _is_current_h5ad(path: Path) -> bool:
    import h5py

    if not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        frames = all(isinstance(file.get(name), h5py.Group) for name in ("obs", "var"))
        return frames and all(isinstance(file[name], h5py.Group) for name in ("obsm", "uns") if name in file)


def _add(path: Path, embeddings: Embeddings, columns: Mapping[str, Any], uns: Mapping[str, Any]) -> None:
    import h5py
    from anndata.io import write_elem

    def put(group: Any, name: str, value: Any) -> None:
        if name in group:
            del group[name]
        write_elem(group, name, value)

    with h5py.File(path, "r+") as file:
        for name in ("obsm", "uns"):
            if name not in file:
                write_elem(file, name, {})
        put(file["obsm"], OBSM_KEY, embeddings.values)
        put(file["uns"], UNS_KEY, dict(uns))
        obs = file["obs"]
        order = [str(name) for name in obs.attrs.get("column-order", ())]
        for name, values in columns.items():
            put(obs, name, values)
        order += [name for name in columns if name not in order]
        obs.attrs.create("column-order", order, dtype=h5py.string_dtype())


def provenance_of(embeddings: Embeddings, options: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Provenance of embeddings, in a form that both JSON and .h5ad can hold."""
    coverage = embeddings.coverage.to_dict()
    coverage["ambiguous"] = [f"{name} -> {gene_id}" for name, gene_id in embeddings.coverage.ambiguous]
    return {
        "model_id": embeddings.model_id,
        "vocabulary_hash": embeddings.vocabulary_hash,
        **({"variant": embeddings.variant} if embeddings.variant else {}),
        "version": version,
        "options": {key: value for key, value in options.items() if value is not None},
        "coverage": {key: value for key, value in coverage.items() if value != []},
        "warnings": embeddings.warnings(),
    }
