"""Linear layers and feed-forward networks, as they are fast in training on a CPU.

In float32, PyTorch's own linear layers multiply by its BLAS library; oneDNN, which PyTorch itself
uses for 16 bit types only, is faster. What autograd would keep, copy or compute apart, a
feed-forward network does by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import draw_seed, dropout, is_compiled_for
from .precision import at_least_float32

# Fewer rows are not worth the time that a function of autograd in Python takes.
_FEWEST_ROWS = 512
# Of a feed-forward network at a time: 8 MB of a hidden layer 1024 wide.
_PIECE_ROWS = 2048


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """What ``layer`` makes of ``x`` (..., C), differentiable once.

    The layer itself is called where that is as fast, or where it has been replaced by another.
    """
    if type(layer) is nn.Linear and trains_by_onednn(x, layer.weight) and has_many_rows(x):
        return _Linear.apply(x, layer.weight, layer.bias)
    return layer(x)


def two_linears(
    x: Tensor, position: Tensor | None, layer1: nn.Linear, layer2: nn.Linear
) -> tuple[Tensor, Tensor]:
    """:func:`linear` of two layers of a sum, which is not kept and whose gradients come as one.

    Args:
        x: (N, Q, C).
        position: (N or 1, Q, C), what is added; or None.
        layer1, layer2: from C to any widths.
    """
    if (
        type(layer1) is type(layer2) is nn.Linear
        and trains_by_onednn(x, layer1.weight)
        and has_many_rows(x)
        and layer2.weight.dtype == layer1.weight.dtype
    ):
        parameters = (layer1.weight, layer1.bias, layer2.weight, layer2.bias)
        return _TwoLinears.apply(x, position, *parameters)
    x = _with(position, x)
    return layer1(x), layer2(x)


def _with(position: Tensor | None, x: Tensor) -> Tensor:
    return x if position is None else x + position


def feed_forward(
    x: Tensor, linear1: nn.Linear, linear2: nn.Linear, p: float, training: bool
) -> Tensor:
    """``x + dropout(linear2(dropout(relu(linear1(x)))))`` for ``x`` (..., C), differentiable once.

    Args:
        x: (..., C).
        linear1, linear2: from C to the hidden width and back.
        p: probability of dropout.
        training: whether there is dropout.
    """
    p = p if training else 0.0
    # Other layers than these may have no weight, or one that takes time to make.
    if (
        type(linear1) is type(linear2) is nn.Linear
        and linear1.bias is not None
        and linear2.bias is not None
        and torch.is_grad_enabled()
        and (x.requires_grad or linear1.weight.requires_grad)
        and is_compiled_for(x)
        and has_many_rows(x)
    ):
        dtype = linear1.weight.dtype
        if torch.is_autocast_enabled("cpu") and x.dtype in (torch.float32, torch.bfloat16):
            dtype = torch.get_autocast_dtype("cpu")
        if x.dtype in (dtype, linear1.weight.dtype):
            parameters = (linear1.weight, linear1.bias, linear2.weight, linear2.bias)
            with torch.autocast("cpu", enabled=False):
                return _FeedForward.apply(x, *parameters, p, dtype)
    hidden = dropout(linear1(x).relu_(), p, training)
    return dropout(linear2(hidden), p, training, residual=x)


def trains_by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can be called: in float32, and where no graph is recorded."""
    return (
        torch.is_grad_enabled()
        and x.dtype == weight.dtype == torch.float32
        and is_compiled_for(x)
        and not torch.is_autocast_enabled("cpu")
        and _has_onednn()
    )


def has_many_rows(x: Tensor) -> bool:
    """Whether a product of ``x`` (..., C) is worth the time of a function in Python.

    Not to be asked where a graph is recorded, which would be for such sizes only.
    """
    return x.numel() >= _FEWEST_ROWS * x.shape[-1]


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``."""
    if x.dtype == torch.float32 and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def gradients_of_parameters(
    grad: Tensor, x: Tensor, bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Of weight (C', C) and bias: for ``grad`` (..., C') of the output and ``x`` (..., C)."""
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    return grad.t() @ x, grad.sum(0) if bias else None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = multiply(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        return grad_x, *gradients_of_parameters(grad, x, ctx.needs_input_grad[2])


class _TwoLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        position: Tensor | None,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, position, weight1, weight2)
        x = _with(position, x)
        return multiply(x, weight1, bias1), multiply(x, weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad1: Tensor, grad2: Tensor) -> tuple[Tensor | None, ...]:
        x, position, weight1, weight2 = ctx.saved_tensors
        grad1, grad2 = grad1.contiguous(), grad2.contiguous()
        grad_x = grad_position = None
        if any(ctx.needs_input_grad[:2]):
            part = multiply(grad1, weight1.t(), None)
            op = torch.ops.mkldnn._linear_pointwise.binary
            grad_x = op(grad2, part, weight2.t(), None, "add")
            if ctx.needs_input_grad[1]:
                grad_position = grad_x.sum_to_size(position.shape)
        x = _with(position, x)
        return (
            grad_x,
            grad_position,
            *gradients_of_parameters(grad1, x, ctx.needs_input_grad[3]),
            *gradients_of_parameters(grad2, x, ctx.needs_input_grad[5]),
        )


class _FeedForward(torch.autograd.Function):
    """In ``dtype``, but for the sum with ``x``. Some rows after the other, so that the hidden layer
    is in the cache for what comes next, and no tensor is so large that its memory comes anew from
    the system each time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        p: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.p, ctx.seed = p, draw_seed() if p > 0 else 0
        weight1, weight2 = weight1.to(dtype), weight2.to(dtype)
        bias1, bias2 = bias1.to(dtype), bias2.to(dtype)
        inputs, hiddens, outputs = [], [], []
        for index, residual in enumerate(_pieces(x)):
            piece = residual.to(dtype)
            hidden = multiply(piece, weight1, bias1)
            seed = ctx.seed + 2 * index
            torch.ops.ddetr_d2.dropout_(hidden, p, seed, None, True)
            output = multiply(hidden, weight2, bias2)
            outputs.append(torch.ops.ddetr_d2.dropout(output, p, seed + 1, residual))
            inputs.append(piece)
            hiddens.append(hidden)
        ctx.save_for_backward(weight1, weight2, *inputs, *hiddens)
        return torch.cat(outputs).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
        weight1, weight2, *pieces = ctx.saved_tensors
        half = len(pieces) // 2
        # Zeros of the hidden layer are those of ReLU and dropout; here is the scale of the others.
        scaled = (weight2 * (1 / (1 - ctx.p) if ctx.p < 1 else 0.0)).t()
        parameters, grads_x = [], []
        for index, (grad_output, x, hidden) in enumerate(
            zip(_pieces(grad_sum), pieces[:half], pieces[half:], strict=True)
        ):
            grad = grad_output.to(x.dtype)
            if ctx.p > 0:
                grad = torch.ops.ddetr_d2.dropout(grad, ctx.p, ctx.seed + 2 * index + 1)
            grads2 = gradients_of_parameters(grad, hidden)
            grad = multiply(grad, scaled, None)
            torch.ops.aten.threshold_backward.grad_input(grad, hidden, 0, grad_input=grad)
            parameters.append((*gradients_of_parameters(grad, x), *grads2))
            if ctx.needs_input_grad[0]:
                grads_x.append(multiply(grad, weight1.t(), None) + grad_output)
        grad_x = torch.cat(grads_x).view(grad_sum.shape) if grads_x else None
        return grad_x, *(_sum(parts) for parts in zip(*parameters, strict=True)), None, None


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return x.contiguous().flatten(0, -2).split(_PIECE_ROWS)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """At least in float32."""
    total = parts[0].to(at_least_float32(parts[0].dtype))
    for part in parts[1:]:
        total = total.add_(part) if total is not parts[0] else total + part
    return total
