"""Which perturbations are most alike: by their cells, and by their effects, the differences from the control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perturbscope.scoring.labels import Groups
from perturbscope.threads import checkpoint


def effects(groups: Groups, names: Sequence[str], control: str) -> dict[str, NDArray[np.float64]]:
    """Return the direction in which each perturbation moves its cells: the difference of means, at unit length.

    Parameters
    ----------
    groups
        Vectors by label.
    names
        The perturbations.
    control
        Label of the control cells, of whose mean all differences are. A perturbation that does nothing has a direction
        too, by chance, and since the controls are shared, two of them are somewhat alike.

    Returns
    -------
    float64 [width] by label; NaN where the means are equal.
    """
    middle = groups.rows[groups.members[control]].mean(axis=0)
    found = {}
    for name in names:
        checkpoint()
        effect = groups.rows[groups.members[name]].mean(axis=0) - middle
        length = float(np.linalg.norm(effect))
        found[name] = effect / length if length > 0 else np.full(len(effect), np.nan)
    return found


def similarity(a: str, b: str, directions: Mapping[str, NDArray[np.float64]]) -> float:
    """Return the cosine between the effects of two labels, NaN where one has none: the control has none."""
    if a not in directions or b not in directions:
        return float("nan")
    return float(directions[a] @ directions[b])


def nearest_pairs(table: pd.DataFrame, k: int) -> pd.DataFrame:
    """Return the pairs in which one label is among the `k` nearest of the other, the closest first within a metric.

    Near is a small distance of the cells, and a large similarity of the effects.

    Parameters
    ----------
    table
        Pairs with the columns ``a, b, metric, distance, effect_similarity``.
    k
        Number of neighbours of each label, by cells and again by effects.
    """
    keep = np.zeros(len(table), dtype=bool)
    places = table.reset_index(drop=True)
    for _, part in places.groupby("metric", sort=False):
        for column, sign in (("distance", 1.0), ("effect_similarity", -1.0)):
            checkpoint()
            near = pd.concat([part[["a"]].set_axis(["of"], axis=1), part[["b"]].set_axis(["of"], axis=1)])
            near["by"] = sign * pd.concat([part[column], part[column]])
            first = near.dropna().sort_values("by", kind="stable").groupby("of").head(k)
            keep[first.index.to_numpy()] = True
    return by_closeness(places[keep])


def by_closeness(table: pd.DataFrame) -> pd.DataFrame:
    """Return pairs with the smallest distance first within each metric, those without a distance last."""
    order = pd.factorize(table["metric"])[0]
    rank = np.lexsort((table["distance"].to_numpy(dtype=np.float64), order))
    return table.iloc[rank].reset_index(drop=True)
