"""Recall of known relations between genes from similarities of their perturbations, without controls.

Every pair of perturbations has a cosine similarity of its centred mean vectors. Known pairs (two genes of a pathway or
complex, a transcription factor and its target) should be among the most similar, or the most opposite, 5 % of all
pairs, as in the EFAAR benchmarks (Celik et al. 2024). There the centre is the mean of control cells, here the mean of
the perturbed ones; and p comes from exchanging the genes' names, which keeps the number of relations of each gene and
the overlap of sets.

"Nearest" is stricter: whether the single most similar perturbation of a gene is a known partner.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from evaluation.profiles import Whitening, label_warnings, make_profiles
from perturbscope.errors import InvalidParameterError, LimitExceededError
from perturbscope.scoring.statistics import empirical_p, generator

Status = Literal["ok", "no_known_pair", "too_few_pairs", "every_pair_known", "no_direction"]
Relations = Mapping[str, Collection[str]] | Iterable[tuple[str, str]]

MAX_PERTURBATIONS = 8000
"""Most perturbations, since their similarities, all by all, are held (256 MB of float32)."""
MAX_SET_SIZE = 500
"""Most genes of a set; larger sets ("Metabolism") relate nearly all genes to each other."""
_NAN = float("nan")


@dataclass(frozen=True, eq=False)
class RelationRecall:
    """Recall of known relations.

    Attributes
    ----------
    status
        ``ok``, or why there is no number. ``no_known_pair``: none among the perturbations; ``too_few_pairs``: the
        extreme share holds less than one; ``every_pair_known``: none could be missed; ``no_direction``: constant
        embeddings.
    recall, recall_top, recall_bottom
        Share of the known pairs in either, the upper, and the lower extreme share of all pairs.
    chance, ceiling
        Share of all pairs in either extreme; and the recall if only known pairs were there, which is below 1 if more
        pairs are known than are extreme.
    p, z
        p and z of `recall`, from exchanged names of genes.
    nearest, nearest_chance, nearest_p
        Share of the perturbations with a known partner whose nearest perturbation is one; its mean over exchanged
        names; p.
    n_known, n_pairs, n_perturbations
        Numbers of known pairs evaluated, of all pairs, and of perturbations.
    pairs
        One row a known pair: ``a``, ``b``, ``similarity``, ``percentile`` (among all pairs, 0 to 100), ``relations``
        (names of the sets that hold both; empty if the relations are pairs).
    table
        One row a perturbation: ``perturbation``, ``n_cells``, ``n_known`` (partners among the perturbations),
        ``nearest`` (the most similar perturbation), ``nearest_known``, ``recalled`` (partners in either extreme).
    warnings
        Sentences that a reader should know before trusting a number.
    """

    status: Status
    recall: float
    recall_top: float
    recall_bottom: float
    chance: float
    ceiling: float
    p: float
    z: float
    nearest: float
    nearest_chance: float
    nearest_p: float
    n_known: int
    n_pairs: int
    n_perturbations: int
    pairs: pd.DataFrame
    table: pd.DataFrame
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON-able values, without the tables."""
        return {name: value for name, value in vars(self).items() if name not in ("pairs", "table")}


def relation_recall(
    values: ArrayLike,
    perturbations: Sequence[str],
    relations: Relations,
    *,
    control: str | None = None,
    share: float = 0.05,
    whitening: Whitening = "none",
    min_cells: int = 10,
    max_set_size: int = MAX_SET_SIZE,
    permutations: int = 999,
    seed: int = 0,
) -> RelationRecall:
    """Find known relations among the extreme similarities of perturbations.

    Parameters
    ----------
    values
        One vector a cell, [n, width].
    perturbations
        Perturbation of each cell, named like the genes of `relations`.
    relations
        Gene sets by name, whose genes are all related to each other; or pairs of genes.
    control
        Label of the controls, which are left out.
    share
        Share of all pairs that are called extreme at either end.
    whitening, min_cells
        See :func:`evaluation.profiles.make_profiles`.
    max_set_size
        Gene sets with more genes (of any kind, not only the perturbed) are left out.
    permutations
        Number of exchanges of the genes' names.
    seed
        Seed of the exchanges.

    Raises
    ------
    InvalidEmbeddingError, MalformedMatrixError, InvalidParameterError, TooFewCellsError
        See :func:`evaluation.profiles.make_profiles`.
    LimitExceededError
        There are more than 8,000 perturbations.
    """
    if not 0 < share <= 0.5 or permutations < 1:
        raise InvalidParameterError(
            f"share is {share} (above 0, at most 0.5) and permutations {permutations} (1 or more).",
            field="permutations" if permutations < 1 else "share",
        )
    labels = list(perturbations)
    profiles = make_profiles(
        values, labels, ["all"] * len(labels), control=control, min_cells=min_cells, whitening=whitening
    )
    if len(profiles) > MAX_PERTURBATIONS:
        raise LimitExceededError(
            f"{len(profiles):,} perturbations; at most {MAX_PERTURBATIONS:,} can be compared with each other.",
            field="perturbations",
        )
    vectors, directed = profiles.directions("cells")
    names, sizes = profiles.perturbations[directed].tolist(), profiles.sizes[directed]
    warnings = [*label_warnings(names), *_left_out(len(profiles) - len(names), profiles.dropped)]
    known = _known_pairs(relations, names, max_set_size)
    n_pairs = len(names) * (len(names) - 1) // 2
    count = int(share * n_pairs + 1e-9)
    status: Status = "ok"
    if not len(names):
        status = "no_direction"
    elif not known:
        status = "no_known_pair"
        warnings += _unmatched(relations, names)
    elif count < 1:
        status = "too_few_pairs"
        warnings.append(f"{share:.0%} of {n_pairs} pairs is less than one pair.")
    elif len(known) == n_pairs:
        status = "every_pair_known"
        warnings.append(f"All {n_pairs} pairs are known relations, so any embedding would recall them equally.")
    similarity = (vectors[directed] @ vectors[directed].T).astype(np.float32)
    a, b = _index(known, names)
    judged = _judge(similarity, a, b, count, permutations, generator(seed, "relations")) if status == "ok" else {}
    extreme = judged.pop("extreme", np.zeros(len(known), dtype=bool))
    return RelationRecall(
        status=status,
        **{name: judged.get(name, _NAN) for name in _NUMBERS},
        n_known=len(known),
        n_pairs=n_pairs,
        n_perturbations=len(names),
        pairs=_pair_table(similarity, known, a, b),
        table=_gene_table(similarity, names, sizes, a, b, extreme),
        warnings=warnings,
    )


_NUMBERS = (
    "recall", "recall_top", "recall_bottom", "chance", "ceiling", "p", "z", "nearest", "nearest_chance", "nearest_p",
)  # fmt: skip


def _judge(
    similarity: NDArray[np.float32],
    a: NDArray[np.intp],
    b: NDArray[np.intp],
    count: int,
    permutations: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Return recall of the pairs (a, b) among the `count` highest and lowest similarities, and its null."""
    n = len(similarity)
    every = similarity[np.triu_indices(n, k=1)]
    ordered = np.partition(every, [count - 1, len(every) - count])
    low, high = ordered[count - 1], ordered[len(every) - count]
    top, bottom = similarity[a, b] >= high, similarity[a, b] <= low
    rivals = similarity.copy()
    np.fill_diagonal(rivals, -np.inf)
    nearest = rivals.argmax(axis=1)
    partners = np.zeros((n, n), dtype=bool)
    partners[a, b] = partners[b, a] = True
    related = np.flatnonzero(partners.any(axis=1))
    null, null_nearest = np.empty(permutations), np.empty(permutations)
    for i in range(permutations):
        # Gene g takes the profile order[g]; its nearest is then the gene that took the nearest profile.
        order = rng.permutation(n)
        place = np.argsort(order)
        drawn = similarity[order[a], order[b]]
        null[i] = np.mean((drawn >= high) | (drawn <= low))
        null_nearest[i] = np.mean(partners[related, place[nearest[order[related]]]])
    recall, hits = float(np.mean(top | bottom)), float(np.mean(partners[related, nearest[related]]))
    sd, extremes = float(null.std()), (every >= high) | (every <= low)
    return {
        "recall": recall,
        "recall_top": float(np.mean(top)),
        "recall_bottom": float(np.mean(bottom)),
        "chance": float(np.mean(extremes)),
        "ceiling": min(1.0, int(extremes.sum()) / len(a)),
        "p": empirical_p(recall, null, noise=1e-12),
        "z": (recall - float(null.mean())) / sd if sd > 0 else _NAN,
        "nearest": hits,
        "nearest_chance": float(null_nearest.mean()),
        "nearest_p": empirical_p(hits, null_nearest, noise=1e-12),
        "extreme": top | bottom,
    }


def _known_pairs(relations: Relations, names: list[str], max_set_size: int) -> dict[tuple[str, str], list[str]]:
    """Return pairs of `names` (in alphabetical order) that are related, with the names of the sets that hold both."""
    present = set(names)
    known: dict[tuple[str, str], list[str]] = {}
    if isinstance(relations, Mapping):
        for name, genes in relations.items():
            if len(set(genes)) <= max_set_size:
                for pair in combinations(sorted(present & set(genes)), 2):
                    known.setdefault(pair, []).append(str(name))
        return dict(sorted(known.items()))
    for left, right in relations:
        if left != right and {left, right} <= present:
            known.setdefault((min(left, right), max(left, right)), [])
    return dict(sorted(known.items()))


def _index(known: Mapping[tuple[str, str], list[str]], names: list[str]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    place = {name: i for i, name in enumerate(names)}
    a, b = ([place[pair[side]] for pair in known] for side in (0, 1))
    return np.array(a, dtype=np.intp), np.array(b, dtype=np.intp)


def _pair_table(
    similarity: NDArray[np.float32],
    known: Mapping[tuple[str, str], list[str]],
    a: NDArray[np.intp],
    b: NDArray[np.intp],
) -> pd.DataFrame:
    every = np.sort(similarity[np.triu_indices(len(similarity), k=1)])
    own = similarity[a, b]
    # A pair with ties has the middle rank.
    rank = (np.searchsorted(every, own, "left") + np.searchsorted(every, own, "right")) / 2
    table = pd.DataFrame(
        {
            "a": [pair[0] for pair in known],
            "b": [pair[1] for pair in known],
            "similarity": own.astype(np.float64),
            "percentile": 100 * rank / max(len(every), 1),
            "relations": [";".join(sets) for sets in known.values()],
        }
    )
    return table.sort_values(["similarity", "a", "b"], ascending=[False, True, True], ignore_index=True)


def _gene_table(
    similarity: NDArray[np.float32],
    names: list[str],
    sizes: NDArray[np.intp],
    a: NDArray[np.intp],
    b: NDArray[np.intp],
    extreme: NDArray[np.bool_],
) -> pd.DataFrame:
    n = len(names)
    rivals = similarity.copy()
    np.fill_diagonal(rivals, -np.inf)
    nearest = [names[i] if n > 1 else None for i in rivals.argmax(axis=1)] if n else []
    either = {frozenset((names[i], names[j])) for i, j in zip(a, b, strict=True)}
    table = pd.DataFrame(
        {
            "perturbation": np.array(names, dtype=object),
            "n_cells": sizes,
            "n_known": np.bincount(np.concatenate([a, b]), minlength=n),
            "nearest": np.array(nearest, dtype=object),
            "nearest_known": [frozenset(pair) in either for pair in zip(names, nearest, strict=True)],
            "recalled": np.bincount(np.concatenate([a[extreme], b[extreme]]), minlength=n),
        }
    )
    return table.sort_values(["recalled", "n_known", "perturbation"], ascending=[False, False, True], ignore_index=True)


def _left_out(undirected: int, dropped: Sequence[tuple[str, str]]) -> list[str]:
    warnings = []
    if undirected:
        warnings.append(f"{undirected} perturbations have the mean vector of all cells and were left out.")
    if dropped:
        warnings.append(f"{len(dropped)} perturbations had too few cells and were left out.")
    return warnings


def _unmatched(relations: Relations, names: list[str]) -> list[str]:
    """Say why no pair is known: most often the genes are named in another way."""
    genes = {gene for item in (relations.values() if isinstance(relations, Mapping) else []) for gene in item}
    text = f"No known relation joins two of the {len(names)} perturbations"
    if not genes:
        return [f"{text}."]
    exact = len(genes & set(names))
    folded = len({gene.casefold() for gene in genes} & {name.casefold() for name in names})
    more = f", {folded} if case is ignored" if folded > exact else ""
    return [f"{text}: {exact} of their names are among the {len(genes)} genes of the sets{more}."]
