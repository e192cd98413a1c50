"""Convolutions with frozen batch normalisation, as they are fast in training."""

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from ..layers import scaled_convolution


class FrozenNormConv2d(Conv2d):
    """Detectron2's convolution with a :class:`FrozenBatchNorm2d` that scales the weights, which are
    fewer than the pixels. Gradients go through the scaled weights to those of the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        norm = self.norm
        # For inference it is folded for good, and it is counted as what it is.
        if not isinstance(norm, FrozenBatchNorm2d) or not torch.is_grad_enabled():
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        arguments = self.stride, self.padding, self.dilation, self.groups
        x = scaled_convolution(x, self.weight, scale, shift, *arguments)
        return x if self.activation is None else self.activation(x)


def scale_weights_by_frozen_norms(model: nn.Module) -> None:
    """Put a :class:`FrozenNormConv2d` in the place of each convolution followed by frozen batch
    normalisation. Parameters, buffers and their names stay."""
    for name, module in list(model.named_modules()):
        if type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d):
            faster = FrozenNormConv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                module.groups,
                bias=module.bias is not None,
                padding_mode=module.padding_mode,
                device="meta",
                norm=module.norm,
                activation=module.activation,
            )
            faster.weight, faster.bias = module.weight, module.bias
            model.set_submodule(name, faster)
