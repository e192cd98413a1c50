"""Dense self-attention of queries in training on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import draw_seed, is_compiled_for
from .precision import at_least_float32


def self_attention(attention: nn.MultiheadAttention, query: Tensor, content: Tensor) -> Tensor:
    """``attention(query, query, content)`` without mask, its weights dropped as by :func:`dropout`.

    PyTorch's own draws the random numbers on one thread, and looks for rows without any key.

    Args:
        attention: with ``batch_first``.
        query: (N, Q, C), content and position, of queries and keys.
        content: (N, Q, C), of values.

    Returns:
        (N, Q, C)
    """
    if (
        not attention.training
        or attention.dropout == 0
        or type(attention) is not nn.MultiheadAttention
        or not is_compiled_for(query)
    ):
        return attention(query, query, content, need_weights=False)[0]
    width, heads = attention.embed_dim, attention.num_heads
    sizes = (2 * width, width)
    weights, biases = attention.in_proj_weight.split(sizes), attention.in_proj_bias.split(sizes)
    queries_and_keys = F.linear(query, weights[0], biases[0])
    values = F.linear(content, weights[1], biases[1])
    q, k, v = (
        x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (N, M, Q, D)
        for x in (*queries_and_keys.chunk(2, dim=-1), values)
    )
    logits = (q * (width // heads) ** -0.5) @ k.transpose(-2, -1)
    shares = logits.softmax(-1, dtype=at_least_float32(logits.dtype))
    output = _DropAndSum.apply(shares.to(v.dtype), v, attention.dropout)
    return attention.out_proj(output.transpose(1, 2).flatten(2))


class _DropAndSum(torch.autograd.Function):
    """``dropout(shares) @ values``; what is left of the shares is computed again when needed."""

    @staticmethod
    def forward(ctx: Any, shares: Tensor, values: Tensor, p: float) -> Tensor:
        ctx.p, ctx.seed = p, draw_seed()
        ctx.save_for_backward(shares, values)
        return torch.ops.ddetr_d2.dropout(shares, p, ctx.seed) @ values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shares, values = ctx.saved_tensors
        left = torch.ops.ddetr_d2.dropout(shares, ctx.p, ctx.seed)
        grad_left = grad @ values.transpose(-2, -1)
        grad_shares = torch.ops.ddetr_d2.dropout(grad_left, ctx.p, ctx.seed)
        return grad_shares, left.transpose(-2, -1) @ grad, None
