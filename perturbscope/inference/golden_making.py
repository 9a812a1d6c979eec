"""Making of golden vectors, which go into the bundle; see :mod:`perturbscope.inference.golden`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.genes import GeneResolver
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families.outputs import Outputs, selected
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.bundle import GOLDEN, Bundle
from perturbscope.inference.embedder import Embedder
from perturbscope.inference.golden import TOLERANCE, Golden, cells_of, comparable, digests_of, distance

SHORT_LENGTHS = (1, 7)
"""Numbers of genes of the artificial cells beside real cells, which all have many."""
LENGTHS = (*SHORT_LENGTHS, 64, 2048)
"""Numbers of genes of the artificial cells if there are no real ones; the last is cut to the model's maximum."""
_REAL_CELLS, _MAX_GENES = 3, 2500


def make_golden(
    embedders: Mapping[str, Embedder],
    vocabulary: GeneVocabulary,
    *,
    cells: CountMatrix | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Golden:
    """Choose cells and embed them.

    Parameters
    ----------
    embedders
        Embedders on the CPU by variant; ``fp32`` must be among them.
    vocabulary
        Vocabulary of the model.
    cells
        Real cells to choose from; without them, cells are made of random genes and counts.
    tolerance
        Largest difference of a value that a float32 graph may have later.
    seed
        Seed of the artificial cells.
    """
    exact = embedders["fp32"]
    golden_cells, source = _choose(vocabulary, exact.family.max_length, cells, seed)
    tokens = exact.tokenize(golden_cells)
    names = [spec.name for spec in exact.outputs]
    vectors = comparable(_one_by_one(exact, tokens, names))
    cosines = {
        variant: _lowest_cosines(vectors, (_one_by_one(other, tokens, names), other.infer(tokens, names)))
        for variant, other in embedders.items()
        if variant != "fp32"
    }
    return Golden(golden_cells, digests_of(tokens), vectors, tolerance, cosines, source)


def add_golden(path: str | Path, *, cells: CountMatrix | None = None, seed: int = 0) -> Bundle:
    """Add golden vectors to a bundle, or replace them; its graphs and its model id stay the same.

    The bundle is written anew and then replaces the old one; a failure leaves the old one as it is.

    Raises
    ------
    BundleError
        The bundle is damaged, or a graph does not load.
    """
    bundle = Bundle.open(path)
    embedders = {name: Embedder.from_bundle(bundle, variant=name) for name in bundle.manifest.variants}
    golden = make_golden(
        embedders, bundle.vocabulary, cells=cells, tolerance=tolerance_of(bundle.manifest.parity), seed=seed
    )
    files: dict[str, Path | bytes] = {name: bundle.path / name for name in bundle.manifest.files}
    files[GOLDEN] = golden.to_json(bundle.vocabulary).encode()
    return Bundle.write(bundle.path, bundle.manifest, files, overwrite=True)


def first_cells(path: str | Path) -> CountMatrix:
    """Read the first chunk of a file, which is enough to choose from. Raises as :func:`perturbscope.open_cells`."""
    from perturbscope.cells.readers import open_cells

    with open_cells(path) as source:
        return next(iter(source))


def tolerance_of(parity: Mapping[str, Any]) -> float:
    """Return the tolerance of a graph's parity with torch, which also applies to its golden vectors."""
    value = parity.get("tolerance")
    return float(value) if isinstance(value, int | float) and value > 0 else TOLERANCE


def _choose(
    vocabulary: GeneVocabulary, max_length: int, cells: CountMatrix | None, seed: int
) -> tuple[CountMatrix, str]:
    """Return cells of different lengths over the genes of the vocabulary, and a description of their origin."""
    rng = np.random.default_rng(seed)
    n_genes = len(vocabulary.gene_ids)
    longest = min(max_length, n_genes, LENGTHS[-1])
    lengths = sorted({min(length, longest) for length in (LENGTHS if cells is None else SHORT_LENGTHS)})
    rows = [np.sort(rng.choice(n_genes, size=length, replace=False)) for length in lengths]
    counts = [rng.integers(1, 40, size=length) for length in lengths]
    totals = [float(part.sum()) for part in counts]
    source = f"made of random genes and counts (seed {seed})"
    if cells is not None:
        known = _in_vocabulary(cells, vocabulary)
        for cell in _spread(np.diff(known.indptr)):
            part = slice(int(known.indptr[cell]), int(known.indptr[cell + 1]))
            rows.append(known.indices[part].astype(np.int64))
            counts.append(known.data[part])
            totals.append(float(cells.totals[cell]))
        source = f"{len(rows) - len(lengths)} real cells, and {len(lengths)} short ones {source}"
    return cells_of(rows, counts, vocabulary.gene_ids, totals), source


def _in_vocabulary(cells: CountMatrix, vocabulary: GeneVocabulary) -> sparse.csr_matrix:
    """Return counts with one column for each row of the vocabulary; other genes are left out."""
    mapped = GeneResolver.default().map(cells.gene_ids, vocabulary).rows
    kept = np.flatnonzero(mapped >= 0)
    to_row = sparse.csr_matrix(
        (np.ones(len(kept), dtype=np.int64), (kept, mapped[kept])), shape=(cells.n_genes, len(vocabulary.gene_ids))
    )
    known = sparse.csr_matrix(cells.counts.astype(np.int64) @ to_row)
    known.sort_indices()
    return known


def _spread(n_detected: NDArray[Any]) -> list[int]:
    """Choose a few cells, from the fewest to the most genes, that do not bloat the file."""
    order = np.argsort(n_detected, kind="stable")
    order = order[n_detected[order] > 0]
    slim = order[n_detected[order] <= _MAX_GENES]
    order = slim if len(slim) else order[:1]
    at = np.linspace(0, len(order) - 1, min(_REAL_CELLS, len(order))).astype(int)
    return [int(cell) for cell in order[np.unique(at)]]


def _one_by_one(embedder: Embedder, tokens: TokenizedCells, names: list[str]) -> Outputs:
    found = Outputs.empty(selected(embedder.outputs, names), tokens.offsets)
    for cell in range(len(tokens)):
        rows = np.array([cell])
        found.put(rows, embedder.run(tokens, rows, found.specs))
    return found


def _lowest_cosines(vectors: Mapping[str, NDArray[np.float32]], ways: Iterable[Outputs]) -> dict[str, float]:
    """Return the lowest cosine of each output over several ways to compute it."""
    found = [comparable(values) for values in ways]
    return {name: min(distance(golden, values[name])[1] for values in found) for name, golden in vectors.items()}
