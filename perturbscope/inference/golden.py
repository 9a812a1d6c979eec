"""Golden vectors: a few cells in the bundle, and the vectors that the model gave for them at export.

Checksums prove that the files of a bundle are whole. They do not prove that this machine, its provider and this version
of the tokenizer turn counts into the same vectors. A few cells do: they are tokenized and embedded again, and compared.

``golden.json``, in a bundle, holds the cells as raw counts by row of ``vocabulary.tsv``, a digest of each cell's
tokens, its vector from the float32 graph in ONNX Runtime on a CPU (cell by cell, so without padding), and the cosine of
each smaller variant to those vectors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.errors import CorruptBundleError, GoldenMismatchError, PerturbScopeError
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.bundle import GOLDEN, Bundle
from perturbscope.inference.embedder import Embedder

FORMAT = 1
TOLERANCE = 1e-4
"""Largest difference of a value on the CPU, if the bundle's parity with torch has no tolerance."""
ACCELERATOR_COSINE = 1 - 1e-4
"""Smallest cosine of a float32 cell on a provider that is not the CPU: it may multiply with fewer bits (TensorFloat-32
keeps 10 of 23), so single values differ by more than the tolerance while the direction hardly does. Such rounding
of the weights moves values of bundles/default by 0.001, and no cell further than a cosine of 1 - 1e-6."""
VARIANT_SLACK = 2.0
"""A smaller variant may be this many times as far from float32 as it was when it was exported."""
MIN_SLACK = 1e-4
"""Smallest allowance of a variant's cosine: even a variant that was almost exact may differ between processors."""
_EXACT = ("CPUExecutionProvider", "")
"""Providers that compute float32 in full; empty for an encoder without a provider."""


@dataclass(frozen=True, kw_only=True)
class GoldenResult:
    """Comparison of a model's vectors with its golden vectors.

    Attributes
    ----------
    variant, provider
        Graph and execution provider that were tried.
    n_cells
        Number of golden cells.
    largest_difference
        Largest difference of a value, over all cells.
    lowest_cosine
        Lowest cosine of a cell's vector to its golden vector.
    passed
        Whether the vectors are near enough.
    limit
        The limit that they must keep, in words.
    """

    variant: str
    provider: str
    n_cells: int
    largest_difference: float
    lowest_cosine: float
    passed: bool
    limit: str

    def __str__(self) -> str:
        return (
            f"{self.variant} on {self.provider}: largest difference {self.largest_difference:.2g}, lowest cosine "
            f"{self.lowest_cosine:.6f} over {self.n_cells} golden cells ({self.limit})"
        )

    def require(self, model_id: str) -> None:
        """Raise GoldenMismatchError unless the comparison passed."""
        if not self.passed:
            raise GoldenMismatchError(
                f"The model {model_id} does not give the vectors that its bundle records. {self}. "
                "Check provider, driver and versions, or export the model again.",
                field="golden",
            )


@dataclass(frozen=True, eq=False)
class Golden:
    """Golden cells and their vectors, read by :func:`read_golden`; made by :mod:`perturbscope.inference.golden_making`.

    Attributes
    ----------
    cells
        Raw counts of the cells.
    digests
        Digest of each cell's tokens.
    vectors
        Golden vectors, float32 [n_cells, width].
    tolerance
        Largest difference of a value that the float32 graph may have on the CPU.
    cosines
        Lowest cosine of each smaller variant to `vectors` at export.
    source
        Description of the origin of the cells.
    """

    cells: CountMatrix
    digests: tuple[str, ...]
    vectors: NDArray[np.float32]
    tolerance: float
    cosines: Mapping[str, float]
    source: str

    def tokenize(self, embedder: Embedder) -> TokenizedCells:
        """Tokenize the cells, and check that their tokens are those of the export.

        Raises
        ------
        GoldenMismatchError
            The tokens differ: the tokenizer has changed.
        """
        try:
            tokens = embedder.tokenize(self.cells)
        except PerturbScopeError as error:
            raise GoldenMismatchError(
                f"The golden cells of {embedder.model_id} cannot be tokenized: {error.message}", field="golden"
            ) from error
        for cell, (expected, found) in enumerate(zip(self.digests, digests_of(tokens), strict=True)):
            if found != expected:
                raise GoldenMismatchError(
                    f"Golden cell {cell} of {embedder.model_id} has other tokens than at export ({found}, not "
                    f"{expected}): the tokenizer of this perturbscope is not the one that the model was exported with. "
                    "Use that version, or export the model again.",
                    field="golden",
                )
        return tokens

    def compare(self, values: NDArray[np.float32], *, variant: str, provider: str) -> GoldenResult:
        """Compare vectors of the cells with the golden ones."""
        worst, lowest = distance(self.vectors, values)
        if variant == "fp32" and provider in _EXACT:
            passed, limit = worst <= self.tolerance, f"at most {self.tolerance:g}"
        else:
            least = ACCELERATOR_COSINE
            if variant != "fp32":
                least = 1 - max(VARIANT_SLACK * (1 - self.cosines.get(variant, 1.0)), MIN_SLACK)
            passed, limit = lowest >= least, f"cosine at least {least:.6f}"
        return GoldenResult(
            variant=variant,
            provider=provider,
            n_cells=len(values),
            largest_difference=worst,
            lowest_cosine=lowest,
            passed=bool(passed),
            limit=limit,
        )

    def to_json(self, vocabulary: GeneVocabulary) -> str:
        """Return the text of ``golden.json``."""
        rows = {str(gene): row for row, gene in enumerate(vocabulary.gene_ids)}
        row_of = np.array([rows[str(gene)] for gene in self.cells.gene_ids])
        counts = self.cells.counts
        cells = []
        for cell, digest in enumerate(self.digests):
            part = slice(int(counts.indptr[cell]), int(counts.indptr[cell + 1]))
            cells.append(
                {
                    "rows": row_of[counts.indices[part]].tolist(),
                    "counts": counts.data[part].tolist(),
                    "total": float(self.cells.totals[cell]),
                    "tokens": digest,
                    # The shortest decimals that give back the same float32.
                    "vector": [float(str(value)) for value in self.vectors[cell]],
                }
            )
        head = {"format": FORMAT, "source": self.source, "tolerance": self.tolerance, "cosines": dict(self.cosines)}
        return json.dumps({**head, "cells": cells}, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str, bundle: Bundle) -> Golden:
        """Read the text of :meth:`to_json`. Raises CorruptBundleError."""
        try:
            return cls._of(json.loads(text), bundle)
        except PerturbScopeError as error:
            raise CorruptBundleError(f"{bundle.path / GOLDEN} holds cells that cannot be: {error.message}") from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
            raise CorruptBundleError(
                f"{bundle.path / GOLDEN} cannot be read ({type(error).__name__}: {error}). Export the model again."
            ) from error

    @classmethod
    def _of(cls, data: Any, bundle: Bundle) -> Golden:
        if data["format"] != FORMAT:
            raise ValueError(f"it has the format {data['format']}, not {FORMAT}")
        cells, genes = data["cells"], bundle.vocabulary.gene_ids
        vectors = np.array([cell["vector"] for cell in cells], dtype=np.float32)
        if vectors.shape != (len(cells), bundle.manifest.width) or not len(cells) or not np.isfinite(vectors).all():
            raise ValueError(f"its vectors have the shape {vectors.shape}")
        rows = [np.array(cell["rows"], dtype=np.int64) for cell in cells]
        if any(len(part) == 0 or part.min() < 0 or part.max() >= len(genes) for part in rows):
            raise ValueError("a gene is not a row of the vocabulary")
        counts = cells_of(rows, [np.array(cell["counts"]) for cell in cells], genes, [cell["total"] for cell in cells])
        tolerance, cosines = float(data["tolerance"]), {str(k): float(v) for k, v in data["cosines"].items()}
        if not (0 < tolerance < np.inf and all(-1 <= value <= 1 for value in cosines.values())):
            raise ValueError("a tolerance is out of range")
        digests = tuple(str(cell["tokens"]) for cell in cells)
        return cls(counts, digests, vectors, tolerance, cosines, str(data["source"]))


def check_golden(embedder: Embedder, golden: Golden) -> GoldenResult:
    """Tokenize and embed the golden cells, and compare their vectors.

    The cells are embedded together, which tests padding too.

    Raises
    ------
    GoldenMismatchError
        The tokens differ. Vectors that differ do not raise; see :meth:`GoldenResult.require`.
    InferenceError
        The forward pass failed.
    """
    values = embedder.embed_tokens(golden.tokenize(embedder))
    return golden.compare(values, variant=embedder.variant, provider=embedder.provider)


def read_golden(bundle: Bundle) -> Golden | None:
    """Read the golden vectors of an opened bundle; None if it has none. Raises CorruptBundleError."""
    if GOLDEN not in bundle.manifest.files:
        return None
    try:
        text = (bundle.path / GOLDEN).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptBundleError(f"{bundle.path / GOLDEN} cannot be read: {error}.") from error
    return Golden.from_json(text, bundle)


def cells_of(
    rows: Sequence[NDArray[Any]], counts: Sequence[NDArray[Any]], genes: Sequence[str] | NDArray[Any], totals: Any
) -> CountMatrix:
    """Build cells over the genes that at least one of them expresses."""
    used, columns = np.unique(np.concatenate(rows), return_inverse=True)
    indptr = np.concatenate([[0], np.cumsum([len(part) for part in rows])])
    names = np.asarray(genes)[used]
    return CountMatrix.from_csr(np.concatenate(counts), columns.astype(np.int64), indptr, names, totals=totals)


def digests_of(tokens: TokenizedCells) -> tuple[str, ...]:
    """Return a digest of each cell's arrays, without the type of their numbers, which depends on the machine."""
    found = []
    for cell in tokens:
        digest = hashlib.sha256()
        for name, array in sorted(cell.items()):
            plain = array.astype("<i8" if array.dtype.kind in "iub" else "<f8")
            digest.update(f"{name} {plain.shape}\n".encode())
            digest.update(np.ascontiguousarray(plain).tobytes())
        found.append(digest.hexdigest()[:16])
    return tuple(found)


def distance(expected: NDArray[np.float32], found: NDArray[np.float32]) -> tuple[float, float]:
    """Return the largest difference of a value and the lowest cosine of a row, which is at most 1."""
    a, b = expected.astype(np.float64), found.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return float(np.abs(a - b).max()), float(min(cosines.min(), 1.0))
