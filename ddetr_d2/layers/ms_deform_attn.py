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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import check_inputs, check_level_starts, flat_shapes
from .reference import ms_deform_attn_reference

logger = logging.getLogger(__name__)

# By PyTorch's stable ABI. The first has the operators' schemas; the second is only there if there
# was a CUDA toolkit.
LIBRARIES = [Path(__file__).with_name(name) for name in ("ops_cpu.so", "ops_cuda.so")]


def _load() -> str:
    """Register the compiled operators with PyTorch's dispatcher; say why if there are none."""
    if not LIBRARIES[0].exists():
        return "is not compiled. To compile it: pip install -e . --no-build-isolation"
    for library in LIBRARIES:
        try:
            if library.exists():
                torch.ops.load_library(library)
        except OSError as error:
            reason = str(error).splitlines()[0]
            if library is LIBRARIES[0]:
                return f"cannot be loaded ({reason}). It needs torch 2.10 or newer"
            logger.warning("ms_deform_attn: the CUDA kernels cannot be loaded (%s)", reason)
    return ""


_NOT_LOADED = _load()
_operator: Any = None if _NOT_LOADED else torch.ops.ddetr_d2.ms_deform_attn.default


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
    device = value.device.type
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _announce(device)
    if device not in _COMPILED_DEVICES:
        return ms_deform_attn_reference(
            value, spatial_shapes, level_start_index, sampling_locations, attention_weights
        )
    if device != "meta" and torch.is_autocast_enabled(device):
        # The value, where the memory traffic is, takes the autocast type.
        value = _cast(value, torch.get_autocast_dtype(device))
        sampling_locations = _cast(sampling_locations, torch.float32)
        attention_weights = _cast(attention_weights, torch.float32)
    if compiling:
        return _operator(value, shapes, sampling_locations, attention_weights)
    try:
        # torch.library's autograd for operators takes 6 microseconds more without gradients, 25
        # with them.
        if torch.is_grad_enabled() and (
            value.requires_grad
            or sampling_locations.requires_grad
            or attention_weights.requires_grad
        ):
            return _MSDeformAttn.apply(value, shapes, sampling_locations, attention_weights)
        with torch._C._AutoDispatchBelowAutograd():
            return _operator(value, shapes, sampling_locations, attention_weights)
    except RuntimeError as error:
        raise _of_arguments(error) from None


def _of_arguments(error: RuntimeError) -> Exception:
    """The ValueError that the kernels' checks raise: newer PyTorch makes a RuntimeError of it."""
    message = str(error)
    return ValueError(message) if message.startswith("ms_deform_attn: ") else error


class _MSDeformAttn(torch.autograd.Function):
    """The operator with its gradient, for calls that are not compiled."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        spatial_shapes: list[int],
        sampling_locations: Tensor,
        attention_weights: Tensor,
    ) -> Tensor:
        ctx.spatial_shapes = spatial_shapes
        ctx.save_for_backward(value, sampling_locations, attention_weights)
        with torch._C._AutoDispatchBelowAutograd():
            return _operator(value, spatial_shapes, sampling_locations, attention_weights)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_output)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does: not what has 64 bits."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


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
    level_start_index: Sequence[int] | Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """:func:`ms_deform_attn` that computes locations and softmax itself, without memory for them.

    Args:
        value: (N, S, M, D).
        spatial_shapes: (height, width) in pixels of each level.
        level_start_index: first token of each level, ints or an integer tensor (L,).
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
    arguments = (value, shapes, reference_points, sampling_offsets, attention_logits)
    if torch.compiler.is_compiling():
        return torch.ops.ddetr_d2.ms_deform_attn_fused.default(*arguments)
    _announce(value.device.type)
    try:
        return torch.ops.ddetr_d2.ms_deform_attn_fused.default(*arguments)
    except RuntimeError as error:
        raise _of_arguments(error) from None


@functools.cache
def _announce(device_type: str) -> None:
    """Say, once per type of device, which implementation is in use."""
    if device_type in _COMPILED_DEVICES:
        logger.info("ms_deform_attn on %s: compiled kernels", device_type)
        return
    reason = _NOT_LOADED or (
        "has no kernels for it. To compile them for CUDA: "
        "FORCE_CUDA=1 pip install -e . --no-build-isolation"
    )
    logger.warning(
        "ms_deform_attn on %s: plain PyTorch, which is slower, because the compiled operator %s",
        device_type,
        reason,
    )


def _fake(
    value: Tensor, spatial_shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    check_inputs(value, spatial_shapes, sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


def _fake_fused(
    value: Tensor,
    spatial_shapes: list[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    return _fake(value, spatial_shapes, sampling_offsets, attention_logits)


def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    deterministic: bool = False,
) -> tuple[Tensor, ...]:
    expected = _fake(value, spatial_shapes, sampling_locations, attention_weights)
    for name in ("shape", "device", "dtype"):
        got, wanted = getattr(grad_output, name), getattr(expected, name)
        if got != wanted:
            raise ValueError(f"ms_deform_attn: grad_output: expected {name} {wanted}, got {got}")
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (value, sampling_locations, attention_weights)
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.ddetr_d2.ms_deform_attn_backward.default(
        grad_output,
        value,
        ctx.spatial_shapes,
        sampling_locations,
        attention_weights,
        torch.are_deterministic_algorithms_enabled(),
    )
    return grad_value, None, grad_locations, grad_weights


def _double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "ms_deform_attn is differentiable once: there are no gradients of its gradients"
    )


if not _NOT_LOADED:
    torch.library.register_fake("ddetr_d2::ms_deform_attn", _fake)
    torch.library.register_fake("ddetr_d2::ms_deform_attn_fused", _fake_fused)
    torch.library.register_fake("ddetr_d2::ms_deform_attn_backward", _fake_backward)
    torch.library.register_autograd(
        "ddetr_d2::ms_deform_attn", _backward, setup_context=_save_inputs
    )
    torch.library.register_autograd("ddetr_d2::ms_deform_attn_backward", _double_backward)


def devices_with(operator: str) -> frozenset[str]:
    """Types of devices that a compiled operator has kernels for."""
    keys = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(
        device
        for device, key in keys.items()
        if not _NOT_LOADED and has_kernel(f"ddetr_d2::{operator}", key)
    )


_COMPILED_DEVICES = devices_with("ms_deform_attn")
_FUSED_DEVICES = devices_with("ms_deform_attn_fused")
