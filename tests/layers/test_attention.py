"""The module around the operator."""

import math
import subprocess
import sys

from ddetr_d2.layers import MSDeformAttn
from ddetr_d2.layers.ms_deform_attn import can_fuse, ms_deform_attn_fused

import pytest
import torch

from .operator_inputs import (
    SHAPES,
    by_definition,
    level_starts,
    make_inputs,
    make_module,
    make_module_inputs,
    needs_extension,
)


def test_initial_values():
    module = MSDeformAttn(embed_dim=32, num_heads=8, num_levels=2, num_points=3)
    assert module.sampling_offsets.weight.shape == (8 * 2 * 3 * 2, 32)
    assert module.attention_weights.weight.shape == (8 * 2 * 3, 32)
    assert (module.sampling_offsets.weight == 0).all()
    assert (module.attention_weights.weight == 0).all()
    assert (module.attention_weights.bias == 0).all()
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    offsets = module.sampling_offsets.bias.detach().view(8, 2, 3, 2)
    for m, direction in enumerate(directions):
        for level in range(2):
            for k in range(3):
                expected = torch.tensor(direction, dtype=torch.float32) * (k + 1)
                torch.testing.assert_close(offsets[m, level, k], expected, atol=1e-5, rtol=0)
    bound = math.sqrt(6 / (32 + 32))
    for projection in (module.value_proj, module.output_proj):
        assert (projection.bias == 0).all()
        assert 0.9 * bound < projection.weight.abs().max() <= bound


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_module_follows_the_definition(reference_dim, device):
    module = make_module(device).double()
    inputs = make_module_inputs(reference_dim, device=device)
    query, reference, values = (tensor.double() for tensor in inputs[:3])
    shapes, starts, mask = inputs[3:]

    offsets = module.sampling_offsets(query).view(2, 5, 4, 3, 2, 2)
    weights = module.attention_weights(query).view(2, 5, 4, 6).softmax(-1).view(2, 5, 4, 3, 2)
    locations = torch.zeros_like(offsets)
    for level, (height, width) in enumerate(shapes):
        for axis, size in enumerate((width, height)):
            point = reference[:, :, level, axis, None, None]
            offset = offsets[:, :, :, level, :, axis]
            if reference_dim == 2:
                locations[:, :, :, level, :, axis] = point + offset / size
            else:
                extent = reference[:, :, level, 2 + axis, None, None]
                locations[:, :, :, level, :, axis] = point + offset / 2 * extent * 0.5
    value = module.value_proj(values)
    value[mask] = 0
    expected = by_definition(value.view(2, -1, 4, 4), shapes, locations, weights)
    expected = module.output_proj(expected)
    output = module(query, reference, values, shapes, starts, mask)
    torch.testing.assert_close(output, expected)
    as_tensors = module(query, reference, values, torch.tensor(shapes), torch.tensor(starts), mask)
    assert torch.equal(as_tensors, output)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reference_dim", [2, 4])
def test_locations_and_softmax_inside_of_the_operator(reference_dim, dtype, device):
    """Without gradients the operator computes them itself."""
    value, offsets, logits = make_inputs(queries=9, channels=8, dtype=dtype, device=device)
    reference = torch.rand(2, 9, len(SHAPES), reference_dim, dtype=torch.float64).to(offsets)
    shift = reference[:, :, None, :, None].double()
    if reference_dim == 2:
        scale = 1 / torch.tensor(SHAPES, device=device).flip(1)[:, None].double()
    else:
        scale = shift[..., 2:] / (2 * offsets.shape[4])
    locations = shift[..., :2] + offsets.double() * scale
    weights = logits.double().flatten(-2).softmax(-1).view(logits.shape)
    expected = by_definition(value.double(), SHAPES, locations, weights)
    assert can_fuse(value) is False
    with torch.no_grad():
        assert can_fuse(value)
        arguments = value, SHAPES, level_starts(SHAPES), reference, offsets, logits
        output = ms_deform_attn_fused(*arguments)
    assert output.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    assert (output.double() - expected).norm() < tolerance * expected.norm()


def test_training_after_inference_of_the_same_size():
    module = MSDeformAttn(embed_dim=16, num_heads=4, num_levels=3, num_points=1)
    inputs = make_module_inputs(shapes=[(3, 9), (2, 5), (1, 2)])
    with torch.inference_mode():
        module.sampling(inputs[0], inputs[1], inputs[3])
    module(*inputs).sum().backward()
    assert module.sampling_offsets.weight.grad.isfinite().all()


@pytest.mark.parametrize("positions", [1, 2])
def test_position_is_added_to_the_query(positions, device):
    module = make_module(device)
    query, reference, values, shapes, *rest = make_module_inputs(device=device)
    position = torch.randn(positions, *query.shape[1:], device=device)
    expected = module(query + position, reference, values, shapes, *rest)
    torch.testing.assert_close(
        module(query, reference, values, shapes, *rest, position=position), expected
    )
    for a, b in zip(
        module.sampling(query, reference, shapes, position),
        module.sampling(query + position, reference, shapes),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_padding_has_no_influence(device):
    module = make_module(device)
    query, reference, values, shapes, starts, mask = make_module_inputs(device=device)
    output = module(query, reference, values, shapes, starts, mask)
    changed = values.masked_fill(mask[..., None], 1e4)
    assert torch.equal(module(query, reference, changed, shapes, starts, mask), output)
    nothing_padded = module(query, reference, values, shapes, starts, torch.zeros_like(mask))
    assert torch.equal(module(query, reference, values, shapes, starts), nothing_padded)


def test_module_errors():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads = 8, got 30"):
        MSDeformAttn(embed_dim=30, num_heads=8)
    with pytest.raises(ValueError, match="num_points must be at least 1, got 0"):
        MSDeformAttn(num_points=0)
    module = make_module()
    query, reference, values, shapes, starts, mask = make_module_inputs()
    with pytest.raises(ValueError, match="spatial_shapes: expected 3 levels"):
        module(query, reference, values, shapes[:2], starts, mask)
    with pytest.raises(ValueError, match="reference_points: expected shape"):
        module(query, reference[:, :, :2], values, shapes, starts, mask)
    with pytest.raises(ValueError, match="reference_points: expected shape"):
        module(query, reference[..., :1], values, shapes, starts, mask)
    with pytest.raises(ValueError, match="padding_mask: expected a bool tensor"):
        module(query, reference, values, shapes, starts, mask[:, :-1])
    with pytest.raises(ValueError, match="padding_mask: expected a bool tensor"):
        module(query, reference, values, shapes, starts, mask.float())
    with pytest.raises(ValueError, match="value: expected S"):
        module(query, reference, values[:, :-1], shapes, starts, mask[:, :-1])


@needs_extension
def test_without_the_extension_it_says_so_once_and_works():
    program = """
import torch
load_library = torch.ops.load_library
def fail(path):
    if "ops_cpu" in str(path):
        raise OSError(f"{path}: undefined symbol: torch_parallel_for")
    load_library(path)
torch.ops.load_library = fail
from ddetr_d2.layers import MSDeformAttn
module = MSDeformAttn(16, 4, 1, 2)
for _ in range(2):
    query, points, tokens = torch.rand(1, 3, 16), torch.rand(1, 3, 1, 2), torch.rand(1, 6, 16)
    output = module(query, points, tokens, [(2, 3)], [0])
    output.sum().backward()
print(tuple(output.shape))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3, 16)"
    assert done.stderr.count("ms_deform_attn on cpu: plain PyTorch") == 1
    assert "undefined symbol: torch_parallel_for). It needs torch 2.10 or newer" in done.stderr


def test_softmax_under_autocast_is_in_float32():
    module = make_module("cpu")
    weights = []

    def operator(value, shapes, starts, locations, given):
        weights.append(given)
        return value.new_zeros(*locations.shape[:2], value.shape[2] * value.shape[3])

    module.operator = operator
    with torch.autocast("cpu", torch.bfloat16):
        module(*make_module_inputs(2))
    torch.testing.assert_close(weights[0].sum((-2, -1)), torch.ones(2, 5, 4), atol=1e-6, rtol=0)
