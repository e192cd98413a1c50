"""Changes to a trained model that make inference faster and leave its output as it is."""

import copy

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .timm_backbone import TimmBackbone, import_timm
from .transformer import FeedForward


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Fold batch normalisation into convolutions; on a CPU, run linear layers by oneDNN and
    feed-forward networks in pieces.

    Args:
        model: a trained model with Detectron2's convolutions or a backbone of timm; it is not
            changed.

    Returns:
        a copy whose output differs by rounding only. It cannot be trained, and its names in
        ``state_dict()`` are not those of checkpoints.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, Conv2d):
            _fold_batch_norm(module)
        elif isinstance(module, TimmBackbone):
            _fold_batch_norm_of_timm(module)
        elif isinstance(module, nn.Linear) and OneDNNLinear.is_faster_than(module):
            module.__class__ = OneDNNLinear
        elif isinstance(module, FeedForward) and module.linear1.weight.device.type == "cpu":
            module.__class__ = FeedForwardInPieces
    return model


class OneDNNLinear(nn.Linear):
    """:class:`torch.nn.Linear` by oneDNN, which PyTorch itself uses for 16 bit types only.

    In float32 its matrix product is somewhat faster than that of :func:`torch.addmm`, and the bias
    does not have to be written to the output first.
    """

    @staticmethod
    def is_faster_than(linear: nn.Linear) -> bool:
        """Whether ``linear`` can be replaced. Subclasses, such as the one inside of attention
        modules, are used in other ways than by calling them."""
        return (
            type(linear) is nn.Linear
            and linear.weight.device.type == "cpu"
            and linear.weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C')."""
        if (
            x.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or torch.jit.is_tracing()  # TorchScript has no such argument lists
        ):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class FeedForwardInPieces(FeedForward):
    """:class:`FeedForward` for some tokens after the other, so that its hidden layer, which is the
    largest tensor of the encoder, stays in the cache and needs no new memory of the system."""

    TOKENS = 1024

    def forward(self, x: Tensor) -> Tensor:
        """(N, Q, C) to (N, Q, C)."""
        whole = super().forward
        # A graph would have as many pieces for all images as for the one that it was made with.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return whole(x)
        return torch.cat([whole(piece) for piece in x.split(self.TOKENS, dim=1)], dim=1)


def _fold_batch_norm(convolution: Conv2d) -> None:
    norm = convolution.norm
    if not isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d):
        return
    if norm.running_mean is None or norm.running_var is None:  # it follows each batch instead
        return
    _fuse(convolution, norm)
    convolution.norm = None


def _fuse(convolution: nn.Conv2d, norm: nn.Module) -> None:
    weight, bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    convolution.weight = weight.requires_grad_(False)
    convolution.bias = bias.requires_grad_(False)


def _fold_batch_norm_of_timm(backbone: TimmBackbone) -> None:
    """Fold batch normalisation where no module tells which convolution it follows.

    A run shows it. If something else reads a convolution's output as well, the features are others
    after folding, and the backbone stays as it is.
    """
    features = copy.deepcopy(backbone.features)
    convolutions = (nn.Conv2d, import_timm().layers.Conv2dSame)  # no others: they change weights
    outputs: list[tuple[Tensor, nn.Conv2d]] = []
    pairs: list[tuple[nn.Conv2d, nn.Module]] = []

    def remember(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append((output, module))

    def find(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pairs.extend((made_by, module) for output, made_by in outputs if output is inputs[0])

    hooks = []
    for module in features.modules():
        if type(module) in convolutions:
            hooks.append(module.register_forward_hook(remember))
        elif all(hasattr(module, name) for name in ("running_mean", "running_var", "weight")):
            hooks.append(module.register_forward_pre_hook(find))
    some = next(backbone.parameters())
    size = backbone.size_divisibility
    images = torch.rand(1, 3, 2 * size, 3 * size, generator=torch.Generator().manual_seed(0))
    images = images.to(some)
    with torch.no_grad():
        expected = features(images)
        for hook in hooks:
            hook.remove()
        names = {module: name for name, module in features.named_modules()}
        for convolution, norm in pairs:
            _fuse(convolution, norm)
            features.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))
        got = features(images)
    if all((a - b).norm() <= 1e-3 * b.norm() for a, b in zip(got, expected, strict=True)):
        backbone.features = features
