"""Evaluate pre-training: hits@k, perplexity and rank reproduction of a checkpoint on cells it was not trained on.

The definitions are in :mod:`training.measure.mlm`. With the corpus that the model was trained on, predictors that know
only the frequency of a gene at a rank are scored beside the model.

Shapes: B cells in the batch, L tokens, H hidden, M masked tokens, V vocabulary, R rows of logits held at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perturbscope.errors import ProviderUnavailableError
from perturbscope.families import load_family
from perturbscope.families.tokens import pad
from training import families
from training.checkpoint import Checkpoint
from training.data.batches import gene_tokens
from training.data.shards import Corpus
from training.families import Batch, Restorer
from training.measure.mlm import GeneFrequencies, HitTally, Judged, RankTally, choose_masked, copied, judge
from training.measure.unseen import EvaluateOptions, Heldout, gene_tokens_by_rank

LOGIT_VALUES = 16_000_000
"""Most logits in memory (64 MB of float32, a few times over)."""
Progress = Callable[[str, int, int], None]


@dataclass(eq=False)
class Tallies:
    """Scores of one predictor."""

    hits: HitTally
    ranks: RankTally | None = None

    def summary(self) -> dict[str, float | int]:
        """Return the summaries of hits and ranks together."""
        return self.hits.summary() | (self.ranks.summary() if self.ranks else {})


def evaluate(
    checkpoint: Checkpoint,
    heldout: Heldout,
    *,
    options: EvaluateOptions,
    frequencies: GeneFrequencies | None = None,
    progress: Progress | None = None,
) -> dict[str, Tallies]:
    """Score the model, and predictors without a model, on the cells of a file.

    Parameters
    ----------
    checkpoint
        Pre-trained model.
    heldout
        Cells to score; see :func:`training.measure.unseen.read_heldout`.
    options
        Masks, batch and device.
    frequencies
        Gene frequencies of the training corpus; without them the frequency baselines are left out.
    progress
        Called as ``progress(name, done, total)``, in cells.

    Returns
    -------
    Scores of ``model``; of ``copy``, which copies the shown genes (rank reproduction); and of ``frequency`` and
    ``frequency at rank`` (hits).

    Raises
    ------
    UnsupportedBundleError
        The model cannot restore genes.
    ProviderUnavailableError
        Torch finds no CUDA device.
    """
    half = families.load(checkpoint.family)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ProviderUnavailableError("No CUDA device is available to torch. Use device cpu.", field="device")
    vocabulary = checkpoint.vocabulary
    genes, n_tokens = np.asarray(vocabulary.tokens), len(vocabulary)
    tallies = {"model": Tallies(HitTally(n_tokens), RankTally()), "copy": Tallies(HitTally(n_tokens), RankTally())}
    tables: dict[str, NDArray[np.float64]] = {}
    if frequencies is not None:
        tables = {"frequency": frequencies.overall(), "frequency at rank": frequencies.by_rank()}
        tallies |= {name: Tallies(HitTally(n_tokens)) for name in tables}
    family = load_family(checkpoint.family, checkpoint.family_config, vocabulary)
    model = checkpoint.model().to(options.device)
    head = _Head(half.restorer(model, family=family), genes, n_tokens, options.device)
    order = np.argsort([-len(tokens) for tokens in heldout.tokens], kind="stable")
    for start in range(0, len(order), options.batch):
        batch = order[start : start + options.batch].tolist()
        cells = [heldout.tokens[i] for i in batch]
        masks = [
            choose_masked(
                len(heldout.tokens[i]),
                np.random.default_rng([options.seed, heldout.rows[i]]),
                share=options.mask_probability,
            )
            for i in batch
        ]
        padded = pad(heldout.inputs, np.asarray(batch), family.inputs)
        inputs = {name: torch.from_numpy(array) for name, array in padded.items()}
        is_gene = gene_tokens(inputs, family) >= 0
        judged, predicted = head.run(inputs, is_gene, cells, masks)
        tallies["model"].hits.add(judged)
        for tokens, masked, guess in zip(cells, masks, predicted, strict=True):
            _ranks(tallies["model"]).add(tokens, guess)
            _ranks(tallies["copy"]).add(tokens, copied(tokens, masked))
            for name, table in tables.items():
                assert frequencies is not None  # noqa: S101, tables come from it
                logits = frequencies.logits(tokens, masked, table)
                tallies[name].hits.add(judge(logits, tokens[masked], genes))
        if progress:
            progress(heldout.name, start + len(batch), len(order))
    return tallies


def corpus_frequencies(corpus: Corpus, max_length: int, *, block: int = 2048) -> GeneFrequencies:
    """Count how often each gene stands at which rank in a corpus."""
    frequencies = GeneFrequencies(len(corpus.vocabulary), corpus.vocabulary.tokens, max_length)
    for start in range(0, len(corpus), block):
        cells = corpus.cells(np.arange(start, min(start + block, len(corpus))))
        frequencies.add(gene_tokens_by_rank(cells, corpus.family))
    return frequencies


class _Head:
    """The head of the model, applied to a bounded number of logits at a time."""

    def __init__(self, restorer: Restorer, genes: NDArray[Any], n_tokens: int, device: str) -> None:
        self._restorer = restorer
        self._device = device
        special = np.setdiff1d(np.arange(n_tokens), genes)
        self.special = torch.from_numpy(special).to(device)
        self.rows = max(1, LOGIT_VALUES // n_tokens)

    @torch.inference_mode()
    def run(
        self, inputs: Batch, is_gene: Tensor, cells: list[NDArray[np.int64]], masks: list[NDArray[np.intp]]
    ) -> tuple[Judged, list[NDArray[np.int64]]]:
        """Return the judged masked genes of a batch, and the best gene at the place of every gene of each cell.

        `is_gene`, bool [B, L], tells the places of the genes, and `masks` which of a cell's genes are masked.
        """
        masked_BL = torch.zeros_like(is_gene)
        for row, mask in enumerate(masks):
            masked_BL[row, is_gene[row].nonzero().squeeze(1)[torch.from_numpy(mask)]] = True
        hidden = {name: tensor.to(self._device) for name, tensor in self._restorer.hide(inputs, masked_BL).items()}
        states = self._restorer.states(hidden)[is_gene.to(self._device)]
        truth = torch.from_numpy(np.concatenate(cells)).to(states.device)
        lengths = [len(tokens) for tokens in cells]
        starts = np.cumsum([0, *lengths[:-1]])
        masked = np.zeros(len(truth), dtype=bool)
        masked[np.concatenate([start + mask for start, mask in zip(starts, masks, strict=True)])] = True
        best, parts = [], []
        for start in range(0, len(states), self.rows):
            rows = slice(start, start + self.rows)
            logits_RV = self._restorer.logits(states[rows]).float()
            at = torch.from_numpy(np.flatnonzero(masked[rows])).to(states.device)
            own = truth[rows][at]
            loss = nn.functional.cross_entropy(logits_RV[at], own, reduction="none")
            logits_RV[:, self.special] = -torch.inf
            best.append(logits_RV.argmax(dim=1))
            logits_MV = logits_RV[at]
            value = logits_MV.gather(1, own[:, None])
            larger, equal = (logits_MV > value).sum(dim=1), (logits_MV == value).sum(dim=1)
            parts.append([item.cpu().numpy() for item in (own, larger, equal, loss)])
        genes, larger_n, equal_n, losses = (np.concatenate(column) for column in zip(*parts, strict=True))
        predicted = torch.cat(best).cpu().numpy()
        return Judged(genes, larger_n, equal_n, losses), np.split(predicted, np.cumsum(lengths)[:-1])


def _ranks(tallies: Tallies) -> RankTally:
    assert tallies.ranks is not None  # noqa: S101, the model and the copier have one
    return tallies.ranks
