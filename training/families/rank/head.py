"""Cross-entropy over a large vocabulary in pieces, so that the logits of a batch never exist all at once.

1,200 masked tokens and 25,000 words make 125 MB of logits, which are written, read and copied some seven times between
the last hidden state and the gradient. A piece of them stays in the cache, its gradient is computed at once, and only
the gradients of states and weights are kept.

Shapes: M tokens, H hidden, V words, R tokens of a piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 2**23
"""Most logits of a piece: 32 MiB in float32."""


def summed_cross_entropy(states: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *, piece: int = PIECE) -> Tensor:
    """Return the sum over tokens of ``-log softmax(states @ weight.T + bias)[label]``, float32 scalar.

    Products run in the type of autocast if it is on, else in that of `states`; softmax and sums run in float32. float16
    is replaced by float32: shares of a word are too small for it before the loss is scaled.

    Parameters
    ----------
    states
        Hidden states, [M, H]; M may be 0.
    weight, bias
        Parameters of the head, [V, H] and [V].
    labels
        True word of each token, int64 [M].
    piece
        Most logits that exist at a time.
    """
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    if dtype == torch.float16:
        dtype = torch.float32
    with torch.autocast(kind, enabled=False):
        rows = max(1, piece // len(weight))
        total: Tensor = _Summed.apply(states, weight, bias, labels, dtype, rows)  # type: ignore[no-untyped-call]
    return total


class _Summed(torch.autograd.Function):
    """The sum, with a gradient that is computed along with it and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, dtype: torch.dtype, rows: int
    ) -> Tensor:
        weight_VH, bias_V = weight.to(dtype), bias.to(dtype)
        wanted = any(ctx.needs_input_grad[:3])
        by_state = torch.empty_like(states) if wanted else None
        by_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wanted else None
        by_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        rows = min(rows, len(states))
        logits = torch.empty(rows, len(weight), dtype=dtype, device=states.device)
        shares = torch.empty(rows, len(weight), dtype=torch.float32, device=states.device)
        for start in range(0, len(states), max(rows, 1)):
            piece = slice(start, start + rows)
            states_RH, labels_R1 = states[piece].to(dtype), labels[piece, None]
            logits_RV, shares_RV = logits[: len(labels_R1)], shares[: len(labels_R1)]
            torch.mm(states_RH, weight_VH.t(), out=logits_RV).add_(bias_V)
            largest_R1, true_R1 = logits_RV.amax(dim=1, keepdim=True).float(), logits_RV.gather(1, labels_R1).float()
            torch.softmax(logits_RV, dim=1, dtype=torch.float32, out=shares_RV)
            # The largest logit has the largest share, 1/V at least, so its logarithm is safe.
            total += (largest_R1 - shares_RV.amax(dim=1, keepdim=True).log() - true_R1).sum()
            if by_state is None or by_weight is None or by_bias is None:
                continue
            shares_RV.scatter_add_(1, labels_R1, torch.full_like(true_R1, -1.0))
            by_bias += shares_RV.sum(dim=0)
            if dtype == torch.float32:
                by_state[piece] = shares_RV @ weight_VH
                by_weight.addmm_(shares_RV.t(), states_RH)
            else:
                slope_RV = logits_RV.copy_(shares_RV)
                by_state[piece] = slope_RV @ weight_VH
                by_weight += slope_RV.t() @ states_RH
        if by_state is not None and by_weight is not None and by_bias is not None:
            ctx.save_for_backward(by_state, by_weight.to(weight.dtype), by_bias.to(bias.dtype))
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        by_state, by_weight, by_bias = ctx.saved_tensors
        return by_state * above, by_weight * above, by_bias * above, None, None, None
