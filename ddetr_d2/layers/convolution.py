"""Convolutions with scaled weights, as they are fast in training on a CPU."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import gradients_of_parameters, has_many_rows, multiply, trains_by_onednn

Pair = tuple[int, int]


def scaled_convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """A convolution whose weights are multiplied by a constant, differentiable once.

    The scaled weights, of which autograd would keep a copy, are computed again in the backward
    pass. On one thread PyTorch's own 1x1 convolutions multiply by its BLAS library; oneDNN is
    faster.

    Args:
        x: (N, C, H, W).
        weight: (C', C / groups, h, w).
        scale: (C',), which gets no gradient.
        bias: (C',).
        stride, padding, dilation: of height and width.
        groups: of channels.

    Returns:
        (N, C', H', W')
    """
    arguments = (stride, padding, dilation, groups)
    if trains_by_onednn(x, weight):
        return _ScaledConvolution.apply(x, weight, scale, bias, *arguments)
    return F.conv2d(x, weight * scale[:, None, None, None], bias, *arguments)


class _ScaledConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.arguments = stride, padding, dilation, groups
        # A 1x1 convolution is a product, too, but its output would be a view of another tensor,
        # which could not be changed in place without a copy of its gradient.
        return torch.ops.aten.mkldnn_convolution(
            x, weight * scale[:, None, None, None], bias, padding, stride, dilation, groups
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        scale = scale[:, None, None, None]
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        if _is_product(x, weight, *ctx.arguments):
            grads = _gradients_of_product(grad, x, weight * scale, wanted)
        else:
            stride, padding, dilation, groups = ctx.arguments
            grads = torch.ops.aten.convolution_backward(
                grad, x, weight * scale, [len(weight)], stride, padding, dilation, False, [0, 0],
                groups, wanted,
            )  # fmt: skip
        grad_x, grad_weight, grad_bias = grads
        if grad_weight is not None:
            grad_weight = grad_weight * scale
        return grad_x, grad_weight, None, grad_bias, None, None, None, None


def _is_product(
    x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> bool:
    rows = x.permute(0, 2, 3, 1)
    return (
        weight.shape[2:] == (1, 1) == stride
        and padding == (0, 0)
        and groups == 1
        and rows.is_contiguous()
        and has_many_rows(rows)
    )


def _gradients_of_product(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    grad = grad.permute(0, 2, 3, 1).contiguous()
    grad_x = grad_weight = grad_bias = None
    if wanted[0]:
        grad_x = multiply(grad, weight.flatten(1).t(), None).permute(0, 3, 1, 2)
    if wanted[1] or wanted[2]:  # of frozen weights the bias may be trained
        rows = x.permute(0, 2, 3, 1)
        grad_weight, grad_bias = gradients_of_parameters(grad, rows, bias=wanted[2])
        grad_weight = grad_weight.view_as(weight)
    return grad_x, grad_weight, grad_bias
