"""AnnData files of cells with their embeddings in obsm, two columns of obs, and provenance in uns.

Other outputs per cell go to obsm as ``perturbscope_NAME``, with the names of their columns in uns. Of the classes of
cells, obs has the best one (``perturbscope_class``) and its probability (``perturbscope_class_probability``).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perturbscope.cells.readers import CellSource
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.embeddings import Embeddings

OBSM_KEY = "X_perturbscope"
OBS_KNOWN_SHARE = "perturbscope_known_share"
OBS_N_GENES = "perturbscope_n_genes"
OBS_CLASS = "perturbscope_class"
UNS_KEY = "perturbscope"
OUTPUTS_KEY = "outputs"
"""Key inside of uns["perturbscope"] of the outputs beside the cell embedding."""


def write_embedded(staging: Path, source: CellSource, embeddings: Embeddings, provenance: Mapping[str, Any]) -> None:
    """Write the cells of a source with their embeddings to the file `staging`.

    An .h5ad file is copied and added to, so that its matrix never passes through memory and everything in it stays.
    Other formats, and .h5ad files of anndata < 0.7, become a new AnnData file with the counts (CSR) and the labels.
    """
    columns = {OBS_KNOWN_SHARE: embeddings.known_share, OBS_N_GENES: embeddings.n_detected, **_classes(embeddings)}
    matrices = {OBSM_KEY: embeddings.values}
    matrices |= {obsm_key(name): output.values for name, output in embeddings.outputs.items()}
    uns = {key: value for key, value in provenance.items() if value not in (None, [], {})}
    if source.path is not None and source.path.is_file() and _is_current_h5ad(source.path):
        shutil.copyfile(source.path, staging)
        _add(staging, matrices, columns, uns)
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
    for name, values in matrices.items():
        adata.obsm[name] = values
    adata.uns[UNS_KEY] = uns
    adata.write_h5ad(staging)


def obsm_key(name: str) -> str:
    """Return the key in obsm of an output per cell beside the cell embedding."""
    return f"{UNS_KEY}_{name}"


def _classes(embeddings: Embeddings) -> dict[str, Any]:
    """Return the columns of obs for classes of cells: of one output; of more, with its name behind."""
    import pandas as pd

    logits = [output for output in embeddings.outputs.values() if output.spec.meaning == "logits"]
    found: dict[str, Any] = {}
    for output in logits:
        best, probability = _class_columns("" if len(logits) == 1 else f"_{output.spec.name}")
        names, probabilities = output.classes()
        found |= {best: pd.Categorical(names, categories=output.spec.names), probability: probabilities}
    return found


def _is_current_h5ad(path: Path) -> bool:
    import h5py

    if not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        frames = all(isinstance(file.get(name), h5py.Group) for name in ("obs", "var"))
        # A MuData file has several matrices, and no place for vectors of one of them.
        return (
            frames
            and "mod" not in file
            and all(isinstance(file[name], h5py.Group) for name in ("obsm", "uns") if name in file)
        )


def _add(path: Path, matrices: Mapping[str, Any], columns: Mapping[str, Any], uns: Mapping[str, Any]) -> None:
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
        obs = file["obs"]
        order = [str(name) for name in obs.attrs.get("column-order", ())]
        earlier = _earlier(file["uns"])
        for group in (file["obsm"], obs):
            for name in earlier & set(group):
                del group[name]
        order = [name for name in order if name not in earlier]
        for name, values in matrices.items():
            put(file["obsm"], name, values)
        put(file["uns"], UNS_KEY, dict(uns))
        for name, values in columns.items():
            put(obs, name, values)
        order += [name for name in columns if name not in order]
        obs.attrs.create("column-order", order, dtype=h5py.string_dtype())


def _earlier(uns: Any) -> set[str]:
    """Return the names in obsm and obs that an earlier run has given to outputs beside the cell embedding.

    Beside the outputs of the new run they would look like its own.
    """
    import h5py

    record = uns.get(f"{UNS_KEY}/{OUTPUTS_KEY}")
    if not isinstance(record, h5py.Group):
        return set()
    columns = {column for suffix in ("", *(f"_{name}" for name in record)) for column in _class_columns(suffix)}
    return columns | {obsm_key(name) for name in record}


def _class_columns(suffix: str) -> tuple[str, str]:
    return f"{OBS_CLASS}{suffix}", f"{OBS_CLASS}{suffix}_probability"


def provenance_of(
    embeddings: Embeddings,
    options: Mapping[str, Any],
    version: str,
    outputs: Sequence[OutputSpec] = (),
    files: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Provenance of embeddings, in a form that both JSON and .h5ad can hold.

    Parameters
    ----------
    embeddings, options, version
        The embeddings, options that they were made with, and version of perturbscope.
    outputs
        Outputs beside the cell embedding.
    files
        Names of the files of those per token.
    """
    coverage = embeddings.coverage.to_dict()
    # As texts: a type may hold a slash, which would be a path in an .h5ad file.
    coverage["left_out"] = [f"{n} {kind}" for kind, n in embeddings.coverage.left_out.items()]
    coverage["ambiguous"] = [f"{name} -> {gene_id}" for name, gene_id in embeddings.coverage.ambiguous]
    return {
        "model_id": embeddings.model_id,
        "vocabulary_hash": embeddings.vocabulary_hash,
        **({"variant": embeddings.variant} if embeddings.variant else {}),
        "version": version,
        "options": {key: value for key, value in options.items() if value is not None and value is not False},
        "coverage": {key: value for key, value in coverage.items() if value != []},
        "warnings": embeddings.warnings(),
        OUTPUTS_KEY: {spec.name: _described(spec, (files or {}).get(spec.name)) for spec in outputs},
    }


def _described(spec: OutputSpec, file: str | None) -> dict[str, Any]:
    found = {"per": spec.per, "width": spec.width, "meaning": spec.meaning, "names": list(spec.names or ())}
    return {key: value for key, value in {**found, "file": file}.items() if value not in (None, [])}
