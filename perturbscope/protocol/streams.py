"""Messages of a stream of cells, independent of the format that they travel in.

A stream is ``start``, chunks of cells, and the end of sending; its answer is ``opened``, the vectors of each chunk in
order, and ``end``. An answer without ``end`` is incomplete: it was cut off, or an error took its place. The chunks that
were answered stay valid, and a new stream continues with the first row that was not; see :class:`StreamStart`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneCoverage
from perturbscope.errors import MalformedMatrixError
from perturbscope.families.outputs import OutputSpec
from perturbscope.inference.embeddings import Embeddings, warnings_about
from perturbscope.protocol import checks as check
from perturbscope.protocol.fields import Meta


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamStart:
    """The first message of a stream: everything that holds for all of its cells.

    Raises
    ------
    DuplicateGenesError, MalformedMatrixError
        No matrix could have these names of genes.
    """

    gene_ids: NDArray[np.str_]
    """Identifier of each column, unique."""
    model: str | None = None
    """Name or id of a model; None: the server's default. A stream that continues another gives the id of its model."""
    first_row: int = 0
    """Number of the first cell in the caller's file; the cells after it are counted on."""
    outputs: tuple[str, ...] | None = None
    """Names of outputs that are wanted beside the cell embedding."""

    def every_gene(self) -> CountMatrix:
        """Return one cell that expresses every gene once; tokenizing it gives the coverage of the genes."""
        n_genes = len(self.gene_ids)
        if not n_genes:
            raise MalformedMatrixError("There are no genes; the matrix has no columns.", field="gene_ids")
        ones = np.ones(n_genes, dtype=np.int32)
        return CountMatrix.from_csr(ones, np.arange(n_genes, dtype=np.int32), np.array([0, n_genes]), self.gene_ids)


@dataclass(frozen=True, kw_only=True)
class StreamOpened:
    """The answer to a stream that is accepted; the message of that name in the .proto explains its fields."""

    model_id: str
    vocabulary_hash: str
    coverage: GeneCoverage
    width: int
    chunks_in_progress: int
    max_chunk_cells: int
    max_chunk_bytes: int
    variant: str | None = None
    outputs: tuple[OutputSpec, ...] = ()
    """Outputs that each chunk has beside the cell embedding."""

    @property
    def meta(self) -> Meta:
        """The model behind the vectors."""
        return Meta(
            model_id=self.model_id,
            vocabulary_hash=self.vocabulary_hash,
            coverage=self.coverage,
            variant=self.variant,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamChunk:
    """The vectors of one chunk."""

    first_row: int
    embeddings: Embeddings


@dataclass(frozen=True, kw_only=True)
class StreamEnd:
    """The answer after all cells."""

    n_cells: int
    """Cells of this stream."""
    meta: Meta = field(default_factory=Meta)
    """The model behind the vectors, with warnings about all cells. Its seconds by stage are sums over all chunks, which
    overlap: they add up to more than the stream took."""


StreamAnswer = StreamOpened | StreamChunk | StreamEnd


@dataclass
class StreamTotals:
    """Sums over the chunks that a stream has answered, in constant memory."""

    n_cells: int = 0
    n_few_genes: int = 0
    n_little_known: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    def add(self, part: Embeddings) -> None:
        """Add one chunk."""
        self.n_cells += len(part)
        self.n_few_genes += part.n_few_genes
        self.n_little_known += part.n_little_known
        for stage, seconds in part.timings.items():
            self.timings[stage] = self.timings.get(stage, 0.0) + seconds

    def end(self, opened: StreamOpened) -> StreamEnd:
        """Return the last message."""
        warnings = tuple(warnings_about(self.n_cells, self.n_few_genes, self.n_little_known, opened.coverage))
        meta = replace(opened.meta, timings=self.timings, warnings=warnings)
        return StreamEnd(n_cells=self.n_cells, meta=meta)


def stream_start(gene_ids: object, model: object, first_row: object, outputs: object = None) -> StreamStart:
    """Build a start from untrusted parts. Raises errors of :mod:`perturbscope.errors` that name the field."""
    names = check.genes(gene_ids)
    return StreamStart(
        gene_ids=np.array(names, dtype=np.str_) if names else np.zeros(0, dtype="U1"),
        model=check.optional_text(model, "model"),
        first_row=check.integer(first_row, "first_row"),
        outputs=None if outputs is None else check.texts(outputs, "outputs"),
    )
