"""Multi-scale deformable attention as a function, and its registration with PyTorch.

The operator exists twice: as compiled kernels (``torch.ops.ddetr_d2.ms_deform_attn``, sources in
``csrc/``) and in plain PyTorch (``reference.py``). :func:`ms_deform_attn` takes the compiled one
where there is one for the device of its arguments, and the plain one elsewhere.

Level sizes are best given as Python ints: they are known on the host, and reading them back from a
GPU tensor would wait for the GPU and break ``torch.compile``.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_inputs, check_level_starts, flat_shapes, require
from .reference import ms_deform_attn_reference

logger = logging.getLogger(__name__)

try:
    import ddetr_d2._C  # noqa: F401  (registers the operators with PyTorch's dispatcher)

    _IMPORT_ERROR = None
except ImportError as error:
    _IMPORT_ERROR = error


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]] | Tensor,
    level_start_index: Sequence[int] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples from several feature levels.

    A location (x, y) is at pixel ``x * W - 0.5, y * H - 0.5`` of its level. Pixels outside the
    level count as zero, and a sample contributes nothing at all unless -1 < x < W and -1 < y < H in
    pixels, which NaN and infinite locations never satisfy.

    With a value of 16 bits, locations and weights may be of 16 bits or, better, float32: a bfloat16
    location on a map 134 pixels wide is off by up to a quarter of a pixel. Sums are made in float32
    then. Under ``torch.autocast`` the compiled operator brings the value to the autocast type and
    the other two to float32.

    Args:
        value: (N, S, M, D), S tokens of all levels one after the other, M heads of D channels.
        spatial_shapes: (height, width) in pixels of each level, ints or an integer tensor (L, 2).
        level_start_index: first token of each level, ints or an integer tensor (L,). It follows
            from ``spatial_shapes`` and is checked against it.
        sampling_locations: (N, Q, M, L, K, 2), (x, y) with (0, 0) the top left and (1, 1) the
            bottom right corner of a level.
        attention_weights: (N, Q, M, L, K).

    Returns:
        (N, Q, M * D) of value's type. It is differentiable once, in value, locations and weights.

    Raises:
        ValueError: an argument has the wrong shape, type or device; the message names it.
    """
    shapes = flat_shapes(spatial_shapes)
    check_level_starts(level_start_index, shapes)
    if not torch.compiler.is_compiling():
        _announce(value.device.type)
    if value.device.type in _COMPILED_DEVICES:
        return torch.ops.ddetr_d2.ms_deform_attn(
            value, shapes, sampling_locations, attention_weights
        )
    return ms_deform_attn_reference(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )


def can_fuse(value: Tensor) -> bool:
    """Whether :func:`ms_deform_attn_fused` can be used: on a device that has it, without gradients.

    Not while a model is traced, since what comes of it has to run elsewhere.
    """
    return (
        value.device.type in _FUSED_DEVICES
        and not torch.is_grad_enabled()
        and not torch.jit.is_tracing()
    )


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]],
    level_start_index: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """:func:`ms_deform_attn` that computes locations and softmax itself, without memory for them.

    Args:
        value: (N, S, M, D).
        spatial_shapes: (height, width) in pixels of each level.
        level_start_index: first token of each level.
        reference_points: (N, Q, L, 2 or 4) points or boxes, see :class:`MSDeformAttn`.
        sampling_offsets: (N, Q, M, L, K, 2) from the reference points.
        attention_logits: (N, Q, M, L, K), weights before the softmax over L and K.

    Returns:
        (N, Q, M * D) of value's type, without gradient.

    Raises:
        ValueError: an argument has the wrong shape, type or device; the message names it.
    """
    shapes = flat_shapes(spatial_shapes)
    check_level_starts(level_start_index, shapes)
    if not torch.compiler.is_compiling():
        _announce(value.device.type)
    return torch.ops.ddetr_d2.ms_deform_attn_fused(
        value, shapes, reference_points, sampling_offsets, attention_logits
    )


@functools.cache
def _announce(device_type: str) -> None:
    """Say, once per type of device, which implementation is in use."""
    if device_type in _COMPILED_DEVICES:
        logger.info("ms_deform_attn on %s: compiled kernels", device_type)
    elif _IMPORT_ERROR is not None:
        logger.warning(
            "ms_deform_attn on %s: plain PyTorch, which is slower, because the compiled operator "
            "could not be imported (%s). To build it: pip install -e . --no-build-isolation",
            device_type,
            _IMPORT_ERROR,
        )
    else:
        logger.warning(
            "ms_deform_attn on %s: plain PyTorch, which is slower, because the compiled operator "
            "was built without kernels for it. To build them for CUDA: "
            "FORCE_CUDA=1 pip install -e . --no-build-isolation",
            device_type,
        )


def _fake(value, spatial_shapes, sampling_locations, attention_weights):
    check_inputs(value, spatial_shapes, sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


def _fake_fused(value, spatial_shapes, reference_points, sampling_offsets, attention_logits):
    return _fake(value, spatial_shapes, sampling_offsets, attention_logits)


def _fake_backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights):
    expected = _fake(value, spatial_shapes, sampling_locations, attention_weights)
    for name in ("shape", "device", "dtype"):
        got, wanted = getattr(grad_output, name), getattr(expected, name)
        require(
            got == wanted,
            lambda name=name, got=got, wanted=wanted: (
                f"grad_output: expected {name} {wanted}, got {got}"
            ),
        )
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (value, sampling_locations, attention_weights)
    )


def _save_inputs(ctx, inputs, output):
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx, grad_output):
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.ddetr_d2.ms_deform_attn_backward(
        grad_output, value, ctx.spatial_shapes, sampling_locations, attention_weights
    )
    return grad_value, None, grad_locations, grad_weights


def _double_backward(ctx, *grads):
    raise NotImplementedError(
        "ms_deform_attn is differentiable once: there are no gradients of its gradients"
    )


if _IMPORT_ERROR is None:
    torch.library.register_fake("ddetr_d2::ms_deform_attn", _fake)
    torch.library.register_fake("ddetr_d2::ms_deform_attn_fused", _fake_fused)
    torch.library.register_fake("ddetr_d2::ms_deform_attn_backward", _fake_backward)
    torch.library.register_autograd(
        "ddetr_d2::ms_deform_attn", _backward, setup_context=_save_inputs
    )
    torch.library.register_autograd("ddetr_d2::ms_deform_attn_backward", _double_backward)


def _devices_with(operator: str) -> frozenset[str]:
    """Types of devices that a compiled operator has kernels for."""
    keys = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(
        device
        for device, key in keys.items()
        if _IMPORT_ERROR is None and has_kernel(f"ddetr_d2::{operator}", key)
    )


_COMPILED_DEVICES = _devices_with("ms_deform_attn")
_FUSED_DEVICES = _devices_with("ms_deform_attn_fused")
