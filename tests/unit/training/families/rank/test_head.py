from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from training.families.rank.head import summed_cross_entropy

WORDS = 37


def case(n: int = 11, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(size, 8, generator=generator) for size in (n, WORDS))
    bias = torch.randn(WORDS, generator=generator)
    labels = torch.randint(WORDS, (n,), generator=generator)
    return states.to(dtype).requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


def plain(states: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = nn.functional.linear(states.float(), weight, bias)
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def assert_same(inputs: tuple[Tensor, ...], found: Tensor, *, rtol: float, atol: float, above: float = 1.0) -> None:
    expected = plain(*inputs)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    ours = torch.autograd.grad(found * above, inputs[:3])
    theirs = torch.autograd.grad(expected * above, inputs[:3])
    for one, two in zip(ours, theirs, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol * above)


@pytest.mark.parametrize("tokens", [1, 3, 11, 100])
def test_loss_and_gradients_are_those_of_all_logits_at_once(tokens: int) -> None:
    inputs = case()
    found = summed_cross_entropy(*inputs, piece=tokens * WORDS)
    assert_same(inputs, found, rtol=1e-5, atol=1e-5, above=0.25)


def test_a_piece_is_never_less_than_a_token() -> None:
    inputs = case()
    assert_same(inputs, summed_cross_entropy(*inputs, piece=1), rtol=1e-5, atol=1e-5)


def test_no_tokens_are_a_loss_of_zero_with_zero_gradients() -> None:
    inputs = case(0)
    found = summed_cross_entropy(*inputs)
    assert found.item() == 0.0
    gradients = torch.autograd.grad(found, inputs[:3])
    assert [tuple(gradient.shape) for gradient in gradients] == [(0, 8), (WORDS, 8), (WORDS,)]
    assert not any(bool(gradient.any()) for gradient in gradients)


def test_under_autocast_only_the_products_are_coarse() -> None:
    inputs = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = summed_cross_entropy(*inputs, piece=4 * WORDS)
    assert found.dtype == torch.float32
    assert_same(inputs, found, rtol=0.02, atol=0.05)


def test_float16_states_have_gradients_of_float32_precision() -> None:
    inputs = case(dtype=torch.float16)
    assert_same(inputs, summed_cross_entropy(*inputs), rtol=1e-3, atol=1e-4)


def test_extreme_logits_are_finite() -> None:
    states, weight, bias, labels = case()
    found = summed_cross_entropy(states * 1e3, weight, bias, labels)
    torch.testing.assert_close(found, plain(states * 1e3, weight, bias, labels), rtol=1e-5, atol=0)
    assert torch.isfinite(found)


def test_without_gradients_it_is_the_loss_alone() -> None:
    inputs = case()
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(*inputs), plain(*inputs))
