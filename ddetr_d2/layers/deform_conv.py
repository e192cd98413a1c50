"""Deformable convolution for Detectron2's ResNets, on any device.

Detectron2's own modules need ``detectron2._C``, a GPU and channels first. These have the same
arguments and parameter names, so checkpoints fit, and run through
:func:`torchvision.ops.deform_conv2d` on any device. Both use the same layout of offsets: per
deformable group and kernel point a (y, x) pair.
"""

from typing import Any

from detectron2.layers import Conv2d
from detectron2.modeling.backbone import resnet
from torch import Tensor
from torchvision.ops import deform_conv2d


class DeformConv(Conv2d):
    """Deformable convolution, Dai et al., "Deformable Convolutional Networks", section 2.1.

    Takes the arguments of :class:`torch.nn.Conv2d`, ``norm`` and ``activation`` of
    :class:`detectron2.layers.Conv2d`, and ``deformable_groups`` G: the input channels are split
    into G groups with offsets of their own.
    """

    def __init__(self, *args: Any, deformable_groups: int = 1, bias: bool = False, **kwargs: Any):
        super().__init__(*args, bias=bias, **kwargs)
        self.deformable_groups = deformable_groups

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve with displaced sampling points.

        Args:
            x: (N, C, H, W) input.
            offset: (N, 2 * G * kh * kw, H', W') displacements in pixels of the input.
            mask: (N, G * kh * kw, H', W') factors of the sampled values; None stands for ones.

        Returns:
            (N, C', H', W') output.
        """
        x = deform_conv2d(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, deformable_groups={self.deformable_groups}"


class ModulatedDeformConv(DeformConv):
    """Deformable convolution with modulation, Zhu et al., "Deformable ConvNets v2", equation 1.

    Called with a mask; has a bias unless told otherwise.
    """

    def __init__(self, *args: Any, bias: bool = True, **kwargs: Any):
        super().__init__(*args, bias=bias, **kwargs)


def provide_deform_conv() -> None:
    """Let Detectron2's ResNets be built with these modules in place of its own.

    To be called before a backbone is built.
    """
    resnet.DeformConv = DeformConv
    resnet.ModulatedDeformConv = ModulatedDeformConv
