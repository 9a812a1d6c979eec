"""Golden vectors: a few cells in the bundle, and the outputs that the model gave for them at export.

Checksums prove that the files of a bundle are whole. They do not prove that this machine, its provider and this version
of the tokenizer turn counts into the same vectors. A few cells do: they are tokenized and embedded again, and compared.

``golden.json``, in a bundle, holds the cells as raw counts by row of ``vocabulary.tsv``, a digest of each cell's
tokens, its vector from the float32 graph in ONNX Runtime on a CPU (cell by cell, so without padding), and the cosine of
each smaller variant to those vectors. Format 2 is written for models with more outputs than the cell embedding: it adds
their values, of an output per token those of the first and the last token and the mean over all tokens of the cell.
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
from perturbscope.families.outputs import CELL_EMBEDDING, Outputs
from perturbscope.families.tokens import TokenizedCells
from perturbscope.inference.bundle import GOLDEN, Bundle
from perturbscope.inference.embedder import Embedder

FORMAT = 2
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
_TOKEN_ROWS = 3
"""Rows of a cell in an output per token: the first and the last token, and the mean."""
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
        Golden values of each output by name, float32, see :func:`comparable`: of the cell embedding [n_cells, width].
    tolerance
        Largest difference of a value that the float32 graph may have on the CPU.
    cosines
        Lowest cosine of each smaller variant to `vectors` at export, by variant and output.
    source
        Description of the origin of the cells.
    """

    cells: CountMatrix
    digests: tuple[str, ...]
    vectors: Mapping[str, NDArray[np.float32]]
    tolerance: float
    cosines: Mapping[str, Mapping[str, float]]
    source: str

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs that have golden values."""
        return tuple(self.vectors)

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

    def compare(self, values: Outputs, *, variant: str, provider: str) -> GoldenResult:
        """Compare outputs of the cells with the golden ones."""
        found = comparable(values)
        distances = {name: distance(golden, found[name]) for name, golden in self.vectors.items()}
        worst = max(largest for largest, _ in distances.values())
        if variant == "fp32" and provider in _EXACT:
            passed, limit = worst <= self.tolerance, f"at most {self.tolerance:g}"
        else:
            least = {name: self._least_cosine(name, variant) for name in distances}
            passed = all(cosine >= least[name] for name, (_, cosine) in distances.items())
            limit = f"cosine at least {least[CELL_EMBEDDING]:.6f}"
        return GoldenResult(
            variant=variant,
            provider=provider,
            n_cells=len(values),
            largest_difference=worst,
            lowest_cosine=min(cosine for _, cosine in distances.values()),
            passed=bool(passed),
            limit=limit,
        )

    def _least_cosine(self, name: str, variant: str) -> float:
        if variant == "fp32":
            return ACCELERATOR_COSINE
        at_export = self.cosines.get(variant, {}).get(name, 1.0)
        return 1 - max(VARIANT_SLACK * (1 - at_export), MIN_SLACK)

    def to_json(self, vocabulary: GeneVocabulary) -> str:
        """Return the text of ``golden.json``."""
        rows = {str(gene): row for row, gene in enumerate(vocabulary.gene_ids)}
        row_of = np.array([rows[str(gene)] for gene in self.cells.gene_ids])
        counts = self.cells.counts
        others = [name for name in self.vectors if name != CELL_EMBEDDING]
        n_cells, cells = len(self.digests), []
        for cell, digest in enumerate(self.digests):
            part = slice(int(counts.indptr[cell]), int(counts.indptr[cell + 1]))
            cells.append(
                {
                    "rows": row_of[counts.indices[part]].tolist(),
                    "counts": counts.data[part].tolist(),
                    "total": float(self.cells.totals[cell]),
                    "tokens": digest,
                    "vector": _decimals(self.vectors[CELL_EMBEDDING][cell]),
                    **({"outputs": {name: self._of_cell(name, cell, n_cells) for name in others}} if others else {}),
                }
            )
        cosines = {
            variant: dict(lowest) if others else lowest[CELL_EMBEDDING] for variant, lowest in self.cosines.items()
        }
        head = {
            "format": FORMAT if others else 1,
            "source": self.source,
            "tolerance": self.tolerance,
            "cosines": cosines,
        }
        return json.dumps({**head, "cells": cells}, separators=(",", ":")) + "\n"

    def _of_cell(self, name: str, cell: int, n_cells: int) -> list[list[float]]:
        rows = len(self.vectors[name]) // n_cells
        return [_decimals(row) for row in self.vectors[name][cell * rows : (cell + 1) * rows]]

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
        if data["format"] not in (1, FORMAT):
            raise ValueError(f"it has the format {data['format']}, not up to {FORMAT}")
        cells, genes = data["cells"], bundle.vocabulary.gene_ids
        specs = {spec.name: spec for spec in bundle.manifest.outputs}
        if not len(cells):
            raise ValueError("it has no cells")
        vectors = {CELL_EMBEDDING: np.array([cell["vector"] for cell in cells], dtype=np.float32)}
        for name in cells[0].get("outputs", {}):
            vectors[name] = np.array([row for cell in cells for row in cell["outputs"][name]], dtype=np.float32)
        for name, values in vectors.items():
            n_rows = len(cells) * (_TOKEN_ROWS if specs[name].per == "token" else 1)
            if values.shape != (n_rows, specs[name].width) or not np.isfinite(values).all():
                raise ValueError(f"its values of {name} have the shape {values.shape}")
        rows = [np.array(cell["rows"], dtype=np.int64) for cell in cells]
        if any(len(part) == 0 or part.min() < 0 or part.max() >= len(genes) for part in rows):
            raise ValueError("a gene is not a row of the vocabulary")
        counts = cells_of(rows, [np.array(cell["counts"]) for cell in cells], genes, [cell["total"] for cell in cells])
        tolerance = float(data["tolerance"])
        cosines = {
            str(variant): {str(name): float(value) for name, value in lowest.items()}
            if isinstance(lowest, dict)
            else {CELL_EMBEDDING: float(lowest)}
            for variant, lowest in data["cosines"].items()
        }
        if not (0 < tolerance < np.inf and all(-1 <= v <= 1 for lowest in cosines.values() for v in lowest.values())):
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
    values = embedder.infer(golden.tokenize(embedder), golden.outputs)
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


def comparable(values: Outputs) -> dict[str, NDArray[np.float32]]:
    """Return what golden values hold of each output, float32 [rows, width].

    An output per cell has one row a cell. An output per token has three: of the first and of the last token, and the
    mean over the tokens of the cell.
    """
    found: dict[str, NDArray[np.float32]] = {}
    starts, stops = values.offsets[:-1], values.offsets[1:]
    for spec in values.specs:
        array = values[spec.name]
        if spec.per == "token":
            sums = np.add.reduceat(array.astype(np.float64), starts, axis=0)
            means = (sums / (stops - starts)[:, None]).astype(np.float32)
            array = np.stack([array[starts], array[stops - 1], means], axis=1).reshape(-1, spec.width)
        found[spec.name] = array
    return found


def _decimals(row: NDArray[np.float32]) -> list[float]:
    """Return the shortest decimals that give back the same float32."""
    return [float(str(value)) for value in row]


def distance(expected: NDArray[np.float32], found: NDArray[np.float32]) -> tuple[float, float]:
    """Return the largest difference of a value and the lowest cosine of a row, which is at most 1.

    Rows of one value have no direction: there the whole column counts as one row.
    """
    if expected.shape[1] == 1:
        expected, found = expected.T, found.T
    a, b = expected.astype(np.float64), found.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return float(np.abs(a - b).max()), float(min(cosines.min(), 1.0))
