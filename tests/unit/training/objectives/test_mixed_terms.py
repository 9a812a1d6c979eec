"""Terms of the loss of a mixed batch, against values worked by hand and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbscope.errors import InvalidParameterError
from training.config.stages import MixedConfig, PanelConfig
from training.objectives.mixed_sampler import UNLABELLED
from training.objectives.mixed_terms import (
    MixedModule,
    geometry_term,
    info_nce_term,
    margin_term,
    supervised_contrastive_term,
)


def unit(n: int = 8, width: int = 5, seed: int = 0) -> Tensor:
    vectors = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(vectors)


LABELS = {
    "classes": torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
    "contexts": torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]),
    "is_control": torch.tensor([True, True, False, False, False, False, True, False]),
}


def test_the_margin_term_pairs_within_a_context() -> None:
    vectors = unit()
    distance = torch.cdist(vectors, vectors).numpy()
    similar = distance[0, 1] ** 2
    apart = [(0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3), (1, 4), (1, 5), (6, 7)]
    dissimilar = np.mean([max(0.0, 1.2 - distance[pair]) ** 2 for pair in apart])
    found = margin_term(vectors, LABELS, 1.2)
    assert found is not None
    assert found.item() == pytest.approx((similar + dissimilar) / 2, rel=1e-6)


def test_a_batch_without_pairs_has_no_margin_term() -> None:
    labels = {**LABELS, "is_control": torch.zeros(8, dtype=torch.bool)}
    assert margin_term(unit(), labels, 1.0) is None


def test_supervised_contrastive_is_the_published_formula() -> None:
    vectors, temperature = unit(), 0.5
    similarity = (vectors @ vectors.T / temperature).numpy()
    contexts, classes = LABELS["contexts"].numpy(), LABELS["classes"].numpy()
    losses = []
    for i in range(8):
        others = [j for j in range(8) if j != i and contexts[j] == contexts[i]]
        positives = [j for j in others if classes[j] == classes[i]]
        denominator = np.log(np.exp(similarity[i, others]).sum())
        losses.append(-np.mean([similarity[i, j] - denominator for j in positives]))
    found = supervised_contrastive_term(vectors, LABELS, temperature)
    assert found is not None
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_cells_without_a_class_attract_nothing() -> None:
    labels = {**LABELS, "classes": torch.full((8,), UNLABELLED)}
    assert supervised_contrastive_term(unit(), labels, 0.1) is None


def test_info_nce_is_small_only_where_views_match() -> None:
    vectors = unit(n=6, width=32)
    assert info_nce_term(vectors, vectors, 0.05).item() < 0.01
    assert info_nce_term(vectors, vectors.roll(1, dims=0), 0.05).item() > 1


def test_geometry_counts_shape_only() -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(20, 6, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    moved = 3.0 * (cells @ rotation) + 7.0
    assert geometry_term(cells - cells.mean(dim=0), moved).item() == pytest.approx(0, abs=1e-6)
    unrelated = torch.randn(20, 6, generator=generator)
    assert geometry_term(cells - cells.mean(dim=0), unrelated).item() > 0.5


def test_a_constant_embedding_scores_one_and_has_a_finite_gradient() -> None:
    cells = torch.zeros(10, 4, requires_grad=True)
    loss = geometry_term(cells, torch.randn(10, 3, generator=torch.Generator().manual_seed(1)))
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    assert cells.grad is not None
    assert torch.isfinite(cells.grad).all()


class Table(nn.Module):
    """An encoder that looks the first token up."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(10, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.rows(input_ids[:, 0])
        return found


def full_batch(views: int = 1) -> dict[str, Tensor]:
    ids = torch.arange(8).repeat(views)[:, None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **LABELS,
        "geometry": torch.randn(8, 3, generator=torch.Generator().manual_seed(2)),
    }


def test_the_module_adds_the_weighted_terms_and_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    config = MixedConfig(geometry=1.0, margin_contrastive=0.5, supervised_contrastive=0.25, cross_entropy=2.0)
    module = MixedModule(Table(), config, width=4, n_classes=4)
    total = module(**full_batch())
    total.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    parts = []
    for name in ("geometry", "margin_contrastive", "supervised_contrastive", "cross_entropy"):
        alone = MixedModule(module.encoder, MixedConfig(**{name: getattr(config, name)}), width=4, n_classes=4)
        alone.head = module.head if name == "cross_entropy" else None
        parts.append(alone(**full_batch()).item())
    assert total.item() == pytest.approx(sum(parts), rel=1e-5)


def test_an_unlabelled_batch_has_a_loss_and_no_gradient_for_the_head() -> None:
    torch.manual_seed(0)
    module = MixedModule(Table(), MixedConfig(cross_entropy=1.0), width=4, n_classes=4)
    loss = module(**{**full_batch(), "classes": torch.full((8,), UNLABELLED)})
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def test_without_classes_the_module_embeds() -> None:
    module = MixedModule(Table(), MixedConfig(geometry=1.0), width=4, n_classes=1)
    ids = torch.arange(3)[:, None]
    assert torch.equal(module(input_ids=ids, attention_mask=torch.ones_like(ids)), module.encoder.rows.weight[:3])


def test_two_views_share_the_terms_of_labels() -> None:
    torch.manual_seed(0)
    config = MixedConfig(info_nce=1.0, panel=PanelConfig(share=1.0))
    module = MixedModule(Table(), config, width=4, n_classes=4)
    assert module(**full_batch(views=2)).item() < np.log(8)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "No term has a weight"),
        ({"geometry": -1.0}, "geometry"),
        ({"margin_contrastive": 1.0, "margin": 3.0}, "margin"),
        ({"info_nce": 1.0}, "two views"),
        ({"geometry": 1.0, "weights": {"a": 0.0}}, "weights.a"),
    ],
)
def test_bad_weights_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        MixedConfig(**values)  # type: ignore[arg-type]
