"""Multi-scale deformable attention beside other implementations."""

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ddetr_d2.errors import UserError
from ddetr_d2.layers import MSDeformAttn, ms_deform_attn, ms_deform_attn_reference

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import OURS, Case, Prepared
from .timing import kernel_seconds

HEADS, CHANNELS, POINTS = 8, 32, 4
STRIDES = (8, 16, 32, 64)
DECODER_QUERIES = 300
SPREAD = 2.0  # standard deviation of the encoder's sampling points, in pixels of the level
# Relative differences beyond which something else is computed. The gradients of locations jump at
# the borders of pixels, which rounding puts a few samples on the other side of; and sums of many
# gradients in 16 bits are coarse.
TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.1}
GRID_SAMPLE = "grid_sample alone"
FORWARD, BACKWARD, RECORDED = "forward", "forward + backward", "forward, gradients wanted"

# Value, locations and weights to the output.
Operator = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """Sizes, type and pass; ``queries`` is None for the encoder, which has one for each token."""

    queries: int | None
    batch: int
    image_size: tuple[int, int]
    dtype: torch.dtype
    device: str
    direction: str

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Height and width of each level, in pixels."""
        height, width = self.image_size
        return [(-(-height // stride), -(-width // stride)) for stride in STRIDES]

    @property
    def starts(self) -> list[int]:
        """First token of each level."""
        sizes = [height * width for height, width in self.shapes]
        return [0, *itertools.accumulate(sizes[:-1])]

    def make_inputs(self) -> list[Tensor]:
        """Value (N, S, M, D), locations (N, Q, M, L, K, 2), weights (N, Q, M, L, K)."""
        device = self.device
        generator = torch.Generator(device).manual_seed(0)
        tokens = sum(height * width for height, width in self.shapes)
        random = {"generator": generator, "device": device}
        value = torch.randn(self.batch, tokens, HEADS, CHANNELS, **random)
        shape = (self.batch, self.queries or tokens, HEADS, len(STRIDES), POINTS, 2)
        if self.queries is None:
            sizes = torch.tensor(self.shapes, device=device).flip(1)  # width, height
            locations = torch.randn(shape, **random) * (SPREAD / sizes[:, None])
            locations += token_centers(self.shapes)[:, None, None, None].to(device)
        else:
            locations = torch.rand(shape, **random)
        weights = torch.rand(shape[:-1], **random)
        weights /= weights.sum((-2, -1), keepdim=True)
        return [x.to(self.dtype) for x in (value, locations, weights)]

    def make_grad_output(self) -> Tensor:
        """Gradient of the output (N, Q, M * D)."""
        tokens = sum(height * width for height, width in self.shapes)
        shape = (self.batch, self.queries or tokens, HEADS * CHANNELS)
        generator = torch.Generator(self.device).manual_seed(1)
        grad = torch.randn(shape, generator=generator, device=self.device)
        return grad.to(self.dtype)


def token_centers(shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Centre (x, y) of every token as a fraction of the image: (S, 2)."""
    centers = []
    for height, width in shapes:
        y = (torch.arange(height) + 0.5) / height
        x = (torch.arange(width) + 0.5) / width
        centers.append(torch.cartesian_prod(y, x).flip(1))
    return torch.cat(centers)


def _ours(work: Workload) -> Operator:
    shapes, starts = work.shapes, work.starts
    return lambda value, *rest: ms_deform_attn(value, shapes, starts, *rest)


def _reference(work: Workload) -> Operator:
    shapes, starts = work.shapes, work.starts
    return lambda value, *rest: ms_deform_attn_reference(value, shapes, starts, *rest)


def _transformers(work: Workload) -> Operator:
    from transformers.models.deformable_detr import modeling_deformable_detr

    function = modeling_deformable_detr.MultiScaleDeformableAttention()
    levels = work.shapes
    shapes, starts = (torch.tensor(x, device=work.device) for x in (levels, work.starts))
    return lambda value, *rest: function(value, shapes, levels, starts, *rest, 64)


def _deformops(work: Workload) -> Operator:
    from deformops.registry import msda

    shapes, starts = (torch.tensor(x, device=work.device) for x in (work.shapes, work.starts))
    # The backend, and the type it sums in, are its own choice for this GPU.
    return lambda value, *rest: msda(value, shapes, starts, *rest, method="linear")


def _msda_triton(work: Workload) -> Operator:
    from msda_triton import frontend

    if work.dtype == torch.bfloat16:
        raise UserError("it has no kernels for bfloat16.")
    # Its usual entrance goes over to plain PyTorch without a word where a kernel fails.
    function = frontend.triton_multiscale_deformable_attention
    shapes = torch.tensor(work.shapes, device=work.device)
    return lambda value, *rest: function(value, shapes, *rest, "zeros", False).flatten(2)


def _grid_sample_alone(work: Workload) -> Operator:
    """As a measure, the one call of grid_sample for the first of the four levels."""
    value, locations, _ = work.make_inputs()
    (height, width), *_ = work.shapes
    maps = value[:, : height * width].permute(0, 2, 3, 1).reshape(-1, CHANNELS, height, width)
    maps.requires_grad_(work.direction != FORWARD)
    grid = (2 * locations[:, :, :, 0] - 1).transpose(1, 2).flatten(0, 1).contiguous()
    return lambda *_: F.grid_sample(maps, grid, align_corners=False)


# The first one that is there is what the others are compared with.
IMPLEMENTATIONS = {
    "transformers": _transformers,
    "reference": _reference,
    "deformops": _deformops,
    "msda-triton": _msda_triton,
    OURS: _ours,
}
FOR_CUDA = ("deformops", "msda-triton")


def make_run(
    operator: Operator, work: Workload, dtype: torch.dtype | None = None
) -> Callable[[], list[Tensor]]:
    """One call, which returns the output, and with its direction BACKWARD three gradients.

    Args:
        operator: what is called.
        work: says with what.
        dtype: brings the numbers, rounded to the workload's type, to another one.
    """
    inputs = [x.to(dtype or work.dtype) for x in work.make_inputs()]
    for x in inputs:
        x.requires_grad_(work.direction != FORWARD)
    if work.direction != BACKWARD:
        return lambda: [operator(*inputs)]
    grad = work.make_grad_output().to(inputs[0])

    def run() -> list[Tensor]:
        output = operator(*inputs)
        return [output, *torch.autograd.grad(output, inputs, grad)]

    return run


def prepare(name: str, work: Workload) -> Prepared:
    """An implementation with its inputs."""
    if name == GRID_SAMPLE:
        return Prepared(make_run(_grid_sample_alone(work), work))
    make = IMPLEMENTATIONS[name]
    # Loads what the operator needs before memory is measured.
    small = Workload(1, 1, (64, 64), work.dtype, work.device, BACKWARD)
    make_run(make(small), small)()
    run = make_run(make(work), work)
    limit = None if work.queries == 1 else partial(least_seconds, work)
    return Prepared(run, run, TOLERANCES[work.dtype], limit)


def prepare_module(name: str, work: Workload) -> Prepared:
    """The module around the operator without gradients, with its projections.

    It computes locations and weights in the operator, and "in steps" before it.
    """
    torch.manual_seed(0)
    module = MSDeformAttn(HEADS * CHANNELS, HEADS, len(STRIDES), POINTS)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    torch.nn.init.normal_(module.attention_weights.weight, std=0.1)
    module = module.to(work.device, work.dtype)
    if name != OURS:
        module.operator = lambda *arguments: ms_deform_attn(*arguments)
    tokens = work.make_inputs()[0].flatten(2)
    query = work.make_grad_output()
    if work.queries is None:
        reference = token_centers(work.shapes).to(work.device).expand(work.batch, -1, -1)
    else:
        reference = torch.rand(work.batch, work.queries, 2, device=work.device)
    reference = reference[:, :, None].expand(-1, -1, len(STRIDES), -1).contiguous()

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [module(query, reference, tokens, work.shapes, work.starts)]

    return Prepared(run, run, TOLERANCES[work.dtype])


def expected(work: Workload) -> list[Tensor]:
    """The formulation in plain PyTorch, in float32, with the same rounded numbers."""
    return make_run(_reference(work), work, torch.float32)()


def least_seconds(work: Workload) -> float:
    """Time for reading what a pass reads, and writing what it writes, once."""
    inputs = sum(x.nbytes for x in work.make_inputs())
    output = work.make_grad_output().nbytes
    once = inputs + output
    # Backward reads inputs and gradient, and writes gradients of the inputs.
    moved = once if work.direction != BACKWARD else 2 * once + inputs
    return moved / copy_bandwidth(work.device)


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second that are read and written by the copy of a large tensor."""
    source = torch.zeros(1 << (30 if device == "cuda" else 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    times = [kernel_seconds(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * source.nbytes / statistics.median(times)


def cases(device: str, sizes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]):
    """Encoder and decoder, and the host's time of a call with a single query."""
    names = [name for name in IMPLEMENTATIONS if device == "cuda" or name not in FOR_CUDA]
    for size, dtype in itertools.product(sizes, dtypes):
        batches = (1, 4) if device == "cuda" else (1, 2) if dtype == torch.float32 else (1,)
        for queries, batch, direction in itertools.product(
            (None, DECODER_QUERIES), batches, (FORWARD, BACKWARD)
        ):
            work = Workload(queries, batch, size, dtype, device, direction)
            pixels = 0 if queries else batch * size[0] * size[1] / (800 * 1066)
            yield Case(
                f"{'decoder' if queries else 'encoder'}, {size[0]}x{size[1]}, batch {batch}, "
                f"{str(dtype).removeprefix('torch.')}, {direction}",
                {name: partial(prepare, name, work) for name in names},
                seconds=0.5 + pixels * (2.5 if direction == BACKWARD else 0.8),
                memory=(queries, batch, direction, dtype) == (None, 1, BACKWARD, dtypes[0]),
                short=True,
                timer=kernel_seconds,
                expected=partial(expected, work),
            )
        for queries in (None, DECODER_QUERIES):
            work = Workload(queries, 1, size, dtype, device, FORWARD)
            pixels = 0 if queries else size[0] * size[1] / (800 * 1066)
            yield Case(
                f"{'decoder' if queries else 'encoder'}, {size[0]}x{size[1]}, batch 1, "
                f"{str(dtype).removeprefix('torch.')}, module",
                {name: partial(prepare_module, name, work) for name in ("in steps", OURS)},
                seconds=0.5 + pixels,
                short=True,
                timer=kernel_seconds,
            )
    for direction in (FORWARD, RECORDED):
        work = Workload(1, 1, (64, 64), torch.float32, device, direction)
        yield Case(
            f"host time, one query, {direction}",
            {name: partial(prepare, name, work) for name in ("transformers", GRID_SAMPLE, OURS)},
            seconds=0.5,
            short=True,
            expected=partial(expected, work),
        )
