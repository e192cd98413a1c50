"""Linear layers and convolutions by oneDNN for inference on a CPU, with weights packed once.

PyTorch's own call oneDNN for some types and sizes only, bring the weights into oneDNN's layout
again in each call, and write their output before bias, sum and ReLU read it again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Height and width that oneDNN chooses the layout of a convolution's weight for. With other sizes it
# nearly always wants the same one; if not, it brings the weight into another in each call.
LAYOUT_SIZE = (100, 134)


def can_pack(module: nn.Linear | nn.Conv2d) -> bool:
    """Whether :class:`PackedLinear` or :class:`PackedConv2d` can be made of a module."""
    weight = module.weight
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if isinstance(module, nn.Conv2d) and (
        module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class _Packed(nn.Module):
    """A layer whose weight is in oneDNN's layout.

    Such tensors can be neither copied nor pickled; the layer can, by way of the usual layout.
    """

    bias: Tensor | None
    packed: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, relu: bool):
        super().__init__()
        self.relu = relu
        self.register_buffer("bias", layer.bias)
        self.dtype = layer.weight.dtype

    @property
    def weight(self) -> Tensor:
        """A copy of the weight in the usual layout."""
        return self.packed.to_dense()

    @property
    def _activation(self) -> str:
        return "relu" if self.relu else "none"

    def _pack(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _can_run(self, x: Tensor) -> bool:
        """Whether oneDNN is to be called; if not, by PyTorch's own function.

        TorchScript has no such argument lists, and compilers choose layouts by themselves.
        """
        return (
            x.dtype == self.dtype
            and not torch.is_autocast_enabled("cpu")
            and not torch.jit.is_tracing()
            and not torch.compiler.is_compiling()
        )

    def _complete(self, output: Tensor, added: Tensor | None) -> Tensor:
        if added is not None:
            output = output + added
        return output.relu() if self.relu else output

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": self._buffers | {"packed": self.weight}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = self._pack(self.packed)


class PackedLinear(_Packed):
    """:class:`torch.nn.Linear`, then a sum with another tensor, then ReLU, the last two if wanted.

    Args:
        linear: the layer that it is made of, see :func:`can_pack`.
        relu: whether there is a ReLU.
    """

    def __init__(self, linear: nn.Linear, relu: bool = False):
        super().__init__(linear, relu)
        self.register_buffer("packed", self._pack(linear.weight), persistent=False)

    def _pack(self, weight: Tensor) -> Tensor:
        # The layout is the same for all but the smallest numbers of rows.
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1024)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """
        Args:
            x: (..., C).
            added: (..., C') of x's type, added to the output; not with ReLU.

        Returns:
            (..., C')
        """
        if not self._can_run(x):
            return self._complete(F.linear(x, self.weight, self.bias), added)
        op = torch.ops.mkldnn._linear_pointwise
        if added is None:
            return op(x, self.packed, self.bias, self._activation, [], "")
        return op.binary(x, added, self.packed, self.bias, "add")


class PackedConv2d(_Packed):
    """:class:`torch.nn.Conv2d`, then a sum with another tensor, then ReLU, the last two if wanted.

    Args:
        convolution: the layer that it is made of, see :func:`can_pack`.
        relu: whether there is a ReLU.
    """

    def __init__(self, convolution: nn.Conv2d, relu: bool = False):
        super().__init__(convolution, relu)
        self.stride, self.dilation = list(convolution.stride), list(convolution.dilation)
        self.padding = [int(length) for length in convolution.padding]  # can_pack wants no words
        self.groups = convolution.groups
        self.register_buffer("packed", self._pack(convolution.weight), persistent=False)

    def _pack(self, weight: Tensor) -> Tensor:
        size = [1, weight.shape[1] * self.groups, *LAYOUT_SIZE]
        return torch.ops.mkldnn._reorder_convolution_weight(
            weight.detach(), self.padding, self.stride, self.dilation, self.groups, size
        )

    def forward(self, x: Tensor, added: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """
        Args:
            x: (N, C, H, W).
            added: (N, C', H', W') of x's type, added to the output before the ReLU.
            overwrite: whether the output may take the memory of ``added``.

        Returns:
            (N, C', H', W')
        """
        arguments = (self.bias, self.padding, self.stride, self.dilation, self.groups)
        if not self._can_run(x):
            output = F.conv2d(
                x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
            )
            return self._complete(output, added)
        ops, relu = torch.ops.mkldnn, self._activation
        if added is None:
            return ops._convolution_pointwise(x, self.packed, *arguments, relu, [], "")
        if not overwrite:
            added = added.clone()  # oneDNN adds to what is there
        attributes: tuple[Any, ...] = ("add", None, relu if self.relu else None, [], None)
        return ops._convolution_pointwise_.binary(added, x, self.packed, *arguments, *attributes)
