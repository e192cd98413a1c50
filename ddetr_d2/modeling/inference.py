"""Changes to a trained model that make inference faster and leave its output as it is."""

import copy
from functools import partial
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..errors import UserError
from ..layers.deform_conv import DeformConv
from .heads import DetectionHead
from .packed import pack
from .queries import LearnedPositions, LearnedQueries
from .timm_backbone import TimmBackbone, import_timm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepare_for_inference(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fold batch normalisation into convolutions, convert to 16 bits if that is wanted, and on a
    CPU run convolutions and linear layers by oneDNN.

    In bfloat16 weights and features have 16 bits; positions, sampling points, boxes and the layers
    that give scores and boxes keep their 32, and sums are made in 32 bits as well.

    Args:
        model: a trained model with Detectron2's convolutions or a backbone of timm; it is not
            changed.
        dtype: float32, which leaves the model's own type, or bfloat16.

    Returns:
        a copy whose output differs by rounding only. It cannot be trained, and its names in
        ``state_dict()`` are not those of checkpoints.

    Raises:
        ValueError: another type is asked for.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"prepare_for_inference: expected float32 or bfloat16, got {dtype}")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, Conv2d):
            _fold_batch_norm(module)
        elif isinstance(module, TimmBackbone):
            _fold_batch_norm_of_timm(module)
    if dtype == torch.float32:
        pack(model)
    else:
        _to_16_bits(model, dtype)
        pack(model)
        _cast_between(model, dtype)  # last, for it hangs on the modules that are left
    return model


def inference_dtype(name: str) -> torch.dtype:
    """The type that TEST.DTYPE names.

    Raises:
        UserError: it is none of those that models can be prepared with.
    """
    if name not in DTYPES:
        raise UserError(f"TEST.DTYPE is {name!r}; expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _to_16_bits(detector: Any, dtype: torch.dtype) -> None:
    """Change weights to ``dtype``, but for those of modules that need more."""
    queries = detector.transformer.queries
    wide = [*_last_layers(detector), *_deformable_convolutions(detector)]
    if isinstance(queries, LearnedQueries | LearnedPositions):
        wide.append(queries)
    kept = {part for module in wide for part in module.modules()}
    for part in (detector.backbone, detector.projection.input_proj, detector.transformer):
        for module in part.modules():
            if module not in kept:
                for tensor in (*module.parameters(False), *module.buffers(False)):
                    if tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype)


def _cast_between(detector: Any, dtype: torch.dtype) -> None:
    """Change the type of features wherever the next weights have another one."""
    detector.backbone.register_forward_pre_hook(partial(_cast_inputs, dtype))
    for module in _last_layers(detector):
        module.register_forward_pre_hook(partial(_cast_inputs, torch.float32))
    for module in _deformable_convolutions(detector):
        module.register_forward_pre_hook(partial(_cast_inputs, torch.float32))
        module.register_forward_hook(partial(_cast_output, dtype))


def _last_layers(detector: nn.Module) -> list[nn.Module]:
    """The layers that scores and boxes come from."""
    heads = [module for module in detector.modules() if isinstance(module, DetectionHead)]
    return [layer for head in heads for layer in (head.class_embed, head.bbox_embed[-2])]


def _deformable_convolutions(detector: nn.Module) -> list[nn.Module]:
    """Those of the backbone, which torchvision computes in 32 bits alone."""
    return [module for module in detector.modules() if isinstance(module, DeformConv)]


def _cast_inputs(dtype: torch.dtype, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return tuple(x.to(dtype) for x in inputs)


def _cast_output(dtype: torch.dtype, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def _fold_batch_norm(convolution: Conv2d) -> None:
    norm = convolution.norm
    if not isinstance(norm, FrozenBatchNorm2d | nn.BatchNorm2d):
        return
    if norm.running_mean is None or norm.running_var is None:  # it follows each batch instead
        return
    _fuse(convolution, norm)
    convolution.norm = None


def _fuse(convolution: nn.Conv2d, norm: Any) -> None:
    """Make a convolution do what batch normalisation with fixed statistics does after it."""
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
