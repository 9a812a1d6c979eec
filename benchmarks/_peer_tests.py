"""The E-tests of pertpy and scPerturb, restated, to compare ours with them and to see what their conventions cost.

Both programs exchange the labels of one perturbation and of control, as :mod:`perturbscope.scoring.scorers` does, and
differ from it in what they compute and report:

=============  =============================  =======================  ==========================
               pertpy 1.0.3                   scPerturb 0.1.0          PerturbScope
=============  =============================  =======================  ==========================
ground         Euclidean                      squared Euclidean        Euclidean
estimator      V                              U                        U
vectors        as given                       as given                 scaled to unit length
counted        exchanges above the observed   ... or equal to it       ... or equal to it
p              max(count, 1) / exchanges      max(count, 1) / ...      (1 + count) / (1 + ...)
correction     Holm-Sidak, control counted    Holm-Sidak, the same     Benjamini-Hochberg
=============  =============================  =======================  ==========================

Read from the source of `pertpy 1.0.3 <https://github.com/scverse/pertpy>`_ and `scperturb 0.1.0
<https://github.com/sanderlab/scPerturb>`_ (Peidli et al. 2024). pertpy before 1.3.0 also attaches p-values to the wrong
perturbations unless the file's order of labels is alphabetical (pertpy issue 1072); here they stay where they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from perturbscope.errors import ControlLabelMissingError
from perturbscope.scoring.distances import check_rows
from perturbscope.scoring.energy.closed_form import LinearGroup
from perturbscope.scoring.energy.matrix import DenseGroup
from perturbscope.scoring.energy.pool import Pool
from perturbscope.scoring.results import Estimator
from perturbscope.scoring.statistics import Exchange, generator


@dataclass(frozen=True)
class Peer:
    """The conventions of a program's E-test.

    Attributes
    ----------
    ground, estimator
        Ground distance and estimator of its energy distance.
    ties
        Whether an exchange that equals the observed distance counts against it.
    control_is_null
        Whether p of control against itself, which is corrected with the others, is 1; else it is the smallest
        possible, since the observed value is missing and no exchange exceeds it.
    """

    ground: Literal["euclidean", "sqeuclidean"]
    estimator: Estimator
    ties: bool
    control_is_null: bool


PERTPY = Peer("euclidean", "V", ties=False, control_is_null=False)
"""pertpy 1.0.3, ``DistanceTest("edistance")``."""
SCPERTURB = Peer("sqeuclidean", "U", ties=True, control_is_null=True)
"""scPerturb 0.1.0, ``etest``."""


def peer_e_test(
    values: ArrayLike,
    perturbations: Sequence[str],
    *,
    control: str,
    peer: Peer,
    permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Test every perturbation by a peer's conventions.

    Parameters
    ----------
    values
        One vector a cell, [n, width]; used as they are.
    perturbations
        Label of each cell.
    control
        The label of the control cells.
    peer
        Conventions of the test.
    permutations
        Number of exchanges of labels.
    seed
        Seed of the exchanges; the programs themselves draw without one.

    Returns
    -------
    Columns ``perturbation, n_cells, distance, p, p_adjusted``; one row for each perturbation, in order of names.

    Raises
    ------
    InvalidEmbeddingError
        The vectors are not a finite matrix.
    ControlLabelMissingError
        No cell is a control.
    """
    rows = check_rows(values).astype(np.float64)
    labels = np.asarray(perturbations, dtype=str)
    if control not in labels:
        raise ControlLabelMissingError(f"No cell has the control label {control!r}.", field="control")
    origin = rows.mean(axis=0)

    def group(name: str) -> DenseGroup | LinearGroup:
        own = rows[labels == name]
        return DenseGroup(own) if peer.ground == "euclidean" else LinearGroup(own, 2.0, origin)

    reference = group(control)
    found = []
    for name in sorted(set(labels.tolist()) - {control}):
        cells = group(name)
        pool = Pool(cells, reference, peer.estimator)
        draws = Exchange.of(cells.size, reference.size).draw(permutations, generator(seed, "peer", name))
        null = np.concatenate([pool.split(members) for members in draws])
        observed = pool.observed
        above = null >= observed - pool.noise if peer.ties else null > observed + pool.noise
        found.append(
            {
                "perturbation": name,
                "n_cells": cells.size,
                "distance": observed,
                "p": max(int(above.sum()), 1) / permutations,
            }
        )
    table = pd.DataFrame(found, columns=["perturbation", "n_cells", "distance", "p"])
    of_control = 1.0 if peer.control_is_null else 1 / permutations
    return table.assign(p_adjusted=holm_sidak([*table["p"], of_control])[:-1])


def holm_sidak(p: ArrayLike) -> NDArray[np.float64]:
    """Adjust p-values by Holm's step-down method with Sidak's bound, the default of both programs.

    The smallest of m p-values becomes ``1 - (1 - p)^m``, the next ``1 - (1 - p)^(m - 1)``, and none is smaller than
    the one before. With p no smaller than 1 / 1000 nothing is below 0.05 once m exceeds 51.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    left = len(values) - np.arange(len(values))
    stepped = np.maximum.accumulate(-np.expm1(left * np.log1p(-np.minimum(values[order], 1 - 1e-16))))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def largest_family(permutations: int, *, alpha: float = 0.05) -> int:
    """Return the most tests among which the smallest p, ``1 / permutations``, can still pass Holm-Sidak at `alpha`."""
    return int(np.floor(np.log1p(-alpha) / np.log1p(-1 / permutations) + 1e-12))
