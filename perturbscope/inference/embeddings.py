"""Vectors of cells, with the model behind them and warnings about doubtful cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.genes import GeneCoverage

MIN_GENES = 500
"""Cells with fewer expressed genes are below the usual quality floor of an atlas: flagged, not dropped."""
Maker = tuple[str, str | None]
"""Id of a model and variant of its graph; only vectors of one maker are comparable."""


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

    def __len__(self) -> int:
        return len(self.values)

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
        """Return sentences about doubtful cells and genes."""
        return warnings_about(len(self), self.n_few_genes, self.n_little_known, self.coverage)


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
    if coverage.n_ambiguous:
        names = ", ".join(f"{a} -> {b}" for a, b in coverage.ambiguous[:3])
        found.append(
            f"{coverage.n_ambiguous} gene identifiers are ambiguous; the first reading was taken ({names}, ...)."
        )
    return found


def join(parts: list[Embeddings]) -> Embeddings:
    """Join the results of one matrix's chunks; timings are added up."""
    return gather(parts, sum(map(len, parts)))


def gather(parts: Iterable[Embeddings], n_cells: int, values: NDArray[np.float32] | None = None) -> Embeddings:
    """Join the results of one matrix's chunks as they arrive, so that vectors are in memory only once.

    Parameters
    ----------
    parts
        Results of the chunks in order; at least one.
    n_cells
        Number of cells of all parts.
    values
        Array for the vectors, float32 [n_cells, width]; None: a new one.
    """
    lengths = np.empty(n_cells, dtype=np.int32)
    n_detected = np.empty(n_cells, dtype=np.int32)
    known_share = np.empty(n_cells, dtype=np.float32)
    timings: dict[str, float] = {}
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
        start += len(part)
    assert first is not None, "no part"  # noqa: S101  our own bug: a source has cells
    assert values is not None and start == n_cells, f"{start} of {n_cells} cells"  # noqa: S101, PT018
    return replace(
        first, values=values, lengths=lengths, n_detected=n_detected, known_share=known_share, timings=timings
    )
