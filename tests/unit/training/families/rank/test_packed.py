from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import TINY_MODEL, small_batch, small_model
from training.families.rank.masking import IGNORED, MaskedLM
from training.families.rank.packed import Layout, attend, can_pack, states

LENGTHS = (12, 7, 1, 12, 40)


def heads(lengths: tuple[int, ...], *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(sum(lengths), 2, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, asked: tuple[int, ...], lengths: tuple[int, ...]) -> Tensor:
    """Attention by its definition, in float64."""
    parts = []
    for q, k, v in zip(query.split(asked), key.split(lengths), value.split(lengths), strict=True):
        scores = torch.einsum("shd,thd->hst", q.double(), k.double()) / 4
        parts.append(torch.einsum("hst,thd->shd", scores.softmax(dim=-1), v.double()))
    return torch.cat(parts)


def padded_states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model.bert(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]


class TestLayout:
    def test_tokens_cell_by_cell(self) -> None:
        ids, mask = small_batch(lengths=(3, 1, 2))
        layout = Layout.of(mask)
        assert layout.lengths == (3, 1, 2)
        assert layout.pack(ids).tolist() == [*ids[0].tolist(), int(ids[1, 0]), *ids[2, :2].tolist()]
        selected = torch.tensor([True, False, True, False, False, True])
        assert layout.counts(selected) == (2, 0, 1)


class TestAttend:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=["float32", "bfloat16"]
    )
    @pytest.mark.parametrize("asked", [LENGTHS, (1, 0, 1, 12, 3)], ids=["all", "some"])
    def test_it_is_the_attention_of_each_cell(
        self, asked: tuple[int, ...], dtype: torch.dtype, tolerance: float
    ) -> None:
        query, key, value = heads(LENGTHS, dtype=dtype)
        query = query.detach()[: sum(asked)].requires_grad_()
        found = attend(query, key, value, asked, LENGTHS)
        assert found.dtype == dtype
        expected = one_by_one(query, key, value, asked, LENGTHS)
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
        above = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
        for one, two in zip(
            torch.autograd.grad(found, (query, key, value), above.to(dtype)),
            torch.autograd.grad(expected, (query, key, value), above.double()),
            strict=True,
        ):
            torch.testing.assert_close(one, two, atol=3 * tolerance, rtol=3 * tolerance)

    def test_long_cells_in_bfloat16(self) -> None:
        query, key, value = heads((1100, 5), dtype=torch.bfloat16)
        found = attend(query, key, value, (1100, 5), (1100, 5))
        expected = one_by_one(query, key, value, (1100, 5), (1100, 5))
        torch.testing.assert_close(found.double(), expected, atol=0.03, rtol=0.03)

    def test_dropout_is_of_the_generator(self) -> None:
        query, key, value = heads(LENGTHS)
        first, again, other = (_seeded(seed, query, key, value) for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def _seeded(seed: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    torch.manual_seed(seed)
    return attend(query, key, value, LENGTHS, LENGTHS, dropout=0.5)


class TestStates:
    def test_all_tokens(self) -> None:
        model: Any = small_model()
        ids, mask = small_batch(lengths=LENGTHS)
        found = states(model.bert.embeddings, model.bert.encoder.layer, ids, Layout.of(mask))
        torch.testing.assert_close(found, padded_states(model, ids, mask), atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
    def test_selected_tokens(self, share: float) -> None:
        model: Any = small_model()
        ids, mask = small_batch(lengths=LENGTHS)
        selected = torch.rand(int(mask.sum()), generator=torch.Generator().manual_seed(0)) < share
        found = states(model.bert.embeddings, model.bert.encoder.layer, ids, Layout.of(mask), selected=selected)
        torch.testing.assert_close(found, padded_states(model, ids, mask)[selected], atol=2e-5, rtol=1e-5)


class TestLoss:
    def test_it_is_the_loss_of_the_padded_form(self) -> None:
        """A model with eager attention gets the padded batch."""
        packed, padded = (
            MaskedLM(small_model(dataclasses.replace(TINY_MODEL, attention=name))) for name in ("sdpa", "eager")
        )
        ids, mask = small_batch(lengths=LENGTHS)
        labels = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3, ids, IGNORED)
        labels = labels.masked_fill(mask == 0, IGNORED)
        losses = [module(ids, mask, labels) for module in (packed, padded)]
        torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
        gradients = [
            torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True)
            for loss, module in zip(losses, (packed, padded), strict=True)
        ]
        for (name, _), one, two in zip(packed.named_parameters(), *gradients, strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4, msg=name)

    def test_in_bfloat16_it_is_within_its_rounding(self) -> None:
        module = MaskedLM(small_model(dataclasses.replace(TINY_MODEL, init_sd=0.05)))
        ids, mask = small_batch(lengths=LENGTHS)
        labels = ids.masked_fill(mask == 0, IGNORED)
        fine = module(ids, mask, labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            coarse = module(ids, mask, labels)
        assert coarse.item() == pytest.approx(fine.item(), rel=0.01)
        coarse.backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_eager_attention_and_devices_without_the_kernel_take_the_padded_way() -> None:
    model, eager = (small_model(dataclasses.replace(TINY_MODEL, attention=name)) for name in ("sdpa", "eager"))
    weight = next(model.parameters())
    assert can_pack(model.config, weight, training=True)
    assert not can_pack(model.config, weight.to("meta"), training=True)
    assert not can_pack(eager.config, weight, training=True)
