"""Dropout by the compiled operator: on all threads, and without a mask that is kept.

``torch.nn.functional.dropout`` draws its random numbers on one thread of a CPU, and keeps a mask of
the type of its input for the backward pass. Here random numbers are a function of a seed, which
comes from PyTorch's default generator, and the index of each element; the backward pass computes
them again. The result does not depend on the number of threads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ms_deform_attn import devices_with
from .precision import at_least_float32

_DEVICES = devices_with("dropout")


def dropout(x: Tensor, p: float, training: bool, residual: Tensor | None = None) -> Tensor:
    """Set elements to zero at random and divide the others by 1 - p, then add the residual.

    Args:
        x: any shape.
        p: probability of zero.
        training: otherwise nothing becomes zero.
        residual: what is added, of the same shape; or None.
    """
    types = (x.dtype, at_least_float32(x.dtype))
    if training and p > 0 and is_compiled_for(x) and (residual is None or residual.dtype in types):
        return _Dropout.apply(x, p, residual)
    x = F.dropout(x, p, training)
    return x if residual is None else residual + x


def is_compiled_for(x: Tensor) -> bool:
    """Whether the operator can be called: not where a graph is recorded, which has to run
    elsewhere too."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.device.type in _DEVICES
    )


def draw_seed() -> int:
    """A seed from PyTorch's default generator; those that follow it are as good."""
    return int(torch.randint(1 << 62, ()))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, residual: Tensor | None) -> Tensor:
        ctx.p, ctx.seed, ctx.dtype = p, draw_seed(), x.dtype
        return torch.ops.ddetr_d2.dropout(x, p, ctx.seed, residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.ddetr_d2.dropout(grad.to(ctx.dtype), ctx.p, ctx.seed)
        return grad_x, None, grad if ctx.needs_input_grad[2] else None
