"""Vectors of cells, with the model behind them and warnings about doubtful cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.gene_names import explained
from perturbscope.cells.genes import GeneCoverage
from perturbscope.errors import InvalidParameterError
from perturbscope.families.outputs import OutputSpec

if TYPE_CHECKING:
    import pandas as pd

    from perturbscope.cells.readers import CellSource

MIN_GENES = 500
"""Cells with fewer expressed genes are below the usual quality floor of an atlas: flagged, not dropped."""
Maker = tuple[str, str | None]
"""Id of a model and variant of its graph; only vectors of one maker are comparable."""
_SUMMED = 65_536
"""Rows that are summed at a time, which bounds the memory of their float64 copy."""


@dataclass(frozen=True, eq=False)
class OutputValues:
    """Values of an output beside the cell embedding, for many cells.

    Attributes
    ----------
    spec
        Description of the output.
    values
        Values, float32: [n_cells, width] per cell; per token [number of genes in all cells, width], cells end to end,
        without special tokens.
    offsets
        Bounds of the cells in values per token, int64 [n_cells + 1]; None for values per cell.
    genes
        Place of each row's gene in `gene_names`, int32 [number of rows]; None for values per cell.
    gene_names
        Ensembl ids to which `genes` points.
    """

    spec: OutputSpec
    values: NDArray[np.float32]
    offsets: NDArray[np.int64] | None = None
    genes: NDArray[np.int32] | None = None
    gene_names: tuple[str, ...] = ()

    @property
    def gene_ids(self) -> NDArray[np.object_]:
        """Ensembl id of each row per token, [number of rows]."""
        names: NDArray[np.object_] = np.array(self.gene_names, dtype=object)
        return names[self.genes if self.genes is not None else np.empty(0, dtype=np.int32)]

    def of_cell(self, cell: int) -> NDArray[np.float32]:
        """Return the values of one cell, [width] or per token [number of its genes, width]."""
        rows = cell if self.offsets is None else slice(int(self.offsets[cell]), int(self.offsets[cell + 1]))
        values: NDArray[np.float32] = self.values[rows]
        return values

    def genes_of(self, cell: int) -> NDArray[np.object_]:
        """Return the Ensembl id of each row of :meth:`of_cell`, of an output per token."""
        offsets, genes = self._per_token()
        names = self.gene_names
        return np.array([names[gene] for gene in genes[offsets[cell] : offsets[cell + 1]]], dtype=object)

    @property
    def cells(self) -> NDArray[np.int64]:
        """Number of the cell of each row, of an output per token, int64 [number of rows]."""
        offsets, _ = self._per_token()
        return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))

    def gene_means(self) -> pd.DataFrame:
        """Average an output per token over the cells that have each gene; see :meth:`GeneSums.table`."""
        sums = GeneSums()
        sums.add(self)
        return sums.table()

    def classes(self) -> tuple[NDArray[np.object_], NDArray[np.float32]]:
        """Return the best class of each row of logits and its probability by the softmax, both [number of rows].

        Classes without names are named by the numbers of their columns.

        Raises
        ------
        InvalidParameterError
            The output is not logits.
        """
        if self.spec.meaning != "logits":
            raise InvalidParameterError(
                f"The output {self.spec.name!r} has no classes: it is {self.spec.meaning}.", field="outputs"
            )
        names = np.array(self.spec.names or [str(column) for column in range(self.spec.width)], dtype=object)
        best = self.values.argmax(axis=1)
        # The largest logit is subtracted, so no exponential overflows, and that of the best class is 1.
        above = np.exp((self.values - self.values.max(axis=1, keepdims=True)).astype(np.float64))
        return names[best], (1 / above.sum(axis=1)).astype(np.float32)

    def _per_token(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        if self.offsets is None or self.genes is None:
            raise InvalidParameterError(
                f"The output {self.spec.name!r} has one row a cell, and no genes.", field="outputs"
            )
        return self.offsets, self.genes


class GeneSums:
    """Sums of an output per token by gene, over the cells of any number of chunks, in memory of one row a gene."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._names: tuple[str, ...] = ()
        self._rows: NDArray[np.intp] = np.empty(0, dtype=np.intp)
        self._sums: NDArray[np.float64] = np.empty((0, 0))
        self._counts: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._columns: tuple[str, ...] = ()

    def add(self, output: OutputValues) -> None:
        """Add the rows of a chunk; all chunks are of one output.

        Raises
        ------
        InvalidParameterError
            The output is per cell.
        """
        from scipy import sparse

        _, genes = output._per_token()
        if output.gene_names is not self._names:
            self._names = output.gene_names
            self._rows = np.array([self._places.setdefault(name, len(self._places)) for name in self._names], np.intp)
            more = len(self._places) - len(self._counts)
            self._sums = np.concatenate(
                [self._sums.reshape(-1, output.spec.width), np.zeros((more, output.spec.width))]
            )
            self._counts = np.concatenate([self._counts, np.zeros(more, dtype=np.int64)])
            self._columns = output.spec.names or tuple(map(str, range(output.spec.width)))
        for start in range(0, len(genes), _SUMMED):
            rows = self._rows[genes[start : start + _SUMMED]]
            found, places = np.unique(rows, return_inverse=True)
            by_gene = sparse.csr_matrix((np.ones(len(rows)), (places, np.arange(len(rows)))))
            self._sums[found] += by_gene @ output.values[start : start + _SUMMED]
            self._counts[found] += np.bincount(places)

    def table(self) -> pd.DataFrame:
        """Return the means.

        Returns
        -------
        One row a gene that at least one cell has, indexed by ``gene_id``, in the order of the vocabulary: ``n_cells``,
        the number of cells that have the gene among their tokens, and one column a value, float32, named as the
        output names them or ``0``, ``1``, ...
        """
        import pandas as pd

        kept = np.flatnonzero(self._counts)
        index = pd.Index(np.array([*self._places], dtype=object)[kept], name="gene_id")
        means = (self._sums[kept] / self._counts[kept, None]).astype(np.float32)
        table = pd.DataFrame(means, index=index, columns=list(self._columns))
        table.insert(0, "n_cells", self._counts[kept])
        return table


@dataclass(frozen=True)
class Embeddings:
    """Vectors of cells, with the model behind them.

    Attributes
    ----------
    values
        Vectors, float32 [n_cells, width], in the order of the input.
    lengths
        Number of tokens of each cell that the model saw, int32 [n_cells].
    n_detected
        Genes of the vocabulary that each cell expresses, int32 [n_cells].
    known_share
        Share of each cell's counts in genes of the vocabulary, float32 [n_cells].
    coverage
        Report on how the columns were matched to the vocabulary.
    model_id, vocabulary_hash
        Names of the model and of its vocabulary.
    timings
        Seconds by stage: ``tokenize``, ``inference``, and on a server ``queue``.
    variant
        Graph of the model: ``fp32``, ``fp16``, ``int8``; None if that is not known.
    outputs
        Values of the other outputs that were asked for, by name.
    notes
        Sentences about the file that the cells came from; see :attr:`CellSource.warnings`.
    """

    values: NDArray[np.float32]
    lengths: NDArray[np.int32]
    n_detected: NDArray[np.int32]
    known_share: NDArray[np.float32]
    coverage: GeneCoverage
    model_id: str
    vocabulary_hash: str
    timings: dict[str, float] = field(default_factory=dict)
    variant: str | None = None
    outputs: Mapping[str, OutputValues] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def cell_embedding(self) -> NDArray[np.float32]:
        """The vectors of the cells by the name of their output: `values`."""
        return self.values

    @property
    def maker(self) -> Maker:
        """The model and its variant; vectors of two makers must not be compared."""
        return self.model_id, self.variant

    @property
    def below_min_genes(self) -> NDArray[np.bool_]:
        """Cells with fewer than 500 expressed genes, bool [n_cells]."""
        return self.n_detected < MIN_GENES

    @property
    def n_few_genes(self) -> int:
        """Number of cells :attr:`below_min_genes`."""
        return int(self.below_min_genes.sum())

    @property
    def n_little_known(self) -> int:
        """Number of cells with over half of their counts in genes that the model does not know."""
        return int((self.known_share < 0.5).sum())

    def warnings(self) -> list[str]:
        """Return sentences about the file, and about doubtful cells and genes."""
        return [*self.notes, *warnings_about(len(self), self.n_few_genes, self.n_little_known, self.coverage)]

    def from_source(self, source: CellSource) -> Embeddings:
        """Return the vectors of cells of this source, with what there is to say about its features and counts."""
        coverage = replace(self.coverage, left_out=source.features.left_out)
        return replace(self, coverage=coverage, notes=tuple(source.warnings))


def warnings_about(n_cells: int, n_few_genes: int, n_little_known: int, coverage: GeneCoverage) -> list[str]:
    """Return sentences about doubtful cells and genes of `n_cells` embeddings; :class:`Embeddings` has the counts."""
    found = []
    if n_few_genes:
        found.append(
            f"{n_few_genes} of {n_cells} cells express fewer than {MIN_GENES} genes of the vocabulary; "
            "their embeddings rest on little."
        )
    if n_little_known:
        found.append(
            f"{n_little_known} of {n_cells} cells have over half of their counts in genes that the model does not know."
        )
    look = explained(coverage.unmatched) if coverage.share < 0.5 else ""
    if look:
        found.append(
            f"{coverage.n_genes - coverage.n_matched} of {coverage.n_genes} columns are no gene that the model knows. "
            f"{look}"
        )
    if coverage.n_ambiguous:
        names = ", ".join(f"{a} -> {b}" for a, b in coverage.ambiguous[:3])
        found.append(
            f"{coverage.n_ambiguous} gene identifiers are ambiguous; the first reading was taken ({names}, ...)."
        )
    return found


def join(parts: list[Embeddings]) -> Embeddings:
    """Join the results of one matrix's chunks; timings are added up."""
    return gather(parts, sum(map(len, parts)))


def gather(
    parts: Iterable[Embeddings],
    n_cells: int,
    values: NDArray[np.float32] | None = None,
    outputs: Mapping[str, NDArray[np.float32]] | None = None,
) -> Embeddings:
    """Join the results of one matrix's chunks as they arrive, so that values per cell are in memory only once.

    Parameters
    ----------
    parts
        Results of the chunks in order; at least one.
    n_cells
        Number of cells of all parts.
    values
        Array for the vectors, float32 [n_cells, width]; None: a new one.
    outputs
        Arrays for other outputs per cell by name; new ones for those that are not among them.
    """
    lengths = np.empty(n_cells, dtype=np.int32)
    n_detected = np.empty(n_cells, dtype=np.int32)
    known_share = np.empty(n_cells, dtype=np.float32)
    timings: dict[str, float] = {}
    per_cell = dict(outputs or {})
    per_token: dict[str, list[OutputValues]] = {}
    first: Embeddings | None = None
    start = 0
    for part in parts:
        first = first or part
        values = np.empty((n_cells, part.values.shape[1]), dtype=np.float32) if values is None else values
        rows = slice(start, start + len(part))
        values[rows], lengths[rows], n_detected[rows] = part.values, part.lengths, part.n_detected
        known_share[rows] = part.known_share
        for stage, seconds in part.timings.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
        for name, output in part.outputs.items():
            if output.offsets is None:
                if name not in per_cell:
                    per_cell[name] = np.empty((n_cells, output.spec.width), dtype=np.float32)
                per_cell[name][rows] = output.values
            else:
                per_token.setdefault(name, []).append(output)
        start += len(part)
    assert first is not None, "no part"  # noqa: S101  our own bug: a source has cells
    assert values is not None and start == n_cells, f"{start} of {n_cells} cells"  # noqa: S101, PT018
    return replace(
        first,
        values=values,
        lengths=lengths,
        n_detected=n_detected,
        known_share=known_share,
        timings=timings,
        outputs={
            name: OutputValues(output.spec, per_cell[name]) if output.offsets is None else _join(per_token[name])
            for name, output in first.outputs.items()
        },
    )


def join_outputs(parts: Sequence[OutputValues]) -> OutputValues:
    """Join the values of one output for the cells of several chunks."""
    if parts[0].offsets is not None:
        return _join(parts)
    return replace(parts[0], values=np.concatenate([part.values for part in parts]))


def _join(parts: Sequence[OutputValues]) -> OutputValues:
    """Join the values per token of several chunks."""
    first = parts[0]
    if len(parts) == 1:
        return first
    values = np.concatenate([part.values for part in parts])
    lengths = np.concatenate([np.diff(part.offsets) for part in parts if part.offsets is not None])
    genes = [part.genes for part in parts if part.genes is not None]
    names = first.gene_names
    if any(part.gene_names is not names and part.gene_names != names for part in parts):
        names = tuple(dict.fromkeys(name for part in parts for name in part.gene_names))
        places = {name: place for place, name in enumerate(names)}
        genes = [
            np.array([places[name] for name in part.gene_names], dtype=np.int32)[own]
            for part, own in zip(parts, genes, strict=True)
        ]
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    return OutputValues(first.spec, values, offsets, np.concatenate(genes), names)
