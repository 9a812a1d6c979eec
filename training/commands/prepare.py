"""``python -m training prepare IN.h5ad OUT.h5ad``: bring a published data set into our form, streamed.

The columns of OUT, and their origin in each layout:

===============  ================================  =====================================  =====================
in OUT           scPerturb (Peidli et al. 2024)    Replogle et al. 2022, authors' files   if it is missing
===============  ================================  =====================================  =====================
perturbation     obs ``perturbation``              obs ``gene``                           error
control label    ``control``                       ``non-targeting``                      error
var index        var ``ensembl_id``, else index    var index (Ensembl ids)
gene_symbol      var index                         var ``gene_name``                      left out
batch            obs ``batch``, ``gemgroup``       obs ``gem_group``                      left out
guide            obs ``guide_id``                  obs ``sgID_AB``                        left out
total_counts     obs ``UMI_count``                 obs ``UMI_count``                      sum over the file's genes
===============  ================================  =====================================  =====================

Controls are called ``control`` in OUT. Cells without a label, with several guides (``nperts`` above 1) or without a
count are left out. The other columns of obs stay.

``total_counts`` counts all measured genes, of which the published files hold about 8,000: counts per 10,000 need it.
X becomes sparse by rows: a published file is dense, and stored so that one cell is spread over hundreds of blocks.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.files import atomic, check_output
from perturbscope.cells.readers.annotated import Frame, find_matrix, open_matrix, shape_of
from perturbscope.cells.readers.source import missing_column, name_genes
from perturbscope.cells.readers.store import child, is_group, optional, reading
from perturbscope.errors import ControlLabelMissingError, InvalidParameterError, MalformedMatrixError
from training import console

if TYPE_CHECKING:
    import pandas as pd

CONTROL = "control"
_BLOCK_BYTES = 2**28
"""Dense values in memory at a time."""
_ROWS = 4096
_STORED = 2**20
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Columns and labels of a publisher; of several columns the first that exists counts."""

    perturbation: str
    control: str
    genes: tuple[str, ...] = ()
    """Columns of var with Ensembl ids; the index if there is none."""
    symbols: tuple[str, ...] = ()
    """Columns of var with symbols; the index if `genes` was found."""
    batch: tuple[str, ...]
    guide: tuple[str, ...]
    totals: tuple[str, ...] = ("UMI_count",)
    several: str = "nperts"


LAYOUTS = {
    "scperturb": Layout(
        perturbation="perturbation",
        control="control",
        genes=("ensembl_id",),
        batch=("batch", "gemgroup", "gem_group"),
        guide=("guide_id", "sgID_AB"),
    ),
    "replogle": Layout(
        perturbation="gene",
        control="non-targeting",
        symbols=("gene_name",),
        batch=("gem_group", "batch"),
        guide=("sgID_AB",),
    ),
}


def prepare(
    source: Path,
    output: Path,
    *,
    layout: str | None = None,
    totals: bool = True,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Write `output`. Returns the number of cells that are kept, and that are left out, by reason.

    Parameters
    ----------
    source, output
        Published file, and file to write.
    layout
        Name in :data:`LAYOUTS`; by default, recognised by its control label.
    totals
        Whether to take over the total of each cell, if the file has one.
    progress
        Called with the number of cells read, and of all cells.

    Raises
    ------
    ControlLabelMissingError
        No cell has the control label of a known layout.
    MalformedMatrixError
        A cell's total is smaller than the sum of its counts.
    InvalidInputError
        :func:`perturbscope.open_cells` could not read the file, or the counts are not raw.
    """
    check_output(output, (".h5ad",), source=source)
    with ExitStack() as stack:
        with reading(source):
            root = stack.enter_context(h5py.File(source, "r"))
            uns = optional(root, "uns")
            node, var = find_matrix(root, None)
            obs, var = Frame(child(root, "obs"), uns), Frame(var, uns)
            name, labels = _labels(obs, layout, source)
        columns = LAYOUTS[name]
        dropped: Counter[str] = Counter()
        keep = _kept(obs, labels, columns, dropped)
        genes, symbols, n_renamed = _genes(var, columns)
        file_totals = _first(obs, columns.totals) if totals else None
        sums = np.zeros(shape_of(node)[0])
        staging = stack.enter_context(atomic(output))
        with h5py.File(staging, "w") as made:
            matrix = _Rows(made, len(genes))
            for start, block in _blocks(node, source):
                stop = start + block.shape[0]
                sums[start:stop] = np.asarray(block.sum(axis=1)).ravel()
                is_empty = sums[start:stop] == 0
                dropped["empty"] += int((keep[start:stop] & is_empty).sum())
                keep[start:stop] &= ~is_empty
                if file_totals is not None:
                    _check_totals(file_totals[start:stop], sums[start:stop], keep[start:stop], start, columns.totals)
                rows = np.flatnonzero(keep[start:stop])
                if len(rows):
                    matrix.append(CountMatrix.from_matrix(block[rows], genes, first_row=start).counts)
                if progress:
                    progress(stop, len(keep))
            matrix.close()
            _write_frames(
                made, obs, keep, labels, columns, sums if file_totals is None else file_totals, genes, symbols
            )
            facts = {"kept": int(keep.sum()), **{key: n for key, n in sorted(dropped.items()) if n}}
            if n_renamed:
                facts["genes without an id of their own"] = n_renamed
            _write(made, "uns", {"prepared": json.dumps({"source": source.name, "layout": name, **facts})})
            for attribute, value in (("encoding-type", "anndata"), ("encoding-version", "0.1.0")):
                made.attrs[attribute] = value
    return facts


def _labels(obs: Frame, layout: str | None, path: Path) -> tuple[str, pd.Series[Any]]:
    """Return the name of the layout, and the perturbation of each cell."""
    if layout is not None and layout not in LAYOUTS:
        raise InvalidParameterError(f"There is no layout {layout!r}; there are {', '.join(LAYOUTS)}.", field="layout")
    seen = []
    for name in [layout] if layout else LAYOUTS:
        known = LAYOUTS[name]
        if known.perturbation not in obs.columns():
            if layout:
                raise missing_column("column of obs", known.perturbation, obs.columns(), field="layout")
            continue
        labels = obs.column(known.perturbation).astype("category")
        if known.control in labels.cat.categories:
            return name, labels
        seen.append(f"no {known.control!r} in {known.perturbation!r}")
    raise ControlLabelMissingError(
        f"{path} has the columns and labels of no layout that is known: {'; '.join(seen) or 'no such column'}. "
        f"Known are {', '.join(LAYOUTS)}; obs has {', '.join(obs.columns())}.",
        field="layout",
    )


def _kept(obs: Frame, labels: pd.Series[Any], layout: Layout, dropped: Counter[str]) -> NDArray[np.bool_]:
    keep: NDArray[np.bool_] = labels.notna().to_numpy()
    dropped["no_label"] = int((~keep).sum())
    if layout.several in obs.columns():
        several = keep & (obs.column(layout.several).to_numpy() > 1)
        dropped["several_guides"] = int(several.sum())
        keep &= ~several
    return keep


def _genes(var: Frame, layout: Layout) -> tuple[NDArray[np.str_], NDArray[Any] | None, int]:
    """Return Ensembl ids, symbols, and the number of genes that keep their old name because they have no unique id."""
    index = var.index()
    column = next((name for name in layout.genes if name in var.columns()), None)
    symbol = next((name for name in layout.symbols if name in var.columns()), None)
    symbols = index if column else var.column(symbol).to_numpy() if symbol else None
    if column is None:
        return index, symbols, 0
    genes = name_genes(var.column(column).to_numpy())
    _, first = np.unique(genes, return_index=True)
    is_unique = np.zeros(len(genes), dtype=bool)
    is_unique[first] = True
    is_unique &= ~np.char.startswith(genes, "unnamed-")
    return np.where(is_unique, genes, index).astype(np.str_), symbols, int((~is_unique).sum())


def _first(obs: Frame, names: Sequence[str]) -> NDArray[Any] | None:
    name = next((name for name in names if name in obs.columns()), None)
    return None if name is None else obs.column(name).to_numpy()


def _blocks(node: Any, path: Path) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Yield runs of rows; from a dense matrix, whole stored blocks, so that each is unpacked once."""
    n_cells, n_genes = shape_of(node)
    if is_group(node):
        rows = open_matrix(node)
        for start in range(0, n_cells, _ROWS):
            with reading(path):
                arrays = rows.rows(start, min(start + _ROWS, n_cells))
            yield start, sparse.csr_matrix(arrays, shape=(len(arrays[2]) - 1, n_genes))
        return
    step = node.chunks[0] if node.chunks else 1
    step *= max(1, _BLOCK_BYTES // (step * n_genes * node.dtype.itemsize))
    for start in range(0, n_cells, step):
        with reading(path):
            dense = node[start : start + step]
        yield start, sparse.csr_matrix(dense)


def _check_totals(
    given: NDArray[Any], sums: NDArray[np.float64], keep: NDArray[np.bool_], first: int, names: Sequence[str]
) -> None:
    short = np.flatnonzero(keep & ~(given >= sums - 0.5))
    if len(short):
        row = int(short[0])
        raise MalformedMatrixError(
            f"Cell {first + row} has a total ({' or '.join(names)}) of {given[row]:g}, but its counts add up to "
            f"{sums[row]:g}; the total is not that of all measured genes. Leave it out with --no-totals.",
            field="total_counts",
        )


class _Rows:
    """The growing CSR matrix X of a new file."""

    def __init__(self, file: h5py.File, n_genes: int) -> None:
        self._group = file.create_group("X")
        self._n_genes = n_genes
        options: dict[str, Any] = {"maxshape": (None,), "chunks": (_STORED,), "compression": "gzip"}
        options |= {"compression_opts": 1, "shuffle": True, "shape": (0,)}
        self._data = self._group.create_dataset("data", dtype=np.int32, **options)
        self._indices = self._group.create_dataset("indices", dtype=np.int32, **options)
        self._starts = [np.zeros(1, dtype=np.int64)]

    def append(self, counts: sparse.csr_matrix) -> None:
        begin = int(self._starts[-1][-1])
        for stored, values in ((self._data, counts.data), (self._indices, counts.indices)):
            stored.resize((begin + counts.nnz,))
            stored[begin:] = values
        self._starts.append(begin + counts.indptr[1:].astype(np.int64))

    def close(self) -> None:
        starts = np.concatenate(self._starts)
        self._group.create_dataset("indptr", data=starts)
        self._group.attrs["encoding-type"] = "csr_matrix"
        self._group.attrs["encoding-version"] = "0.1.0"
        self._group.attrs["shape"] = np.array([len(starts) - 1, self._n_genes])


def _write_frames(
    file: h5py.File,
    obs: Frame,
    keep: NDArray[np.bool_],
    labels: pd.Series[Any],
    layout: Layout,
    totals: NDArray[Any],
    genes: NDArray[np.str_],
    symbols: NDArray[Any] | None,
) -> None:
    """Write obs and var."""
    import pandas as pd

    at = np.flatnonzero(keep)
    frame = pd.DataFrame(index=pd.Index(obs.index()[at].astype(object)))
    names = labels.cat.categories
    if layout.control != CONTROL:
        if CONTROL in names:
            raise InvalidParameterError(
                f"The file has the label {CONTROL!r} beside {layout.control!r}; rename one.", field="layout"
            )
        labels = labels.cat.rename_categories({layout.control: CONTROL})
    kept_labels = labels.iloc[at].cat.remove_unused_categories()
    frame["perturbation"] = pd.Categorical(kept_labels.astype(str))
    for name, columns in (("batch", layout.batch), ("guide", layout.guide)):
        values = _first(obs, columns)
        if values is not None:
            frame[name] = pd.Categorical([str(value) for value in values[at]])
    frame["total_counts"] = totals[at].astype(np.float64)
    for name in obs.columns():
        if name not in frame:
            frame[name] = obs.column(name).iloc[at].array
    var = pd.DataFrame(index=pd.Index(genes.astype(object)))
    if symbols is not None:
        var["gene_symbol"] = symbols.astype(str).astype(object)
    _write(file, "obs", frame)
    _write(file, "var", var)


def _write(file: h5py.File, name: str, value: Any) -> None:
    from anndata.io import write_elem

    write_elem(file, name, value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns its exit code."""
    parser = argparse.ArgumentParser(
        description="Bring a published perturbation data set into the form that fine-tuning reads."
    )
    parser.add_argument("source", metavar="IN.h5ad", type=Path)
    parser.add_argument("output", metavar="OUT.h5ad", type=Path)
    parser.add_argument("--layout", choices=sorted(LAYOUTS), help="recognised by default")
    parser.add_argument("--no-totals", action="store_true", help="sum the file's genes instead of its totals")
    options = parser.parse_args(arguments)

    def run() -> None:
        with console.cell_progress() as bar:
            facts = prepare(
                options.source,
                options.output,
                layout=options.layout,
                totals=not options.no_totals,
                progress=lambda done, total: bar(options.source.name, done, total),
            )
        console.stderr().print(
            f"{options.output}: " + ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in facts.items())
        )

    return console.run(run)
