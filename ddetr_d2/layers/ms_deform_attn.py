"""Multi-scale deformable attention (Zhu et al., ICLR 2021, section 4.1, equation 3).

The operator exists twice: as compiled kernels (``torch.ops.ddetr_d2.ms_deform_attn``, sources in
``csrc/``) and in plain PyTorch (:func:`ms_deform_attn_reference`). :func:`ms_deform_attn` takes the
compiled one where there is one for the device of its arguments, and the plain one elsewhere.

Level sizes are best given as Python ints: they are known on the host, and reading them back from a
GPU tensor would wait for the GPU and break ``torch.compile``.
"""

import functools
import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

try:
    import ddetr_d2._C  # noqa: F401  (registers the operators with PyTorch's dispatcher)

    _IMPORT_ERROR = None
except ImportError as error:
    _IMPORT_ERROR = error

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
    shapes = _flat_shapes(spatial_shapes)
    _check_level_starts(level_start_index, shapes)
    if not torch.compiler.is_compiling():
        _announce(value.device.type)
    if value.device.type in _COMPILED_DEVICES:
        return torch.ops.ddetr_d2.ms_deform_attn(
            value, shapes, sampling_locations, attention_weights
        )
    return _reference(value, shapes, sampling_locations, attention_weights)


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]] | Tensor,
    level_start_index: Sequence[int] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """:func:`ms_deform_attn` in plain PyTorch, for any device and floating type.

    Its memory grows with N * Q * M * L * K * D: all sampled values exist at once.
    """
    shapes = _flat_shapes(spatial_shapes)
    _check_level_starts(level_start_index, shapes)
    return _reference(value, shapes, sampling_locations, attention_weights)


def _reference(value, shapes, sampling_locations, attention_weights):
    _check_inputs(value, shapes, sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    dtype = _accumulation_dtype(value)
    level_sizes = list(zip(shapes[::2], shapes[1::2], strict=True))

    output = value.new_zeros(batch * heads, channels, queries, dtype=dtype)
    level_tokens = value.split([height * width for height, width in level_sizes], dim=1)
    for level, ((height, width), tokens) in enumerate(zip(level_sizes, level_tokens, strict=True)):
        feature_map = tokens.to(dtype).permute(0, 2, 3, 1)
        feature_map = feature_map.reshape(batch * heads, channels, height, width)
        xy = sampling_locations[:, :, :, level].to(dtype).transpose(1, 2)
        xy = xy.reshape(batch * heads, queries, points, 2)
        weights = attention_weights[:, :, :, level].to(dtype).transpose(1, 2)
        weights = weights.reshape(batch * heads, queries, points)

        x = xy[..., 0] * width - 0.5
        y = xy[..., 1] * height - 0.5
        inside = (x > -1) & (x < width) & (y > -1) & (y < height)
        # Dropped samples move far outside, so that neither they nor their gradients carry a NaN.
        grid = torch.where(inside[..., None], 2 * xy - 1, -3.0)
        weights = torch.where(inside, weights, 0.0)
        samples = F.grid_sample(
            feature_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        output = output + (samples * weights[:, None]).sum(-1)
    output = output.view(batch, heads * channels, queries).transpose(1, 2)
    return output.to(value.dtype).contiguous()


def _accumulation_dtype(value: Tensor) -> torch.dtype:
    return torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype


def _flat_shapes(spatial_shapes: Sequence[Sequence[int]] | Tensor) -> list[int]:
    """[(H0, W0), (H1, W1), ...] -> [H0, W0, H1, W1, ...], the form the dispatcher can take."""
    if isinstance(spatial_shapes, Tensor):
        _check_integer_tensor("spatial_shapes", spatial_shapes)
        spatial_shapes = spatial_shapes.tolist()
    _require(
        all(
            isinstance(shape, Sequence)
            and len(shape) == 2
            and all(isinstance(size, int | torch.SymInt) for size in shape)
            for shape in spatial_shapes
        ),
        lambda: (
            f"spatial_shapes: expected one (height, width) of ints per level, got {spatial_shapes}"
        ),
    )
    return [size for shape in spatial_shapes for size in shape]


def _check_level_starts(level_start_index: Sequence[int] | Tensor, shapes: list[int]) -> None:
    if isinstance(level_start_index, Tensor):
        _check_integer_tensor("level_start_index", level_start_index)
        level_start_index = level_start_index.tolist()
    expected = [0]
    for height, width in zip(shapes[:-2:2], shapes[1:-2:2], strict=True):
        expected.append(expected[-1] + height * width)
    _require(
        list(level_start_index) == expected,
        lambda: (
            f"level_start_index: expected {expected}, which follows from spatial_shapes, "
            f"got {list(level_start_index)}"
        ),
    )


def _check_integer_tensor(name: str, tensor: Tensor) -> None:
    _require(
        not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool),
        lambda: f"{name}: expected ints or an integer tensor, got a tensor of {tensor.dtype}",
    )


def _check_inputs(
    value: Tensor, shapes: list[int], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    """The checks of csrc/check.h, for the routes that do not pass through it."""
    _require(
        value.dim() == 4,
        lambda: f"value: expected shape (N, S, M, D), got {tuple(value.shape)}",
    )
    _require(
        value.dtype in _DTYPES,
        lambda: f"value: expected float32, float64, float16 or bfloat16, got {value.dtype}",
    )
    _require(
        len(shapes) >= 2 and len(shapes) % 2 == 0 and all(size >= 1 for size in shapes),
        lambda: (
            "spatial_shapes: expected height and width, at least 1, of at least one level, "
            f"got {shapes}"
        ),
    )
    tokens = sum(height * width for height, width in zip(shapes[::2], shapes[1::2], strict=True))
    _require(
        value.shape[1] == tokens,
        lambda: (
            f"value: expected S = {tokens} tokens, the sum of height * width over "
            f"spatial_shapes {shapes}, got S = {value.shape[1]}"
        ),
    )
    batch, _, heads, _ = value.shape
    levels = len(shapes) // 2
    _require(
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
    _require(
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
        _require(
            tensor.device == value.device,
            lambda name=name, tensor=tensor: (
                f"{name}: expected device {value.device} as value has, got {tensor.device}"
            ),
        )
        _require(
            tensor.dtype in (value.dtype, _accumulation_dtype(value)),
            lambda name=name, tensor=tensor: (
                f"{name}: expected type {value.dtype} as value has"
                f"{', or float32' if value.dtype != _accumulation_dtype(value) else ''}, "
                f"got {tensor.dtype}"
            ),
        )


def _require(condition: bool, message) -> None:
    if not condition:
        raise ValueError(f"ms_deform_attn: {message()}")


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
    _check_inputs(value, spatial_shapes, sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], heads * channels)


def _fake_backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights):
    expected = _fake(value, spatial_shapes, sampling_locations, attention_weights)
    for name in ("shape", "device", "dtype"):
        got, wanted = getattr(grad_output, name), getattr(expected, name)
        _require(
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
    torch.library.register_fake("ddetr_d2::ms_deform_attn_backward", _fake_backward)
    torch.library.register_autograd(
        "ddetr_d2::ms_deform_attn", _backward, setup_context=_save_inputs
    )
    torch.library.register_autograd("ddetr_d2::ms_deform_attn_backward", _double_backward)

# Types of devices that the compiled operator has kernels for.
_COMPILED_DEVICES = frozenset(
    name
    for name, key in (("cpu", "CPU"), ("cuda", "CUDA"), ("meta", "Meta"))
    if _IMPORT_ERROR is None
    and torch._C._dispatch_has_kernel_for_dispatch_key("ddetr_d2::ms_deform_attn", key)
)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections (equation 3 of the paper).

    Args:
        embed_dim: C, channels of queries, values and output.
        num_heads: M, a divisor of C.
        num_levels: L.
        num_points: K, samples per head and level.
    """

    def __init__(
        self, embed_dim: int = 256, num_heads: int = 8, num_levels: int = 4, num_points: int = 4
    ):
        super().__init__()
        for name, number in (
            ("embed_dim", embed_dim),
            ("num_heads", num_heads),
            ("num_levels", num_levels),
            ("num_points", num_points),
        ):
            if number < 1:
                raise ValueError(f"MSDeformAttn: {name} must be at least 1, got {number}")
        if embed_dim % num_heads:
            raise ValueError(
                f"MSDeformAttn: embed_dim must be a multiple of num_heads = {num_heads}, "
                f"got {embed_dim}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points

        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head m starts with the direction 2 pi m / M and distances 1 to K (paper, A.4)."""
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None, :] * distance[None, None, :, None]  # (M, 1, K, 2)
        offsets = offsets.expand(-1, self.num_levels, -1, -1)

        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value_tokens: Tensor,
        spatial_shapes: Sequence[Sequence[int]] | Tensor,
        level_start_index: Sequence[int] | Tensor,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Let each query look at its learned points in all levels.

        Args:
            query: (N, Q, C), content plus position.
            reference_points: (N, Q, L, 2) points (x, y), from which offsets are counted in pixels
                of the level, or (N, Q, L, 4) boxes (cx, cy, w, h), from whose centre offsets are
                counted in w / 2K and h / 2K. All relative to the level's width and height.
            value_tokens: (N, S, C), without position.
            spatial_shapes: (height, width) in pixels of each level, ints or an integer tensor
                (L, 2).
            level_start_index: first token of each level, ints or an integer tensor (L,).
            padding_mask: (N, S), True where a token is padding and is to count as zero; or None.

        Returns:
            (N, Q, C)

        Raises:
            ValueError: an argument has the wrong shape, type or device; the message names it.
        """
        batch, queries, _ = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        if isinstance(spatial_shapes, Tensor):
            spatial_shapes = spatial_shapes.tolist()
        if len(spatial_shapes) != levels:
            raise ValueError(
                f"MSDeformAttn: spatial_shapes: expected {levels} levels, got {spatial_shapes}"
            )
        if reference_points.shape[:-1] != (batch, queries, levels) or (
            reference_points.shape[-1] not in (2, 4)
        ):
            raise ValueError(
                f"MSDeformAttn: reference_points: expected shape ({batch}, {queries}, {levels}, "
                f"2 or 4), got {tuple(reference_points.shape)}"
            )
        if padding_mask is not None and (
            padding_mask.shape != value_tokens.shape[:2] or padding_mask.dtype != torch.bool
        ):
            raise ValueError(
                "MSDeformAttn: padding_mask: expected a bool tensor of shape "
                f"{tuple(value_tokens.shape[:2])} as value_tokens has, "
                f"got {padding_mask.dtype} {tuple(padding_mask.shape)}"
            )

        value = self.value_proj(value_tokens)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (heads, -1))

        offsets = self.sampling_offsets(query).view(batch, queries, heads, levels, points, 2)
        weights = self.attention_weights(query).view(batch, queries, heads, levels * points)
        weights = weights.softmax(-1).view(batch, queries, heads, levels, points)

        reference = reference_points[:, :, None, :, None, :]  # (N, Q, 1, L, 1, 2 or 4)
        if reference_points.shape[-1] == 2:
            # Asynchronous, so that the host does not wait for the GPU in every layer.
            sizes = torch.tensor(
                [[width, height] for height, width in spatial_shapes], dtype=reference.dtype
            ).to(reference.device, non_blocking=True)
            locations = reference + offsets / sizes[:, None, :]
        else:
            locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
        output = ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)
        return self.output_proj(output)
