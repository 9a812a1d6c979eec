"""Terms of the loss of a mixed batch.

Shapes: B cells, H hidden, K axes of the expression geometry, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.config.stages import MixedConfig
from training.objectives.losses import contrastive_loss
from training.objectives.mixed_sampler import UNLABELLED

FACTS = ("classes", "contexts", "is_control", "geometry")
"""Tensors of a batch that are not inputs of the encoder."""
_SELF = -1e9
"""Similarity of a cell with itself, or with a cell of another context; neither counts."""


def margin_term(unit: Tensor, batch: dict[str, Tensor], margin: float) -> Tensor | None:
    """Return the margin contrastive loss over all pairs of a batch; both kinds of pairs have the same weight.

    None if the batch has no pair of either kind.
    """
    is_control, contexts = batch["is_control"], batch["contexts"]
    first, second = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    same = contexts[first] == contexts[second]
    similar = same & is_control[first] & is_control[second]
    dissimilar = same & (is_control[first] != is_control[second])
    terms = []
    for pairs, y in ((similar, 1.0), (dissimilar, 0.0)):
        if pairs.any():
            squared = (unit[first[pairs]] - unit[second[pairs]]).square().sum(dim=1)
            terms.append(contrastive_loss(squared, torch.full_like(squared, y), margin=margin))
    return torch.stack(terms).mean() if terms else None


def supervised_contrastive_term(unit: Tensor, batch: dict[str, Tensor], temperature: float) -> Tensor | None:
    """Return the supervised contrastive loss (Khosla et al. 2020, L_out) of a batch; None if no class has a pair."""
    classes, contexts = batch["classes"], batch["contexts"]
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    similarity_BB = (unit @ unit.T / temperature).masked_fill(itself, _SELF)
    similarity_BB = similarity_BB.masked_fill(contexts[:, None] != contexts[None], _SELF)
    log_p_BB = similarity_BB - torch.logsumexp(similarity_BB, dim=1, keepdim=True)
    positive_BB = (classes[:, None] == classes[None]) & (classes[:, None] != UNLABELLED) & ~itself
    n_B = positive_BB.sum(dim=1)
    if not n_B.any():
        return None
    per_cell = -(log_p_BB * positive_BB).sum(dim=1)[n_B > 0] / n_B[n_B > 0]
    return per_cell.mean()


def info_nce_term(unit: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE (Oord et al. 2018) between two views of each cell, which hide different genes."""
    logits_BB = unit @ other.T / temperature
    truth = torch.arange(len(logits_BB), device=logits_BB.device)
    return (functional.cross_entropy(logits_BB, truth) + functional.cross_entropy(logits_BB.T, truth)) / 2


def geometry_term(centred: Tensor, geometry: Tensor) -> Tensor:
    """Return the relative squared difference of the cells' inner products in embedding and expression geometry.

    Both are centred and scaled to a mean squared norm of 1, so only the shape of the cloud of cells counts. The term is
    1 if the embedding carries no information on it and 0 if the embedding is a rotation of it.
    """
    truth_BK = geometry - geometry.mean(dim=0)
    truth_BK = truth_BK / truth_BK.square().sum(dim=1).mean().clamp_min(1e-12).sqrt()
    scaled_BH = centred / centred.square().sum(dim=1).mean().clamp_min(1e-12).sqrt()
    gram_BB = truth_BK @ truth_BK.T
    return (scaled_BH @ scaled_BH.T - gram_BB).square().sum() / gram_BB.square().sum().clamp_min(1e-12)


class MixedModule(nn.Module):
    """The weighted sum of the terms over an encoder of cells.

    Parameters
    ----------
    encoder
        Module from the inputs of a family by name to embeddings.
    config
        Weights of the terms.
    width
        Width of the embedding.
    n_classes
        Classes of the classification head, which is thrown away after training.
    """

    def __init__(self, encoder: nn.Module, config: MixedConfig, *, width: int, n_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self._config = config
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_classes)) if config.cross_entropy else None

    def forward(self, **batch: Tensor) -> Tensor:
        """Return the loss of a mixed batch; without ``classes`` in it, the embeddings.

        Parameters
        ----------
        **batch
            Inputs of the encoder for B cells (2B for two views), and the :data:`FACTS` on them: ``classes``,
            ``contexts``, ``is_control`` [B], ``geometry`` [B, K].
        """
        inputs = {name: tensor for name, tensor in batch.items() if name not in FACTS}
        embeddings: Tensor = self.encoder(**inputs)
        if "classes" not in batch:
            return embeddings
        config, n = self._config, len(batch["classes"])
        raw_BH = embeddings[:n].float()
        # Scores compare unit vectors, so that is what is trained; the mean cell, which no distance sees, is taken out.
        unit_BH = functional.normalize(raw_BH)
        mean_H = unit_BH.mean(dim=0).detach()
        centred_BH = unit_BH - unit_BH.mean(dim=0)
        sphere_BH = functional.normalize(unit_BH - mean_H)
        terms: list[tuple[float, Tensor | None]] = []
        if config.geometry:
            terms.append((config.geometry, geometry_term(centred_BH, batch["geometry"])))
        if config.margin_contrastive:
            terms.append((config.margin_contrastive, margin_term(sphere_BH, batch, config.margin)))
        if config.supervised_contrastive:
            terms.append(
                (config.supervised_contrastive, supervised_contrastive_term(sphere_BH, batch, config.temperature))
            )
        if config.info_nce:
            other_BH = functional.normalize(functional.normalize(embeddings[n:].float()) - mean_H)
            terms.append((config.info_nce, info_nce_term(sphere_BH, other_BH, config.temperature)))
        labelled = batch["classes"] != UNLABELLED
        if self.head is not None and bool(labelled.any()):
            logits = self.head(raw_BH[labelled])
            terms.append((config.cross_entropy, functional.cross_entropy(logits, batch["classes"][labelled])))
        # Every parameter must have a gradient on every process, also where no term applies to a batch.
        nothing = sum(parameter.sum() for parameter in self.parameters()) * 0.0
        return sum((weight * term for weight, term in terms if term is not None), start=torch.as_tensor(nothing))
