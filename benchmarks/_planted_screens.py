"""Effects of known size, planted into real control cells.

The cells are real, so depth, noise and hidden structure are; only what is planted is simulated, and every change keeps
counts whole numbers. With ``s`` the strength and a module of ``k`` genes:

- ``null``: nothing is changed;
- ``shift``: every molecule of the module is lost with probability s in all cells (binomial thinning), so each gene's
  mean falls by the factor 1 - s, exactly, in counts: a knock-down;
- ``spread``: half of the cells lose the share s of the module's molecules, and the other half gets them, dealt in
  proportion to what its cells had: the sum of every gene over the group stays what it was, to the molecule;
- ``rare``: as ``shift``, in a share of the cells only;
- ``scatter``: counts stay as they are, and :func:`scatter` moves the cells' vectors away from the controls' mean by the
  factor 1 + s. A change of variance alone in counts is none after the logarithm (its mean falls); this one is.

A group is changed block by block (the first 20 cells, the next 30, ...), so that the above holds for every prefix that
ends with a block too, and one group serves for several numbers of cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from evaluation.baselines import log_cp10k
from perturbscope.cells.counts import CountMatrix
from perturbscope.errors import EmptyCellError, InvalidParameterError, TooFewCellsError, TooFewControlsError

Kind = Literal["null", "shift", "spread", "rare", "scatter"]
CONTROL = "control"


@dataclass(frozen=True)
class Effect:
    """An effect that is planted into a group.

    Attributes
    ----------
    kind
        Kind of the effect; the module's docstring describes each.
    genes
        Number of genes of the module.
    strength
        Share of the module's molecules that a responding cell loses, 0 to 1; the stretch s of ``scatter``.
    share
        Share of the cells that respond; only ``rare`` uses it.

    Raises
    ------
    InvalidParameterError
        A number is outside its range.
    """

    kind: Kind
    genes: int = 0
    strength: float = 0.0
    share: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.strength <= 1 and 0 < self.share <= 1 and self.genes >= self.in_counts):
            raise InvalidParameterError(
                f"{self} cannot be planted: strength must be 0 to 1, share above 0 to 1, genes 1 or more.",
                field="effect",
            )

    @property
    def in_counts(self) -> bool:
        """Whether the effect changes counts."""
        return self.kind not in ("null", "scatter")

    @property
    def name(self) -> str:
        """Name of the effect in tables, for example ``shift, 50 genes, 20 %``."""
        words: list[str] = [self.kind]
        if self.in_counts:
            words.append(f"{self.genes} genes")
        if self.kind != "null":
            words.append(f"{100 * self.strength:.0f} %")
        if self.kind == "rare":
            words.append(f"{100 * self.share:.0f} % of cells")
        return ", ".join(words)


@dataclass(frozen=True)
class PlantedScreen:
    """A screen whose true effects are known.

    Attributes
    ----------
    cells
        Reference cells, unchanged, then the groups, each `n_cells` in a row.
    perturbations
        Label of each cell: ``control``, or ``G00``, ``G01``, ... in random order of the effects.
    effects
        Effect that was planted into the cells of each label.
    source
        Row of each cell in the controls that the screen was made of.
    n_reference, n_cells
        Numbers of cells of the reference and of each group.
    """

    cells: CountMatrix
    perturbations: list[str]
    effects: dict[str, Effect]
    source: NDArray[np.intp]
    n_reference: int
    n_cells: int

    def first(self, n: int) -> NDArray[np.intp]:
        """Return the positions of the reference and of the first `n` cells of every group."""
        starts = self.n_reference + self.n_cells * np.arange(len(self.effects))
        groups = (starts[:, None] + np.arange(min(n, self.n_cells))).ravel()
        return np.concatenate([np.arange(self.n_reference), groups])


def planted_screen(
    controls: CountMatrix,
    effects: Sequence[Effect],
    *,
    blocks: Sequence[int] = (20, 50, 100, 200, 400),
    reference: int = 500,
    detected: float = 0.1,
    seed: int = 0,
) -> PlantedScreen:
    """Split control cells at random into a reference and a source, and plant each effect into cells of the source.

    Parameters
    ----------
    controls
        Real cells of one kind.
    effects
        Effects, one group each; a group draws its module among the genes that a share `detected` of the controls
        express.
    blocks
        Ascending numbers of cells; the last is the size of a group.
    reference
        Number of cells of the reference. No group shares a cell with it, and no group holds a cell twice; groups may
        share cells with each other.
    detected
        Smallest share of controls that express a gene of a module.
    seed
        Seed of everything that is drawn.

    Raises
    ------
    InvalidParameterError
        The blocks do not rise, or fewer genes are eligible than a module needs.
    TooFewControlsError
        Fewer controls than reference and one group need.
    EmptyCellError
        An effect left a cell without a molecule.
    """
    if not blocks or any(b <= a for a, b in pairwise([0, *blocks])):
        raise InvalidParameterError(f"blocks must rise from above 0, not {list(blocks)}.", field="blocks")
    size = blocks[-1]
    if len(controls) < reference + size:
        raise TooFewControlsError(
            f"{len(controls)} controls; a reference of {reference} and a group of {size} need {reference + size}.",
            field="controls",
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(controls))
    pool = order[reference:]
    eligible = np.flatnonzero(controls.counts.getnnz(axis=0) >= detected * len(controls))
    chosen, parts, planted = [order[:reference]], [controls[order[:reference]]], {}
    for i, which in enumerate(rng.permutation(len(effects))):
        effect = effects[which]
        if effect.genes > len(eligible):
            raise InvalidParameterError(
                f"{len(eligible)} genes are expressed by {detected:.0%} of the controls, and {effect.name!r} needs "
                f"{effect.genes}; lower `detected`.",
                field="detected",
            )
        source = rng.choice(pool, size, replace=False)
        module = rng.choice(eligible, effect.genes, replace=False)
        chosen.append(source)
        parts.append(plant(controls[source], effect, module=module, blocks=blocks, rng=rng))
        planted[f"G{i:02d}"] = effect
    cells = CountMatrix.from_matrix(
        sparse.vstack([part.counts for part in parts], format="csr"),
        controls.gene_ids,
        totals=np.concatenate([part.totals for part in parts]),
    )
    labels = [CONTROL] * reference + [name for name in planted for _ in range(size)]
    return PlantedScreen(cells, labels, planted, np.concatenate(chosen), reference, size)


def plant(
    cells: CountMatrix,
    effect: Effect,
    *,
    module: NDArray[np.intp],
    blocks: Sequence[int],
    rng: np.random.Generator,
) -> CountMatrix:
    """Return the cells with an effect on the genes of `module` (columns), block by block; totals follow the counts.

    Raises
    ------
    TooFewCellsError
        The blocks do not end with the last cell.
    EmptyCellError
        A cell was left without a molecule.
    """
    if blocks[-1] != len(cells):
        raise TooFewCellsError(f"{len(cells)} cells, and the blocks end at {blocks[-1]}.", field="blocks")
    if not effect.in_counts:
        return cells
    before = cells.counts[:, module].toarray().astype(np.int64)
    after = before.copy()
    for start, stop in pairwise([0, *blocks]):
        mixed = start + rng.permutation(stop - start)
        if effect.kind == "spread":
            half = len(mixed) // 2
            _move(after, mixed[:half], mixed[half : 2 * half], effect.strength, rng)
        else:
            responders = mixed[: round(effect.share * len(mixed))]
            after[responders] = rng.binomial(after[responders], 1 - effect.strength)
    into = sparse.csr_matrix(
        (np.ones(len(module), dtype=np.int64), (np.arange(len(module)), module)), shape=(len(module), cells.n_genes)
    )
    counts = sparse.csr_matrix(cells.counts.astype(np.int64) + sparse.csr_matrix(after - before) @ into)
    counts.eliminate_zeros()
    counts.sort_indices()
    empty = np.flatnonzero(counts.getnnz(axis=1) == 0)
    if len(empty):
        raise EmptyCellError(
            f"{effect.name!r} takes every molecule of {len(empty)} cells. Start from deeper cells.", field="effect"
        )
    totals = cells.totals + (after - before).sum(axis=1)
    return replace(cells, counts=counts.astype(np.int32), totals=totals, first_row=0)


def _move(
    counts: NDArray[np.int64],
    givers: NDArray[np.intp],
    takers: NDArray[np.intp],
    share: float,
    rng: np.random.Generator,
) -> None:
    """Move a share of every gene's molecules from cells to others in place; givers and takers are as many."""
    kept = rng.binomial(counts[givers], 1 - share)
    moved = (counts[givers] - kept).sum(axis=0)
    counts[givers] = kept
    for gene, molecules in enumerate(moved):
        had = counts[takers, gene].astype(np.float64)
        weights = had / had.sum() if had.sum() else np.full(len(takers), 1 / len(takers))
        counts[takers, gene] += rng.multinomial(molecules, weights)


def scatter(
    values: NDArray[np.float32], screen: PlantedScreen, centre: NDArray[np.floating[Any]]
) -> NDArray[np.float32]:
    """Copy the vectors of a screen's cells, with the ``scatter`` groups moved away from `centre` [width]."""
    moved = values.copy()
    labels = np.asarray(screen.perturbations)
    for name, effect in screen.effects.items():
        if effect.kind == "scatter":
            moved[labels == name] += effect.strength * (moved[labels == name] - centre)
    return moved


def measured(screen: PlantedScreen, controls: CountMatrix) -> pd.DataFrame:
    """Measure the effects on the changed genes, against the same cells before.

    Returns
    -------
    One row for each label whose counts were changed: ``perturbation, effect``, and the relative change of the genes'
    mean count, of their mean log CP10k, and of the standard deviation of a cell's sum over them.
    """
    rows = []
    labels = np.asarray(screen.perturbations)
    for name, effect in screen.effects.items():
        if not effect.in_counts:
            continue
        cells = np.flatnonzero(labels == name)
        after, before = screen.cells[cells], controls[screen.source[cells]]
        genes = np.flatnonzero(np.asarray(abs(after.counts - before.counts).sum(axis=0)).ravel())
        sums = [np.asarray(part.counts[:, genes].sum(axis=1)).ravel() for part in (before, after)]
        logs = [float(log_cp10k(part)[:, genes].sum()) for part in (before, after)]
        rows.append(
            {
                "perturbation": name,
                "effect": effect.name,
                "mean_count": sums[1].sum() / sums[0].sum() - 1,
                "mean_log": logs[1] / logs[0] - 1,
                "sd_of_sum": float(sums[1].std() / sums[0].std()) - 1,
            }
        )
    return pd.DataFrame(rows, columns=["perturbation", "effect", "mean_count", "mean_log", "sd_of_sum"])


class ControlPCA:
    """Principal components of log CP10k of control cells, on which other cells are projected.

    Fitted on all controls, reference and source alike and each of them once, so that an unchanged group is
    exchangeable with the reference. Fitted on the planted screen, where one source cell is in several groups, the
    components would follow the source's noise, and null groups would look shifted.
    """

    def __init__(self, controls: CountMatrix, *, n_components: int = 50, seed: int = 0) -> None:
        from sklearn.decomposition import PCA

        self.columns = np.flatnonzero(controls.counts.getnnz(axis=0))
        values = log_cp10k(controls)[:, self.columns]
        self.model = PCA(min(n_components, min(values.shape) - 1), svd_solver="arpack", random_state=seed).fit(values)
        self.centre: NDArray[np.float32] = self(controls).mean(axis=0)

    def __call__(self, cells: CountMatrix) -> NDArray[np.float32]:
        """Project cells with the same genes; float32 [n, n_components]."""
        scores: NDArray[np.float32] = self.model.transform(log_cp10k(cells)[:, self.columns]).astype(np.float32)
        return scores
