"""Parts of a model that run by oneDNN on a CPU, in place of those that it was trained with."""

from typing import Any, TypeGuard

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from ..layers.onednn import PackedConv2d, PackedLinear, can_pack
from .frozen_norm import FrozenNormConv2d
from .transformer import FeedForward


def pack(model: nn.Module) -> None:
    """Replace linear layers, convolutions and what is made of them, wherever oneDNN takes them.

    Subclasses stay, such as the linear layer inside of PyTorch's attention modules: they are used
    in other ways than by calling them.

    Args:
        model: for inference, batch normalisation folded; it is changed.
    """
    replaced: dict[nn.Module, nn.Module] = {}  # a module can be in several places
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if module not in replaced:
                # Detectron2's stages are such sequences, whose last output alone is read elsewhere.
                only_reader = isinstance(parent, nn.Sequential) and name != "0"
                replaced[module] = _packed(module, only_reader)
            if replaced[module] is not module:
                setattr(parent, name, replaced[module])


def _packed(module: nn.Module, only_reader: bool) -> nn.Module:
    """What takes the place of ``module``, which may be itself.

    Args:
        module: part of a model.
        only_reader: whether nothing else reads its input.
    """
    if type(module) is FeedForward and can_pack(module.linear1) and can_pack(module.linear2):
        return FeedForwardInPieces(module)
    if type(module) is BasicStem and _is_plain(module.conv1):
        return nn.Sequential(PackedConv2d(module.conv1, relu=True), nn.MaxPool2d(3, 2, padding=1))
    if type(module) in (BasicBlock, BottleneckBlock) and all(map(_is_plain, _convolutions(module))):
        return PackedResidualBlock(module, overwrite=only_reader)
    if type(module) is nn.Linear and can_pack(module):
        return PackedLinear(module)
    if _is_plain(module):
        return PackedConv2d(module)
    return module


def _is_plain(module: Any) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution alone, which oneDNN takes."""
    if type(module) in (Conv2d, FrozenNormConv2d):  # Detectron2's
        return module.norm is None and module.activation is None and can_pack(module)
    return type(module) is nn.Conv2d and can_pack(module)


def _convolutions(block: BasicBlock | BottleneckBlock) -> list[Conv2d]:
    shortcut = [] if block.shortcut is None else [block.shortcut]
    return [
        block.conv1,
        block.conv2,
        *([block.conv3] if hasattr(block, "conv3") else []),
        *shortcut,
    ]


class PackedResidualBlock(nn.Module):
    """Detectron2's residual blocks, which have a ReLU after each convolution and after the sum."""

    def __init__(self, block: BasicBlock | BottleneckBlock, overwrite: bool):
        """
        Args:
            block: what it is made of.
            overwrite: whether the input may be overwritten, which saves a copy of it.
        """
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        self.overwrite = overwrite or block.shortcut is not None
        convolutions = _convolutions(block)
        if block.shortcut is not None:
            self.shortcut = PackedConv2d(convolutions.pop())
        *first, last = [PackedConv2d(convolution, relu=True) for convolution in convolutions]
        self.first = nn.Sequential(*first)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        return self.last(self.first(x), self.shortcut(x), self.overwrite)


class FeedForwardInPieces(nn.Module):
    """:class:`FeedForward` for some tokens after the other, so that its hidden layer, which is the
    largest tensor of the encoder, stays in the cache and needs no new memory of the system."""

    BYTES_PER_CHANNEL = 8192  # of a piece

    def __init__(self, feed_forward: FeedForward):
        """
        Args:
            feed_forward: what it is made of.
        """
        super().__init__()
        self.linear1 = PackedLinear(feed_forward.linear1, relu=True)
        self.linear2 = PackedLinear(feed_forward.linear2)
        self.norm = feed_forward.norm

    def forward(self, x: Tensor) -> Tensor:
        """(N, Q, C) to (N, Q, C)."""
        # A graph would have as many pieces for all images as for the one that it was made with.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._whole(x)
        tokens = self.BYTES_PER_CHANNEL // x.element_size()
        return torch.cat([self._whole(piece) for piece in x.split(tokens, dim=1)], dim=1)

    def _whole(self, x: Tensor) -> Tensor:
        return self.norm(self.linear2(self.linear1(x), x))
