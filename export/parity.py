"""Parity: the exported graph against the torch model, and each variant against the exported graph, output by output.

Shapes: B cells in the batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export import ParityError
from export.files import Batch
from export.graph import MASK
from perturbscope.cells.counts import CountMatrix
from perturbscope.cells.vocabulary import GeneVocabulary
from perturbscope.families import Family
from perturbscope.families.outputs import CELL_EMBEDDING, Outputs, OutputSpec
from perturbscope.families.tokens import TokenizedCells, pad
from perturbscope.inference.encoder import Values
from perturbscope.inference.golden import cells_of, distance

LENGTHS = (1, 7, 64)
"""Numbers of genes, besides those of the longest cell, that are compared."""
BATCHES = (1, 3)
"""Batch sizes that are compared."""
_MAX_ATTENTION = 2**25
"""Most pairs of tokens in a batch: three cells of 2,048 tokens, or two of 4,096. A graph may store a score for each,
each head and float32: 2.4 GB with 18 heads."""
_ROWS = 2**14
"""Rows that are compared at a time, in float64."""

Runner = Callable[[Batch], Values]
"""Function from a padded batch to outputs by name, float32: [B, width] per cell, [B, L, width] per token."""
Advance = Callable[[], None]
"""Called after each case."""


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """Comparison of one batch.

    Attributes
    ----------
    batch, length
        Padded shape of the batch.
    max_abs_difference
        Largest absolute difference over all values of all outputs.
    lowest_cosine
        Lowest cosine over all cell embeddings.
    """

    batch: int
    length: int
    max_abs_difference: float
    lowest_cosine: float


def torch_runner(module: nn.Module, outputs: Sequence[OutputSpec]) -> Runner:
    """Return a function that runs a module, from inputs by name to a tuple of its outputs."""

    @torch.inference_mode()
    def run(batch: Batch) -> Values:
        values = module(**{name: torch.from_numpy(array) for name, array in batch.items()})
        return {spec.name: value.float().numpy() for spec, value in zip(outputs, values, strict=True)}

    return run


def random_cells(vocabulary: GeneVocabulary, n_genes: Sequence[int], *, rng: np.random.Generator) -> CountMatrix:
    """Make cells with random counts of the given numbers of genes of a vocabulary, or of all if there are too few."""
    known = len(vocabulary.gene_ids)
    rows = [rng.choice(known, size=min(number, known), replace=False) for number in n_genes]
    counts = [rng.integers(1, 1000, size=len(part)) for part in rows]
    return cells_of(rows, counts, vocabulary.gene_ids, [float(part.sum()) for part in counts])


def random_batch(family: Family, n_genes: Sequence[int], *, rng: np.random.Generator) -> Batch:
    """Make a padded batch of :func:`random_cells`."""
    tokens = family.tokenize(random_cells(family.vocabulary, n_genes, rng=rng))
    return pad(tokens, np.arange(len(tokens)), family.inputs)


def parity_batches(family: Family, *, seed: int = 0) -> Iterator[Batch]:
    """Yield batches of :data:`BATCHES` cells, the first with :data:`LENGTHS` genes or with as many as fit."""
    rng = np.random.default_rng(seed)
    longest = family.max_length
    for first in sorted({*(length for length in LENGTHS if length < longest), longest}):
        for batch in BATCHES:
            batch = max(min(batch, _MAX_ATTENTION // first**2), 1)
            others = rng.integers(1, first, size=batch - 1, endpoint=True)
            yield random_batch(family, [first, *others.tolist()], rng=rng)


def check_parity(
    reference: Runner,
    exported: Runner,
    batches: Iterable[Batch],
    *,
    outputs: Sequence[OutputSpec],
    tolerance: float,
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Compare two ways to compute outputs, batch by batch, without padding.

    Returns
    -------
    Facts for the manifest: tolerance, largest absolute difference over all outputs, lowest cosine of the cell
    embedding, both of each output, and the cases.

    Raises
    ------
    ParityError
        A difference is above `tolerance`, or is not a number.
    """
    cases = []
    found: dict[str, list[tuple[float, float]]] = {spec.name: [] for spec in outputs}
    for batch in batches:
        expected, values = (_real(run(batch), batch, outputs) for run in (reference, exported))
        n_cells, length = batch[MASK].shape
        for name, distances in found.items():
            distances.append(_distance(expected[name], values[name]))
            if not distances[-1][0] <= tolerance:
                raise ParityError(
                    f"{name} of a batch of {n_cells} x {length} tokens differs by {distances[-1][0]:.3g} between torch "
                    f"and ONNX Runtime; the tolerance is {tolerance:.3g}. Nothing was written."
                )
        cases.append(
            ParityCase(
                batch=n_cells,
                length=length,
                max_abs_difference=max(distances[-1][0] for distances in found.values()),
                lowest_cosine=found[CELL_EMBEDDING][-1][1],
            )
        )
        if advance:
            advance()
    return {
        "tolerance": tolerance,
        "max_abs_difference": max(case.max_abs_difference for case in cases),
        "lowest_cosine": min(case.lowest_cosine for case in cases),
        "outputs": {
            name: {
                "max_abs_difference": max(largest for largest, _ in distances),
                "lowest_cosine": min(cosine for _, cosine in distances),
            }
            for name, distances in found.items()
        },
        "cases": [asdict(case) for case in cases],
    }


def one_by_one(run: Runner, tokens: TokenizedCells, family: Family, outputs: Sequence[OutputSpec]) -> Outputs:
    """Compute the outputs of cells one by one, and so without padding."""
    found = Outputs.empty(outputs, tokens.offsets)
    for cell, length in enumerate(tokens.lengths.tolist()):
        rows = np.array([cell])
        batch = pad(tokens, rows, family.inputs)
        values = _real(run(batch), batch, outputs)
        found.put(rows, Outputs(found.specs, values, np.array([0, length])))
    return found


def compare_variant(name: str, fp32: Outputs, variant: Outputs, *, min_cosine: float) -> dict[str, Any]:
    """Compare the outputs of a variant with those of the float32 graph.

    Cells resemble each other, so the cosine of two raw vectors is near 1 even if the differences between cells are
    lost; for `mean_centred_cosine` the mean float32 vector is subtracted from both.

    Returns
    -------
    Cosines and the largest difference of the cell embedding, and under ``outputs`` those of the other outputs.

    Raises
    ------
    ParityError
        A cosine of a cell embedding is below `min_cosine`, or a value is not a number.
    """
    vectors, found = fp32.cell_embedding, variant.cell_embedding
    raw = cosines(vectors, found)
    centre = vectors.mean(axis=0)
    measured: dict[str, Any] = {
        "lowest_cosine": float(raw.min()),
        "mean_cosine": float(raw.mean()),
        "mean_centred_cosine": float(cosines(vectors - centre, found - centre).mean()),
        "max_abs_difference": float(np.abs(vectors - found).max()),
    }
    if not measured["lowest_cosine"] >= min_cosine:
        raise ParityError(
            f"A cell of the variant {name} has the cosine {measured['lowest_cosine']:.5f} to float32; "
            f"{min_cosine:g} is the least allowed. Export without this variant. Nothing was written."
        )
    others = {}
    for spec in fp32.specs:
        if spec.name != CELL_EMBEDDING:
            largest, lowest = _distance(fp32[spec.name], variant[spec.name])
            if not np.isfinite(largest):
                raise ParityError(
                    f"The variant {name} gives values of {spec.name} that are not finite. Export without this variant. "
                    "Nothing was written."
                )
            others[spec.name] = {"lowest_cosine": lowest, "max_abs_difference": largest}
    return measured | ({"outputs": others} if others else {})


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each row of `left` with the same row of `right`, at most 1; float64 [n]."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    # Infinite values give NaN, which no tolerance accepts.
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        values: NDArray[np.float64] = (a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return np.minimum(values, 1.0)


def _real(values: Values, batch: Batch, outputs: Sequence[OutputSpec]) -> dict[str, NDArray[np.float32]]:
    """Return the outputs of a padded batch without padding: those per token end to end."""
    is_real = batch[MASK] > 0
    return {spec.name: values[spec.name][is_real] if spec.per == "token" else values[spec.name] for spec in outputs}


def _distance(expected: NDArray[np.float32], found: NDArray[np.float32]) -> tuple[float, float]:
    """Return the largest difference and the lowest cosine; NaN, which no tolerance accepts, if a value is infinite."""
    step = len(expected) if expected.shape[1] == 1 else _ROWS
    with np.errstate(invalid="ignore"):
        parts = [distance(expected[at : at + step], found[at : at + step]) for at in range(0, len(expected), step)]
    largest, lowest = np.array(parts).T
    return float(largest.max()), float(lowest.min())
