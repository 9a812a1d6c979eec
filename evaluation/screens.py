"""Screens for the evaluation: counts and labels of the usable cells, in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from evaluation.heldout import read_held_out
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.readers import CellSource, open_cells
from perturbscope.cells.readers.source import missing_column
from perturbscope.errors import ControlLabelMissingError, InvalidParameterError
from perturbscope.scoring.cleaning import clean_labels, control_labels

SYMBOL_KEYS = ("gene_symbol", "gene_symbols", "gene_name", "symbol", "feature_name")
"""Columns of var that are tried if no `symbol_key` is given."""
GUIDE_UNKNOWN = "unknown"
"""Guide of a cell without one."""
TRAINED = "train"
"""Split of the cells that a model was trained on."""


@dataclass(frozen=True)
class EvaluationScreen:
    """Cells of a screen with their labels.

    Attributes
    ----------
    name
        Name of the screen, for tables and folders.
    cells
        Raw counts, [n_cells, n_genes].
    perturbations
        Label of each cell.
    control
        Label of the control cells.
    batches, guides, contexts
        Batch, guide (replicate), and context of each cell, or None. A perturbation is compared only with the controls
        of its own context, such as a cell type or a stimulation.
    symbols
        Gene symbol of each column, or its identifier if no symbol is known.
    obsm
        Embeddings from the file, float32 [n_cells, width] each.
    split
        ``train``, ``validation``, ``test``, ``ineligible`` or ``control`` (held-out controls) for each cell, if it is
        known which cells a model was trained on.
    provenance
        Source of the cells, and numbers of cells left out (JSON-able).
    """

    name: str
    cells: CountMatrix
    perturbations: list[str]
    control: str
    batches: list[str] | None = None
    guides: list[str] | None = None
    symbols: list[str] = field(default_factory=list)
    obsm: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    split: list[str] | None = None
    contexts: list[str] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, rows: NDArray[Any] | Sequence[int]) -> EvaluationScreen:
        """Return the cells at these positions (or of this mask), in the order given."""
        selection = np.asarray(rows)
        places = np.flatnonzero(selection) if selection.dtype == bool else selection

        def take(values: list[str] | None) -> list[str] | None:
            return None if values is None else [values[row] for row in places]

        return replace(
            self,
            cells=self.cells[places],
            perturbations=[self.perturbations[row] for row in places],
            batches=take(self.batches),
            guides=take(self.guides),
            split=take(self.split),
            contexts=take(self.contexts),
            obsm={key: values[places] for key, values in self.obsm.items()},
        )

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """Mask of the cells that no model was trained on, bool [n_cells]; all cells if no split is known."""
        if self.split is None or TRAINED not in self.split:
            return np.ones(len(self), dtype=bool)
        return ~np.isin(np.asarray(self.split), (TRAINED, "validation"))

    @property
    def targets(self) -> dict[str, int]:
        """Column of the target gene of each perturbation that is named like a gene of the screen."""
        column = {symbol: i for i, symbol in reversed(list(enumerate(self.symbols)))}
        return {name: column[name] for name in dict.fromkeys(self.perturbations) if name in column}

    def key(self) -> str:
        """Return a hash of the counts in their order, which does not depend on labels."""
        digest = hashlib.sha256()
        counts = self.cells.counts
        for array in (counts.data, counts.indices.astype(np.int64), counts.indptr.astype(np.int64), self.cells.totals):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update("\n".join(self.cells.gene_ids.tolist()).encode())
        return digest.hexdigest()[:16]


def open_screen(
    path: str | Path,
    *,
    name: str | None = None,
    perturbation_key: str = "perturbation",
    control: str | Sequence[str] = "control",
    batch_key: str | None = None,
    guide_key: str | None = None,
    context_key: str | None = None,
    split_key: str | None = None,
    held_out: str | Path | None = None,
    symbol_key: str | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    total_counts_key: str | None = None,
    obsm: Sequence[str] = (),
    keep: Mapping[str, str | Sequence[str]] | None = None,
) -> EvaluationScreen:
    """Read a screen.

    Parameters
    ----------
    path
        File of raw counts, in any format of :func:`perturbscope.open_cells`.
    name
        Name of the screen; default the file's name without its suffix.
    perturbation_key, control
        Column of obs with the labels, and the label of control cells, or several.
    batch_key, guide_key, context_key
        Columns of obs, if there are any; see :class:`EvaluationScreen`. A cell without a batch or context is left out;
        one without a guide has the guide ``unknown``.
    split_key
        Column of obs that says which cells a model was trained on; default ``split``, if the file has it.
    held_out
        File with the held-out cells, as fine-tuning writes it, or a table of them (:mod:`evaluation.heldout`): cells of
        the same name belong to its ``split`` (or to ``test``, if it has none), all others to ``train``.
    symbol_key
        Column of var with gene symbols; default the first of :data:`SYMBOL_KEYS` that exists.
    layer, gene_key, total_counts_key
        See :func:`perturbscope.open_cells`.
    obsm
        Names of matrices of obsm to read.
    keep
        Cells to keep: column of obs -> value or values.

    Raises
    ------
    InvalidInputError
        The file cannot be read, a column is missing, no cell is left, or there are no controls.
    """
    path = Path(path)
    with open_cells(path, layer=layer, gene_key=gene_key, total_counts_key=total_counts_key) as source:
        labels = source.labels(perturbation_key, field="perturbation_key")
        columns: dict[str, NDArray[np.object_]] = {"perturbations": labels}
        split_key = split_key or ("split" if "split" in source.columns else None)
        for attribute, key in (
            ("batches", batch_key),
            ("guides", guide_key),
            ("contexts", context_key),
            ("split", split_key),
        ):
            if key is not None:
                columns[attribute] = source.labels(key, field=f"{attribute}_key")
        if held_out is not None:
            columns["split"] = _split_of(Path(held_out), source.cell_ids)
        left_out: dict[str, int] = {}
        kept = _present(columns, left_out) & _restricted(source, keep, left_out)
        if not kept.any():
            raise InvalidParameterError(
                f"No cell of {path} is left: of {source.n_cells} cells, {left_out} were left out.", field="keep"
            )
        for label in control_labels(control):
            if not (labels[kept] == label).any():
                known = ", ".join(map(repr, sorted(set(labels[kept].tolist()))[:10]))
                raise ControlLabelMissingError(
                    f"No cell of {path} that is kept has the control label {label!r}; there are: {known}.",
                    field="control",
                )
        rows = np.flatnonzero(kept)
        cleaned = clean_labels(labels[rows].tolist(), control)
        if "guides" in columns:
            columns["guides"] = np.where(columns["guides"] == None, GUIDE_UNKNOWN, columns["guides"])  # noqa: E711
        taken: dict[str, list[str]] = {key: values[rows].tolist() for key, values in columns.items()}
        return EvaluationScreen(
            name=name or path.name.removesuffix(".h5ad"),
            cells=source.read()[rows],
            perturbations=list(cleaned.labels),
            control=str(cleaned.control),
            batches=taken.get("batches"),
            guides=taken.get("guides"),
            contexts=taken.get("contexts"),
            split=taken.get("split"),
            symbols=_symbols(source, path, symbol_key),
            obsm={key: source.representation(key)[rows] for key in obsm},
            provenance={
                "file": path.name,
                "n_cells_read": source.n_cells,
                "n_cells": len(rows),
                "left_out": left_out,
                **cleaned.facts,
                "kept": {key: _values(value) for key, value in (keep or {}).items()},
                "keys": {
                    "perturbation": perturbation_key,
                    "batch": batch_key,
                    "guide": guide_key,
                    "context": context_key,
                    "split": split_key if held_out is None else f"cells of {Path(held_out).name} are held out",
                    "total_counts": total_counts_key,
                },
            },
        )


def _split_of(path: Path, cell_ids: NDArray[np.str_]) -> NDArray[np.object_]:
    """Return the split of each cell, from a file of the held-out cells."""
    known = read_held_out(path)
    unknown = sorted(set(known) - set(cell_ids.tolist()))
    if unknown:
        raise InvalidParameterError(
            f"{len(unknown)} of {len(known)} cells of {path} are not in the screen (the first is {unknown[0]!r}); "
            "give the file that was held out of this screen.",
            field="held_out",
        )
    return np.asarray([known.get(cell, TRAINED) for cell in cell_ids.tolist()], dtype=object)


def _present(columns: Mapping[str, NDArray[np.object_]], left_out: dict[str, int]) -> NDArray[np.bool_]:
    """Return a mask of the cells with a perturbation, batch and context."""
    present = np.ones(len(columns["perturbations"]), dtype=bool)
    for name, labels in columns.items():
        if name in ("guides", "split"):
            continue
        labelled = np.array([label is not None and label.strip() != "" for label in labels], dtype=bool)
        if not labelled.all():
            left_out[f"without {name}"] = int((~labelled).sum())
        present &= labelled
    return present


def _restricted(
    source: CellSource, keep: Mapping[str, str | Sequence[str]] | None, left_out: dict[str, int]
) -> NDArray[np.bool_]:
    kept = np.ones(source.n_cells, dtype=bool)
    for key, value in (keep or {}).items():
        labels = source.labels(key, field="keep")
        wanted = _values(value)
        unknown = [item for item in wanted if item not in set(labels.tolist())]
        if unknown:
            known = ", ".join(map(repr, sorted({str(label) for label in labels})[:10]))
            raise InvalidParameterError(
                f"No cell has {unknown[0]!r} in obs[{key!r}]; there are: {known}.", field="keep"
            )
        inside = np.isin(labels.astype(str), wanted)
        left_out[f"{key} is not {' or '.join(wanted)}"] = int((~inside).sum())
        kept &= inside
    return kept


def _values(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else [str(item) for item in value]


def _symbols(source: CellSource, path: Path, symbol_key: str | None) -> list[str]:
    """Return symbols from var, or the identifiers of the genes."""
    ids: list[str] = source.gene_ids.tolist()
    symbols = getattr(source, "gene_symbols", None)
    if symbols is not None:
        return [str(symbol) for symbol in symbols]
    var = _var(path)
    if symbol_key is not None and (var is None or symbol_key not in var):
        raise missing_column(
            "column of var", symbol_key, [] if var is None else [str(name) for name in var], field="symbol_key"
        )
    if var is None:
        return ids
    key = symbol_key or next((name for name in SYMBOL_KEYS if name in var), None)
    if key is None:
        return ids
    column = var[key]
    return [
        str(symbol) if known and str(symbol).strip() else gene
        for symbol, known, gene in zip(column, column.notna(), ids, strict=True)
    ]


def _var(path: Path) -> pd.DataFrame | None:
    """Read the table var of an .h5ad file; return None for other formats."""
    import h5py
    from anndata.io import read_elem

    if not path.is_file() or not h5py.is_hdf5(path):
        return None
    with h5py.File(path, "r") as file:
        if not isinstance(file.get("var"), h5py.Group):
            return None
        table: pd.DataFrame = read_elem(file["var"])
        return table
