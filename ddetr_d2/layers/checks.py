"""What :func:`ddetr_d2.layers.ms_deform_attn` demands of its arguments."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def flat_shapes(spatial_shapes: Sequence[Sequence[int]] | Tensor) -> list[int]:
    """[(H0, W0), (H1, W1), ...] -> [H0, W0, H1, W1, ...], the form the dispatcher can take."""
    if isinstance(spatial_shapes, Tensor):
        _check_integer_tensor("spatial_shapes", spatial_shapes)
        spatial_shapes = spatial_shapes.tolist()
    # A plain loop: the rest of a call with one query takes but a few microseconds.
    flat: list[int] = []
    try:
        for height, width in spatial_shapes:
            if not (type(height) is int is type(width) or _are_sizes(height, width)):
                raise TypeError
            flat += (height, width)
    except (TypeError, ValueError):  # the latter where there are not two of them
        raise ValueError(
            "ms_deform_attn: spatial_shapes: expected one (height, width) of ints per level, "
            f"got {spatial_shapes}"
        ) from None
    return flat


def _are_sizes(*sizes: object) -> bool:
    return all(isinstance(size, int | torch.SymInt) for size in sizes)


def check_level_starts(level_start_index: Sequence[int] | Tensor, shapes: list[int]) -> None:
    if isinstance(level_start_index, Tensor):
        _check_integer_tensor("level_start_index", level_start_index)
        level_start_index = level_start_index.tolist()
    expected, start = [], 0
    for level in range(0, len(shapes), 2):
        expected.append(start)
        start += shapes[level] * shapes[level + 1]
    if list(level_start_index) != (expected or [0]):
        raise ValueError(
            f"ms_deform_attn: level_start_index: expected {expected or [0]}, which follows from "
            f"spatial_shapes, got {list(level_start_index)}"
        )


def _check_integer_tensor(name: str, tensor: Tensor) -> None:
    require(
        not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool),
        lambda: f"{name}: expected ints or an integer tensor, got a tensor of {tensor.dtype}",
    )


def check_inputs(
    value: Tensor, shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    """The checks of csrc/check.h, for the routes that do not pass through it.

    Raises:
        ValueError: an argument has the wrong shape, type or device; the message names it.
    """
    require(
        value.dim() == 4,
        lambda: f"value: expected shape (N, S, M, D), got {tuple(value.shape)}",
    )
    require(
        value.dtype in _DTYPES,
        lambda: f"value: expected float32, float64, float16 or bfloat16, got {value.dtype}",
    )
    require(
        len(shapes) >= 2 and len(shapes) % 2 == 0 and all(size >= 1 for size in shapes),
        lambda: (
            "spatial_shapes: expected height and width, at least 1, of at least one level, "
            f"got {shapes}"
        ),
    )
    tokens = sum(height * width for height, width in zip(shapes[::2], shapes[1::2], strict=True))
    require(
        value.shape[1] == tokens,
        lambda: (
            f"value: expected S = {tokens} tokens, the sum of height * width over "
            f"spatial_shapes {shapes}, got S = {value.shape[1]}"
        ),
    )
    batch, _, heads, _ = value.shape
    levels = len(shapes) // 2
    require(
        sampling_locations.dim() == 6
        and sampling_locations.shape[0] == batch
        and sampling_locations.shape[2] == heads
        and sampling_locations.shape[3] == levels
        and sampling_locations.shape[5] == 2,
        lambda: (
            f"sampling_locations: expected shape (N, Q, M, L, K, 2) with N = {batch}, "
            f"M = {heads}, L = {levels}, got {tuple(sampling_locations.shape)}"
        ),
    )
    require(
        attention_weights.shape == sampling_locations.shape[:-1],
        lambda: (
            "attention_weights: expected shape (N, Q, M, L, K) = "
            f"{tuple(sampling_locations.shape[:-1])} as in sampling_locations, "
            f"got {tuple(attention_weights.shape)}"
        ),
    )
    for name, tensor in (
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
    ):
        _check_like(value, name, tensor)


def _check_like(value: Tensor, name: str, tensor: Tensor) -> None:
    require(
        tensor.device == value.device,
        lambda: f"{name}: expected device {value.device} as value has, got {tensor.device}",
    )
    require(
        tensor.dtype in (value.dtype, accumulation_dtype(value)),
        lambda: (
            f"{name}: expected type {value.dtype} as value has"
            f"{', or float32' if value.dtype != accumulation_dtype(value) else ''}, "
            f"got {tensor.dtype}"
        ),
    )


def require(condition: bool, message: Callable[[], str]) -> None:
    if not condition:
        raise ValueError(f"ms_deform_attn: {message()}")


def accumulation_dtype(value: Tensor) -> torch.dtype:
    return torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
