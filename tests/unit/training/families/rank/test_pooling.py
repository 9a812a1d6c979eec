from __future__ import annotations

import dataclasses

import torch

from tests.models import TINY_MODEL, small_batch, small_model
from training.families.rank.pooling import PooledEncoder, masked_mean


def by_definition(model, ids, mask):
    """Mean of hidden_states[-2] over each cell's tokens, cell by cell."""
    states = model.bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(states) == TINY_MODEL.layers + 1
    return torch.stack([cell[: int(n)].mean(dim=0) for cell, n in zip(states[-2], mask.sum(dim=1), strict=True)])


def test_is_the_mean_of_the_penultimate_state() -> None:
    model = small_model()
    ids, mask = small_batch()
    with torch.inference_mode():
        torch.testing.assert_close(PooledEncoder(model)(ids, mask), by_definition(model, ids, mask), atol=1e-6, rtol=0)


def test_sdpa_and_eager_attention_agree() -> None:
    ids, mask = small_batch()
    sdpa, eager = (
        PooledEncoder(small_model(dataclasses.replace(TINY_MODEL, attention=name))) for name in ("sdpa", "eager")
    )
    assert sdpa.config._attn_implementation == "sdpa"
    assert eager.config._attn_implementation == "eager"
    with torch.inference_mode():
        torch.testing.assert_close(sdpa(ids, mask), eager(ids, mask), atol=1e-5, rtol=0)


def test_parameters_leave_out_the_last_block_and_the_head() -> None:
    model = small_model()
    own = {id(parameter) for parameter in PooledEncoder(model).parameters()}
    left_out = {name for name, parameter in model.named_parameters() if id(parameter) not in own}
    expected = {
        name for name, _ in model.named_parameters() if name.startswith(("bert.encoder.layer.2.", "cls.predictions."))
    }
    assert left_out == expected


def test_every_parameter_gets_a_gradient() -> None:
    encoder = PooledEncoder(small_model())
    encoder(*small_batch()).square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_a_cell_is_the_same_alone_and_in_a_padded_batch() -> None:
    encoder = PooledEncoder(small_model())
    ids, mask = small_batch(lengths=(40, 7, 23))
    with torch.inference_mode():
        together = encoder(ids, mask)
        for cell, length in enumerate(mask.sum(dim=1).tolist()):
            alone = encoder(ids[cell : cell + 1, :length], mask[cell : cell + 1, :length])
            torch.testing.assert_close(alone[0], together[cell], atol=1e-5, rtol=0)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    encoder = PooledEncoder(small_model())
    ids, mask = small_batch()
    other = torch.where(mask > 0, ids, 33)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(ids, mask), encoder(other, mask), atol=1e-6, rtol=0)


def test_the_order_of_tokens_matters() -> None:
    encoder = PooledEncoder(small_model())
    ids, mask = small_batch(lengths=(12,))
    with torch.inference_mode():
        assert (encoder(ids, mask) - encoder(ids.flip(1), mask)).abs().max() > 1e-2


def test_half_precision_states_are_summed_in_float32() -> None:
    states = torch.full((1, 4096, 2), 30.0, dtype=torch.float16)
    pooled = masked_mean(states, torch.ones(1, 4096, dtype=torch.int64))
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == [[30.0, 30.0]]
