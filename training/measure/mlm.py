"""Scores of a masked-language model that restores genes: hits@k, perplexity, rank reproduction. Numpy only.

The definitions follow Zhao et al. 2025 and Theodoris et al. 2023; points that they leave open are decided here:

hits@k
    15 % of a cell's tokens are selected and all become ``<mask>`` (none a random gene, none unchanged). A hit is a true
    gene among the k largest logits over genes; special tokens do not compete. Ties count as expected under
    random order, so equal logits score k / #genes. MICRO is the mean over masked tokens, MACRO the mean over genes of
    the mean over each gene's tokens: always guessing the commonest gene does well on the first and not on the second.
perplexity
    exp of the mean cross-entropy over the same tokens, over the whole vocabulary.
rank reproduction
    With 15 % masked, the gene of the largest logit is read off at EVERY position. A gene's predicted position is the
    first that names it; genes that no position names come last, tied. Spearman's correlation with the true order, over
    the K highest ranked genes of the cell (all of them where it has fewer); a cell with fewer than 10 genes, or whose
    predicted positions are all tied, has none. Coverage is the share of the K genes named anywhere. 85 % of
    the positions show their gene, so merely copying it scores high: read it beside :func:`copied`.

Shapes: M masked tokens, V tokens of the vocabulary, L tokens of a cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HITS_AT = (1, 10, 100)
"""Values of k in hits@k."""
TOPS = (100, 500, 2000)
"""Values of K in rank reproduction."""
MASKED = 0.15
"""Share of a cell's tokens that are masked."""
MIN_GENES = 10
"""Fewest genes of a cell for a rank correlation."""
_NAN = float("nan")
Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Judged:
    """Positions of the true genes of M masked tokens among the predictions.

    Attributes
    ----------
    genes
        True tokens, int [M].
    larger, equal
        Number of genes with a larger logit, and with an equal one (the true gene included), int [M].
    loss
        Cross-entropy of each token, float [M].
    """

    genes: Ints
    larger: Ints
    equal: Ints
    loss: NDArray[np.floating[Any]]

    def hits(self, k: int) -> NDArray[np.float64]:
        """Return the probability that the true gene is among the k largest, with ties in random order; [M]."""
        places = np.clip(k - self.larger.astype(np.float64), 0, self.equal)
        shares: NDArray[np.float64] = places / self.equal
        return shares


def choose_masked(length: int, rng: np.random.Generator, *, share: float = MASKED) -> NDArray[np.intp]:
    """Choose the positions to mask in a cell of `length` tokens: `share` of them, rounded, at least one; ascending."""
    count = min(max(round(share * length), 1), length)
    return np.sort(rng.permutation(length)[:count])


def judge(logits: NDArray[np.floating[Any]], truth: Ints, genes: Ints) -> Judged:
    """Rank the true genes of masked tokens.

    Parameters
    ----------
    logits
        Logits, [M, V]; minus infinity for an impossible token.
    truth
        True token of each row, one of `genes`, [M].
    genes
        Tokens that are genes.
    """
    logits = np.asarray(logits, dtype=np.float64)
    true_logits = np.take_along_axis(logits, np.asarray(truth)[:, None].astype(np.intp), axis=1)
    among = logits[:, np.asarray(genes)]
    largest = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(axis=1)) + largest[:, 0]
    return Judged(
        np.asarray(truth),
        (among > true_logits).sum(axis=1),
        (among == true_logits).sum(axis=1),
        total - true_logits[:, 0],
    )


class HitTally:
    """Sums over judged tokens, in a few numbers for each gene.

    Parameters
    ----------
    n_tokens
        Tokens of the vocabulary.
    hits_at
        Values of k in hits@k.
    """

    def __init__(self, n_tokens: int, hits_at: Sequence[int] = HITS_AT) -> None:
        self.hits_at = tuple(hits_at)
        self.instances = np.zeros(n_tokens, dtype=np.int64)
        self.hits = np.zeros((len(self.hits_at), n_tokens))
        self.losses = np.zeros(n_tokens)

    def add(self, judged: Judged) -> None:
        """Add some tokens."""
        np.add.at(self.instances, judged.genes, 1)
        np.add.at(self.losses, judged.genes, judged.loss)
        for row, k in zip(self.hits, self.hits_at, strict=True):
            np.add.at(row, judged.genes, judged.hits(k))

    @property
    def seen(self) -> NDArray[np.intp]:
        """Tokens of the genes that were masked at least once."""
        return np.flatnonzero(self.instances)

    def accuracy(self) -> NDArray[np.float64]:
        """Return the mean hit of each gene of :attr:`seen`, [number of k, number of genes]."""
        per_gene: NDArray[np.float64] = self.hits[:, self.seen] / self.instances[self.seen]
        return per_gene

    def summary(self) -> dict[str, float | int]:
        """Return ``macro_hits@k``, ``micro_hits@k``, ``cross_entropy``, ``perplexity``, ``instances``, ``genes``.

        Scores are NaN if no token was added.
        """
        n = int(self.instances.sum())
        values: dict[str, float | int] = {}
        macro, micro = self.accuracy(), self.hits.sum(axis=1)
        for i, k in enumerate(self.hits_at):
            values[f"macro_hits@{k}"] = float(macro[i].mean()) if n else _NAN
            values[f"micro_hits@{k}"] = float(micro[i] / n) if n else _NAN
        loss = float(self.losses.sum() / n) if n else _NAN
        return {
            **values,
            "cross_entropy": loss,
            "perplexity": float(np.exp(min(loss, 700.0))),
            "instances": n,
            "genes": len(self.seen),
        }


def rank_reproduction(truth: Ints, predicted: Ints, *, top: int) -> tuple[float, float]:
    """Compare the true and the predicted order of a cell's highest genes.

    Parameters
    ----------
    truth
        Genes of the cell by rank, each once, [L].
    predicted
        Gene predicted at each position, [L]; repeats are allowed, -1 stands for none.
    top
        K, the number of highest ranked genes that are compared.

    Returns
    -------
    Spearman's correlation (NaN for fewer than 10 genes, or if all predicted positions are tied), and the share of the
    genes that are predicted anywhere.
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    genes = truth[:top]
    named, first = np.unique(predicted, return_index=True)
    at = np.minimum(np.searchsorted(named, genes), len(named) - 1)
    is_named = named[at] == genes
    positions = np.where(is_named, first[at], len(predicted))
    coverage = float(is_named.mean()) if len(genes) else _NAN
    if len(genes) < MIN_GENES or np.ptp(positions) == 0:
        return _NAN, coverage
    ranks = _average_ranks(positions)
    return float(np.corrcoef(np.arange(len(genes)), ranks)[0, 1]), coverage


def copied(truth: Ints, masked: NDArray[np.intp]) -> Ints:
    """Return the predictions of a copier: the gene that is shown, and none (-1) at masked positions; [L]."""
    predicted = np.array(truth, dtype=np.int64)
    predicted[masked] = -1
    return predicted


class RankTally:
    """Sums of rank reproduction over cells."""

    def __init__(self, tops: Sequence[int] = TOPS) -> None:
        self.tops = tuple(tops)
        self.cells = 0
        self._sums = {top: np.zeros(4) for top in self.tops}

    def add(self, truth: Ints, predicted: Ints) -> None:
        """Add a cell; see :func:`rank_reproduction`."""
        self.cells += 1
        for top, sums in self._sums.items():
            rho, coverage = rank_reproduction(truth, predicted, top=top)
            defined = not np.isnan(rho)
            sums += (rho if defined else 0.0, defined, coverage, len(truth) >= top)

    def summary(self) -> dict[str, float | int]:
        """Return, for each K, the means ``spearman@K`` and ``coverage@K``, and the numbers ``cells@K`` and ``full@K``.

        ``cells@K`` counts the cells with a correlation, and ``full@K`` those with K genes; the others are compared
        over fewer.
        """
        values: dict[str, float | int] = {}
        for top, (rho, defined, coverage, full) in self._sums.items():
            values[f"spearman@{top}"] = rho / defined if defined else _NAN
            values[f"coverage@{top}"] = coverage / self.cells if self.cells else _NAN
            values[f"cells@{top}"] = int(defined)
            values[f"full@{top}"] = int(full)
        return values


class GeneFrequencies:
    """Counts of each gene at each rank, which predict genes without a model.

    Parameters
    ----------
    n_tokens
        Tokens of the vocabulary.
    genes
        Tokens that are genes.
    max_length
        Longest cell, in tokens.
    """

    SMOOTHING = 1000.0
    """Weight of the overall frequency, in tokens, that is added to the counts of each rank."""

    def __init__(self, n_tokens: int, genes: Ints, max_length: int) -> None:
        self.genes = np.asarray(genes)
        self.is_gene = np.isin(np.arange(n_tokens), self.genes)
        self.bins = np.floor(np.log2(np.arange(1, max_length + 1))).astype(np.intp)
        self.counts = np.zeros((int(self.bins.max()) + 1, n_tokens))

    def add(self, cells: Iterable[Ints]) -> GeneFrequencies:
        """Add cells, each as its genes by rank. Returns itself."""
        for tokens in cells:
            tokens = np.asarray(tokens)[: len(self.bins)]
            np.add.at(self.counts, (self.bins[: len(tokens)], tokens), 1)
        return self

    def overall(self) -> NDArray[np.float64]:
        """Return the log frequency of each gene, with one token added to each, [V]; minus infinity for other tokens."""
        counts = np.where(self.is_gene, self.counts.sum(axis=0) + 1.0, 0.0)
        return _log(counts / counts.sum())

    def by_rank(self) -> NDArray[np.float64]:
        """Return the log frequency of each gene at ranks from 2^i to 2^(i + 1) - 1, [i, V]."""
        counts = np.where(self.is_gene, self.counts, 0.0)
        mixed = counts + self.SMOOTHING * np.exp(self.overall())
        return _log(mixed / mixed.sum(axis=1, keepdims=True))

    def logits(self, truth: Ints, masked: NDArray[np.intp], table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return predictions for the masked positions of a cell, [M, V].

        `table` comes from :meth:`overall`, and is used as it is; or from :meth:`by_rank`, and the genes that the cell
        shows are then left out, since a gene stands in a cell once.
        """
        if table.ndim == 1:
            return np.broadcast_to(table, (len(masked), len(table)))
        rows = table[self.bins[np.minimum(masked, len(self.bins) - 1)]].copy()
        rows[:, np.delete(np.asarray(truth), masked)] = -np.inf
        return rows


def _log(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        logs: NDArray[np.float64] = np.log(shares)
    return logs


def _average_ranks(values: Ints) -> NDArray[np.float64]:
    """Return ranks from 0; ties share their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts + 1) / 2)[inverse]
    return ranks
