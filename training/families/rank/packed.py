"""BERT blocks over cells laid end to end, without padding.

Dense layers see all tokens as one matrix, and attention sees each cell apart. The results are those of the padded
batch, and the weights are those of the model's own modules. Blocks of transformers take padded batches, which cost the
padding and a mask that keeps torch from its fastest kernels.

Shapes: B cells, L tokens of the longest, T tokens of all cells together, H hidden, h heads, d = H / h, S tokens
selected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SHORT = 1024
"""Longest cell whose attention in bfloat16 on a CPU is a plain product: its scores fit into the cache, and the fused
kernel of torch runs at half the rate of the products."""


@dataclass(frozen=True)
class Layout:
    """Places of the tokens of a padded batch that is laid end to end.

    Attributes
    ----------
    places
        Place of each token in the flattened padded batch, int64 [T].
    lengths
        Tokens of each cell.
    """

    places: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, attention_mask: Tensor) -> Layout:
        """Return the layout of an attention mask [B, L]."""
        lengths = tuple(attention_mask.sum(dim=1).tolist())
        return cls(places=attention_mask.flatten().nonzero().squeeze(1), lengths=lengths)

    def pack(self, values: Tensor) -> Tensor:
        """Lay values [B, L] end to end, [T]."""
        return values.flatten()[self.places]

    def counts(self, selected: Tensor) -> tuple[int, ...]:
        """Return how many tokens of each cell are among `selected`, bool [T]."""
        owners = torch.repeat_interleave(torch.tensor(self.lengths, device=selected.device))[selected]
        return tuple(torch.bincount(owners, minlength=len(self.lengths)).tolist())


def can_pack(config: Any, weight: Tensor, *, training: bool) -> bool:
    """Return whether :func:`states` is faster than the padded batch.

    On a CPU it is. On a GPU it needs the kernel for ragged attention (:func:`ragged_kernel`) and a type that the kernel
    takes; cell by cell, a GPU would wait for its launches. A model that asks for eager attention gets it. `weight` is
    any weight of the model; its device counts and, if autocast is off, its type.
    """
    if config._attn_implementation != "sdpa":
        return False
    device = weight.device
    if device.type != "cuda":
        return device.type == "cpu"
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
    dropout = config.attention_probs_dropout_prob if training else 0.0
    return _is_ragged(device, dtype, dropout)


def states(
    embeddings: Any,
    blocks: Any,
    input_ids: Tensor,
    layout: Layout,
    *,
    selected: Tensor | None = None,
) -> Tensor:
    """Compute the hidden states after the last of `blocks`.

    Parameters
    ----------
    embeddings, blocks
        ``BertEmbeddings`` and ``BertLayer`` modules.
    input_ids
        Padded batch, int64 [B, L].
    layout
        Layout of the batch.
    selected
        Tokens whose states are wanted, bool [T]; all by default. The last block then computes queries, mixtures and
        dense layers for these tokens alone.

    Returns
    -------
    States, [T, H]; [S, H] of the selected tokens.
    """
    positions = layout.places % input_ids.shape[1]
    hidden_TH: Tensor = embeddings(input_ids=layout.pack(input_ids)[None], position_ids=positions[None])[0]
    for block in blocks[:-1]:
        hidden_TH = _block(block, hidden_TH, layout.lengths)
    if selected is None:
        return _block(blocks[-1], hidden_TH, layout.lengths)
    return _block(blocks[-1], hidden_TH, layout.lengths, selected.nonzero().squeeze(1), layout.counts(selected))


def _block(
    block: Any,
    hidden: Tensor,
    lengths: Sequence[int],
    rows: Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Compute a post-LN block on [T, H], at all tokens or at `rows`, of which each cell has `counts`."""
    attention = block.attention.self
    asking = hidden if rows is None else hidden[rows]
    heads = (-1, attention.num_attention_heads, attention.attention_head_size)
    mixed = attend(
        attention.query(asking).view(heads),
        attention.key(hidden).view(heads),
        attention.value(hidden).view(heads),
        counts or lengths,
        lengths,
        dropout=attention.dropout.p if attention.training else 0.0,
    )
    attended: Tensor = block.attention.output(mixed.flatten(1), asking)
    result: Tensor = block.output(block.intermediate(attended), attended)
    return result


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    asked: Sequence[int],
    lengths: Sequence[int],
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Compute scaled dot-product attention within each of several cells laid end to end.

    Parameters
    ----------
    query
        Queries, [S, h, d].
    key, value
        Keys and values, [T, h, d].
    asked
        Number of queries of each cell; they add up to S.
    lengths
        Number of tokens of each cell; they add up to T.
    dropout
        Dropout of the attention weights.

    Returns
    -------
    Mixtures of the values, [S, h, d].
    """
    if max(asked) and _is_ragged(query.device, query.dtype, dropout):
        kernel = ragged_kernel()
        assert kernel is not None  # noqa: S101  _is_ragged says so
        ends = (_ends(asked, query.device), _ends(lengths, query.device))
        mixed: Tensor = kernel(query, key, value, *ends, max(asked), max(lengths))
        return mixed
    parts = zip(
        torch.split(query, list(asked)),
        torch.split(key, list(lengths)),
        torch.split(value, list(lengths)),
        strict=True,
    )
    return torch.cat([_attend_one(q, k, v, dropout) for q, k, v in parts])


def _attend_one(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Compute attention of one cell: [S, h, d] from queries [S, h, d] and from keys and values [T, h, d]."""
    if not len(query):
        return query + key[:0] + value[:0]  # empty, but every weight gets a gradient, which is zero
    q, k, v = (part.transpose(0, 1) for part in (query, key, value))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not dropout and len(key) <= _SHORT:
        weights = torch.softmax(torch.matmul(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5, dim=-1)
        return torch.matmul(weights, v).transpose(0, 1)
    mixed = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], dropout_p=dropout)
    return mixed[0].transpose(0, 1)


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    return nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)


@functools.cache
def ragged_kernel() -> Callable[..., Any] | None:
    """Return torch's attention over cells laid end to end (torch 2.10 and later, CUDA only), or None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    kernel: Callable[..., Any] = varlen_attn
    return kernel


def _is_ragged(device: torch.device, dtype: torch.dtype, dropout: float) -> bool:
    """Return whether :func:`ragged_kernel` can run: it needs half precision, Ampere or later, and no dropout."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or dropout or ragged_kernel() is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
