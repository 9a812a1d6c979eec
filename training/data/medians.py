"""Non-zero medians of genes over a corpus, which make a new vocabulary.

The median of a gene is taken over its counts per 10,000 in the cells that express it (Theodoris et al. 2023). It is
exact for a small corpus; for a large one it comes from a sketch of logarithmic buckets (Masson et al. 2019, DDSketch),
whose quantiles have a bounded relative error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.genes import GeneResolver
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import InvalidParameterError
from training.config.stages import CorpusConfig, SourceConfig
from training.data.sources import Progress, chunks, keep_cells, name_of, open_source

EXACT_VALUES = 25_000_000
"""Most non-zero values of a corpus whose medians are computed exactly, in less than a gigabyte."""
_LOW, _HIGH = 1e-4, 1e4
"""Range of counts per 10,000 in cells of up to 100 million counts."""


class MedianSketch:
    """Counts of values in logarithmic buckets, one row of buckets for each gene.

    The relative error of every value in a bucket, and so of a median, is at most `accuracy`.

    Parameters
    ----------
    n_genes
        Number of genes.
    accuracy
        Largest relative error of a median.
    """

    def __init__(self, n_genes: int, *, accuracy: float = 0.005) -> None:
        if not 0 < accuracy < 1:
            raise InvalidParameterError(f"accuracy is {accuracy}; it must be between 0 and 1.", field="accuracy")
        self._gamma = (1 + accuracy) / (1 - accuracy)
        self._n_buckets = math.ceil(math.log(_HIGH / _LOW) / math.log(self._gamma)) + 1
        self._counts = np.zeros((n_genes, self._n_buckets), dtype=np.uint32)

    def add(self, genes: NDArray[np.integer], values: NDArray[np.floating]) -> None:
        """Count `values` [n], each of one of the `genes` [n]."""
        buckets = np.ceil(np.log(np.clip(values, _LOW, _HIGH) / _LOW) / math.log(self._gamma)).astype(np.int64)
        places, counts = np.unique(genes.astype(np.int64) * self._n_buckets + buckets, return_counts=True)
        self._counts.reshape(-1)[places] += counts.astype(np.uint32)

    @property
    def n_values(self) -> NDArray[np.int64]:
        """Number of values counted for each gene."""
        counted: NDArray[np.int64] = self._counts.sum(axis=1, dtype=np.int64)
        return counted

    def medians(self) -> NDArray[np.float64]:
        """Return the median of each gene, [n_genes]; NaN for a gene without values."""
        totals = self.n_values
        representatives = _LOW * self._gamma ** np.arange(self._n_buckets) * 2 / (1 + self._gamma)
        result = np.full(len(totals), np.nan)
        for gene in np.flatnonzero(totals).tolist():
            upto = np.cumsum(self._counts[gene], dtype=np.int64)
            middle = [(int(totals[gene]) - 1) // 2, int(totals[gene]) // 2]
            result[gene] = representatives[np.searchsorted(upto, middle, side="right")].mean()
        return result


def exact_medians(genes: NDArray[np.integer], values: NDArray[np.floating], n_genes: int) -> NDArray[np.float64]:
    """Return the median of each gene's values, [n_genes]; NaN for a gene without values."""
    order = np.lexsort((values, genes))
    ordered = values[order].astype(np.float64)
    counts = np.bincount(genes, minlength=n_genes)
    starts = np.cumsum(counts) - counts
    medians = np.full(n_genes, np.nan)
    some = counts > 0
    low, high = starts[some] + (counts[some] - 1) // 2, starts[some] + counts[some] // 2
    medians[some] = (ordered[low] + ordered[high]) / 2
    return medians


def corpus_medians(
    config: CorpusConfig,
    *,
    min_cells: int = 10,
    genes: Sequence[str] | None = None,
    exact: bool | None = None,
    progress: Progress | None = None,
) -> GeneVocabulary:
    """Compute a vocabulary of the genes that a corpus expresses.

    Parameters
    ----------
    config
        Files and filters of the corpus; its vocabulary is not used.
    min_cells
        Fewest cells that express a gene of the vocabulary.
    genes
        Ensembl ids to choose from, such as protein-coding and miRNA genes; all Ensembl ids of the files by default.
    exact
        Whether to keep all values (True) or a sketch (False); by default, the size of the corpus decides.
    progress
        Called after every chunk.

    Raises
    ------
    InvalidParameterError
        No gene is left.
    """
    universe = _universe(config.sources, genes)
    index = {gene: row for row, gene in enumerate(universe)}
    kept: list[tuple[NDArray[np.int32], NDArray[np.float32]]] = []
    n_kept = 0
    sketch: MedianSketch | None = None if exact is not False else MedianSketch(len(universe))
    n_cells = np.zeros(len(universe), dtype=np.int64)
    for rows, values in _values(config, index, progress):
        n_cells += np.bincount(rows, minlength=len(universe))
        if sketch is None:
            kept.append((rows, values))
            n_kept += len(rows)
            if n_kept > EXACT_VALUES and exact is None:
                sketch = MedianSketch(len(universe))
                for part in kept:
                    sketch.add(*part)
                kept.clear()
        else:
            sketch.add(rows, values)
    if sketch is not None:
        medians = sketch.medians()
    elif kept:
        all_rows, all_values = (np.concatenate(part) for part in zip(*kept, strict=True))
        medians = exact_medians(all_rows, all_values, len(universe))
    else:
        medians = np.full(len(universe), np.nan)
    expressed = np.flatnonzero(n_cells >= max(1, min_cells))
    if not len(expressed):
        raise InvalidParameterError(
            f"No gene is expressed in {min_cells} cells that pass the filters. Lower min_cells.", field="min_cells"
        )
    names = ", ".join(name_of(source) for source in config.sources)
    how = "exact" if sketch is None else "within 0.5 %"
    return GeneVocabulary(
        gene_ids=tuple(universe[row] for row in expressed.tolist()),
        tokens=np.arange(2, 2 + len(expressed), dtype=np.int32),
        medians=medians[expressed],
        special_tokens={"<pad>": 0, "<mask>": 1},
        source=f"non-zero medians ({how}) over {names}",
    )


def _universe(sources: Sequence[SourceConfig], wanted: Sequence[str] | None) -> list[str]:
    """Return the Ensembl ids of all files, without versions, sorted."""
    resolver = GeneResolver.default()
    found: set[str] = set()
    for source in sources:
        with open_source(source) as cells:
            resolved = (resolver.resolve(gene)[0] for gene in cells.gene_ids.tolist())
            found.update(gene for gene in resolved if gene is not None)
    return sorted(found if wanted is None else found & set(wanted))


def _values(
    config: CorpusConfig, index: dict[str, int], progress: Progress | None
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """Yield gene and counts per 10,000 of every non-zero count; columns of one gene in a cell are added up."""
    resolver = GeneResolver.default()
    for number, source in enumerate(config.sources):
        with open_source(source, chunk_cells=config.chunk_cells) as cells:
            columns = np.array([index.get(resolver.resolve(gene)[0] or "", -1) for gene in cells.gene_ids.tolist()])
            keep = keep_cells(cells, config, number)
            min_genes = config.min_genes if source.min_genes is None else source.min_genes
            for rows, counts in chunks(cells, keep):
                per_cell = np.diff(counts.counts.indptr)
                cell = np.repeat(np.arange(len(rows)), per_cell)
                gene = columns[counts.counts.indices]
                used = (gene >= 0) & (per_cell >= min_genes)[cell]
                places, first = np.unique(cell[used] * len(index) + gene[used], return_inverse=True)
                total = np.bincount(first, weights=counts.counts.data[used], minlength=len(places))
                scale = 10_000.0 / counts.totals[places // max(len(index), 1)]
                yield (places % max(len(index), 1)).astype(np.int32), (total * scale).astype(np.float32)
                if progress:
                    progress(name_of(source), int(rows[-1]) + 1, cells.n_cells)
