"""The operator on a GPU: what is not in the tests for all devices."""

import math

from ddetr_d2.layers import ms_deform_attn, ms_deform_attn_reference

import pytest
import torch

from .operator_inputs import SHAPES, gradients, level_starts, make_inputs, needs_gpu


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("channels", [1, 5, 32, 40])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        (torch.float64, 1e-11),
        (torch.float32, 1e-5),
        (torch.float16, 1e-2),
        (torch.bfloat16, 1e-2),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gpu_follows_the_reference(channels, dtype, tolerance, deterministic):
    inputs = [
        tensor.to("cuda", dtype) for tensor in make_inputs(queries=50, heads=3, channels=channels)
    ]
    inputs[1].view(-1)[::7] = math.nan
    starts = level_starts(SHAPES)
    exact = [tensor.cpu().double() for tensor in inputs]
    expected = [ms_deform_attn_reference(exact[0], SHAPES, starts, *exact[1:])]
    expected += gradients(ms_deform_attn_reference, exact[0], SHAPES, *exact[1:])
    results = []
    try:
        torch.use_deterministic_algorithms(deterministic)
        for _ in range(2):
            output = ms_deform_attn(inputs[0], SHAPES, starts, *inputs[1:])
            results.append([output, *gradients(ms_deform_attn, inputs[0], SHAPES, *inputs[1:])])
    finally:
        torch.use_deterministic_algorithms(False)
    for got, target in zip(results[0], expected, strict=True):
        assert got.dtype == dtype
        assert (got.cpu().double() - target).norm() <= tolerance * target.norm()
    if deterministic:
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)


@pytest.mark.gpu
@needs_gpu
def test_tensors_on_two_devices():
    value, locations, weights = make_inputs(device="cuda")
    starts = level_starts(SHAPES)
    with pytest.raises(ValueError, match="sampling_locations: expected device cuda"):
        ms_deform_attn(value, SHAPES, starts, locations.cpu(), weights)
    with pytest.raises(ValueError, match="sampling_locations: expected device cpu"):
        ms_deform_attn(value.cpu(), SHAPES, starts, locations, weights)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gpu_tensors_at_odd_addresses(dtype):
    """Vectors are read at addresses that are multiples of their size only."""
    aligned = [tensor.to("cuda", dtype) for tensor in make_inputs(channels=32)]
    shifted = []
    for tensor in aligned:
        storage = torch.empty(tensor.numel() + 1, dtype=dtype, device="cuda")
        shifted.append(storage[1:].view(tensor.shape).copy_(tensor))
    starts = level_starts(SHAPES)
    expected = ms_deform_attn(aligned[0], SHAPES, starts, *aligned[1:])
    assert torch.equal(ms_deform_attn(shifted[0], SHAPES, starts, *shifted[1:]), expected)
    assert torch.equal(
        gradients(ms_deform_attn, shifted[0], SHAPES, *shifted[1:])[1],
        gradients(ms_deform_attn, aligned[0], SHAPES, *aligned[1:])[1],
    )
