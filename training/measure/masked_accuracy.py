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

from perturbscope.errors import ProviderUnavailableError, UnsupportedBundleError
from training.checkpoint import Checkpoint
from training.data.shards import Corpus
from training.measure.mlm import GeneFrequencies, HitTally, Judged, RankTally, choose_masked, copied, judge
from training.measure.unseen import EvaluateOptions, Heldout

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
        The family has no head over genes that this module knows.
    ProviderUnavailableError
        Torch finds no CUDA device.
    """
    if checkpoint.family != "rank":
        raise UnsupportedBundleError(
            f"Masked evaluation knows the family 'rank', and this checkpoint is of {checkpoint.family!r}.",
            field="family",
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ProviderUnavailableError("No CUDA device is available to torch. Use device cpu.", field="device")
    vocabulary = checkpoint.vocabulary
    genes, n_tokens = np.asarray(vocabulary.tokens), len(vocabulary)
    tallies = {"model": Tallies(HitTally(n_tokens), RankTally()), "copy": Tallies(HitTally(n_tokens), RankTally())}
    tables: dict[str, NDArray[np.float64]] = {}
    if frequencies is not None:
        tables = {"frequency": frequencies.overall(), "frequency at rank": frequencies.by_rank()}
        tallies |= {name: Tallies(HitTally(n_tokens)) for name in tables}
    model = checkpoint.model(attention="sdpa").to(options.device)
    head = _Head(model, genes, n_tokens, options.device)
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
        ids, attention = _padded(cells, masks, vocabulary.special_tokens["<pad>"], vocabulary.special_tokens["<mask>"])
        judged, predicted = head.run(ids.to(options.device), attention.to(options.device), cells, masks)
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
        frequencies.add(cell["input_ids"] for cell in cells)
    return frequencies


class _Head:
    """The head of the model, applied to a bounded number of logits at a time."""

    def __init__(self, model: nn.Module, genes: NDArray[Any], n_tokens: int, device: str) -> None:
        self.model: Any = model
        special = np.setdiff1d(np.arange(n_tokens), genes)
        self.special = torch.from_numpy(special).to(device)
        self.rows = max(1, LOGIT_VALUES // n_tokens)

    @torch.inference_mode()
    def run(
        self, input_ids: Tensor, attention_mask: Tensor, cells: list[NDArray[np.int64]], masks: list[NDArray[np.intp]]
    ) -> tuple[Judged, list[NDArray[np.int64]]]:
        """Return the judged masked tokens of a batch [B, L], and the best gene at every position of each cell."""
        hidden_BLH = self.model.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        states = hidden_BLH[attention_mask.bool()]
        truth = torch.from_numpy(np.concatenate(cells)).to(states.device)
        lengths = [len(tokens) for tokens in cells]
        starts = np.cumsum([0, *lengths[:-1]])
        masked = np.zeros(len(truth), dtype=bool)
        masked[np.concatenate([start + mask for start, mask in zip(starts, masks, strict=True)])] = True
        best, parts = [], []
        for start in range(0, len(states), self.rows):
            rows = slice(start, start + self.rows)
            logits_RV = self.model.cls(states[rows]).float()
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


def _padded(
    cells: list[NDArray[np.int64]], masks: list[NDArray[np.intp]], pad: int, mask: int
) -> tuple[Tensor, Tensor]:
    """Return masked ids and attention mask, int64 [B, L]."""
    ids = np.full((len(cells), max(map(len, cells))), pad, dtype=np.int64)
    attention = np.zeros_like(ids)
    for row, (tokens, masked) in enumerate(zip(cells, masks, strict=True)):
        ids[row, : len(tokens)] = tokens
        ids[row, masked] = mask
        attention[row, : len(tokens)] = 1
    return torch.from_numpy(ids), torch.from_numpy(attention)
