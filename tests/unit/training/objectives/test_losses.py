from __future__ import annotations

import pytest
import torch
from torch import nn

from training.config.stages import LossConfig
from training.objectives.losses import ContrastiveModule, contrastive_loss, squared_distances


def loss_of(similar: float, distance: float, **options: float | bool) -> float:
    squared = torch.tensor([distance**2])
    return float(contrastive_loss(squared, torch.tensor([similar]), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("similar", "distance", "expected"),
    [(1.0, 3.0, 9.0), (0.0, 5.0, 225.0), (0.0, 25.0, 0.0)],
    ids=["similar pair", "dissimilar pair inside the margin", "dissimilar pair beyond it"],
)
def test_values_worked_by_hand(similar: float, distance: float, expected: float) -> None:
    assert loss_of(similar, distance, margin=20.0) == pytest.approx(expected, abs=1e-4)


def test_variants() -> None:
    assert loss_of(1.0, 3.0, half=True) == pytest.approx(4.5)
    assert loss_of(0.0, 5.0, half=True) == pytest.approx(112.5)
    assert loss_of(0.0, 5.0, squared_hinge=False) == pytest.approx(15.0)
    assert loss_of(0.0, 1.5, margin=2.0) == pytest.approx(0.25)


def test_the_loss_is_the_mean_over_pairs() -> None:
    squared = torch.tensor([9.0, 25.0, 625.0])
    assert float(contrastive_loss(squared, torch.tensor([1.0, 0.0, 0.0]))) == pytest.approx((9 + 225) / 3, abs=1e-4)


@pytest.mark.parametrize("similar", [0.0, 1.0])
def test_the_gradient_is_finite_where_both_cells_are_equal(similar: float) -> None:
    first = torch.ones(1, 4, requires_grad=True)
    second = torch.ones(1, 4, requires_grad=True)
    contrastive_loss(squared_distances(first, second), torch.tensor([similar])).backward()
    assert first.grad is not None
    assert torch.isfinite(first.grad).all()


def test_distances_are_euclidean_and_can_be_of_unit_vectors() -> None:
    first, second = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert float(squared_distances(first, second)) == pytest.approx(25.0)
    assert float(squared_distances(first, second, normalize=True)) == pytest.approx(2.0)


class Lookup(nn.Module):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return input_ids.float() * attention_mask


def test_the_module_pairs_the_first_half_with_the_second() -> None:
    module = ContrastiveModule(Lookup(), LossConfig(margin=10.0))
    ids = torch.tensor([[0, 0], [1, 1], [3, 4], [1, 1]])
    mask = torch.ones_like(ids)
    similar = torch.tensor([1.0, 1.0])
    assert float(module(similar=similar, input_ids=ids, attention_mask=mask)) == pytest.approx(25 / 2)
    assert float(module(similar=1 - similar, input_ids=ids, attention_mask=mask)) == pytest.approx(
        (25 + 100) / 2, abs=1e-3
    )
    assert module(input_ids=ids, attention_mask=mask).tolist() == ids.tolist()
