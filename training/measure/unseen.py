"""Tokens of cells of a file that a model was not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from perturbscope.cells.genes import GeneResolver
from perturbscope.cells.readers import open_cells
from perturbscope.errors import EmptyCellError, UnreadableFileError
from perturbscope.families import Family, load_family
from perturbscope.families.tokens import TokenizedCells, concatenate
from perturbscope.inference.bundle import sha256
from training.checkpoint import Checkpoint
from training.config.stages import Natural, Positive
from training.config.strict import configuration, within
from training.data.shards import Corpus
from training.data.sources import chunks


@configuration
class EvaluateOptions:
    """Choice and scoring of cells.

    Parameters
    ----------
    cells
        Most cells of a file; a larger file is sampled.
    min_genes
        Fewest genes of the vocabulary in a cell.
    max_length
        Most tokens of a cell, highest ranks first (Zhao et al. 2025 use 2,000); never more than the model takes.
    batch
        Cells in a forward pass.
    mask_probability
        Share of a cell's tokens that are masked.
    layer, gene_key, total_counts_key
        Options of :func:`perturbscope.open_cells`.
    device
        ``cpu`` or ``cuda``.
    seed
        Seed of the sample and of the masks; the mask of a cell does not depend on the other cells.
    """

    cells: Positive = 10_000
    min_genes: Positive = 10
    max_length: Positive = 2000
    batch: Positive = 16
    mask_probability: Annotated[float, within(1e-6, 1 - 1e-6)] = 0.15
    layer: str | None = None
    gene_key: str | None = None
    total_counts_key: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    seed: Natural = 0


@dataclass(frozen=True, eq=False)
class Heldout:
    """Cells of one file, as tokens.

    Attributes
    ----------
    name
        Name of the file.
    inputs
        All inputs of the model.
    tokens
        Tokens of the genes of each cell by rank, without special tokens, int64 [number of genes] each.
    rows
        Row of each cell in the file.
    left_out
        Number of cells that were not taken, by reason.
    """

    name: str
    inputs: TokenizedCells
    tokens: list[NDArray[np.int64]]
    rows: list[int]
    left_out: dict[str, int] = field(default_factory=dict)


def read_heldout(
    path: str | Path, checkpoint: Checkpoint, *, options: EvaluateOptions, corpus: Corpus | None = None
) -> Heldout:
    """Return the tokens of a sample of a file's cells, without those that are in the corpus.

    Raises
    ------
    InvalidInputError
        :func:`perturbscope.open_cells` cannot read the file.
    EmptyCellError
        No cell is left; the message has the reasons.
    """
    path = Path(path)
    vocabulary = checkpoint.vocabulary
    family = load_family(checkpoint.family, checkpoint.family_config, vocabulary)
    shorter = {"max_length": min(options.max_length, family.max_length)}
    family = load_family(checkpoint.family, {**checkpoint.family_config, **shorter}, vocabulary)
    left_out: dict[str, int] = {}
    parts: list[TokenizedCells] = []
    taken: list[int] = []
    with open_cells(
        path, layer=options.layer, gene_key=options.gene_key, total_counts_key=options.total_counts_key
    ) as source:
        keep = np.ones(source.n_cells, dtype=bool)
        if corpus is not None:
            keep[_trained_rows(path, corpus)] = False
            left_out["in the corpus"] = int((~keep).sum())
        free = np.flatnonzero(keep)
        if len(free) > options.cells:
            rng = np.random.default_rng([options.seed, len(free)])
            keep[:] = False
            keep[rng.choice(free, options.cells, replace=False)] = True
            left_out["not sampled"] = len(free) - options.cells
        mapping = GeneResolver.default().map(source.gene_ids, vocabulary)
        n_read = 0
        for rows, counts in chunks(source, keep):
            n_read += len(rows)
            good = np.flatnonzero(counts.counts[:, mapping.rows >= 0].getnnz(axis=1) >= options.min_genes)
            left_out["too few genes"] = left_out.get("too few genes", 0) + len(rows) - len(good)
            if len(good):
                parts.append(family.tokenize(counts[good]))
                taken += rows[good].tolist()
        left_out["empty"] = int(keep.sum()) - n_read
    left_out = {reason: count for reason, count in left_out.items() if count}
    if not parts:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise EmptyCellError(
            f"{path}: no cell is left to evaluate ({reasons}). Give other cells, or lower min_genes.", field="cells"
        )
    inputs = concatenate(parts)
    return Heldout(path.name, inputs, gene_tokens_by_rank(inputs, family), taken, left_out)


def trained_on(path: str | Path, provenance: Mapping[str, Any]) -> int:
    """Return how many cells of a file a checkpoint, or one that it was made from, was trained on by its record."""
    content = _content(Path(path))
    found = 0
    record: Mapping[str, Any] | None = provenance
    while isinstance(record, Mapping):
        data = record.get("data")
        sources = data.get("sources", ()) if isinstance(data, Mapping) else ()
        found = max([found, *(int(entry["kept"]) for entry in sources if entry.get("sha256") == content)])
        record = record.get("parent")
    return found


def gene_tokens_by_rank(cells: TokenizedCells, family: Family) -> list[NDArray[np.int64]]:
    """Return the tokens of the genes of each cell, in their order, without special tokens, int64."""
    rows = family.gene_rows(cells)
    tokens = np.where(rows >= 0, family.vocabulary.tokens[rows], -1).astype(np.int64)
    of_cells = np.split(tokens, cells.offsets[1:-1])
    return [of_cell[of_cell >= 0] for of_cell in of_cells]


def _trained_rows(path: Path, corpus: Corpus) -> NDArray[np.int64]:
    """Return the rows that the corpus holds of the file with this very content."""
    content = _content(path)
    numbers = [i for i, source in enumerate(corpus.manifest["sources"]) if source["sha256"] == content]
    rows: NDArray[np.int64] = corpus.per_cell("row")[np.isin(corpus.per_cell("source"), numbers)]
    return rows


def _content(path: Path) -> str:
    """Return the SHA-256 of a file."""
    try:
        return sha256(path)
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error}.", field="cells") from error
