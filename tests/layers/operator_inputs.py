"""Inputs of the operator, and the definition that it is held to."""

from ddetr_d2.layers import (
    MSDeformAttn,
    ms_deform_attn,
    ms_deform_attn_reference,
)
from ddetr_d2.layers.ms_deform_attn import LIBRARIES

import pytest
import torch
from torch import nn

needs_extension = pytest.mark.skipif(
    not LIBRARIES[0].exists(), reason="the operator is not compiled"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
IMPLEMENTATIONS = [ms_deform_attn, ms_deform_attn_reference]
SHAPES = [(5, 7), (3, 4), (1, 1)]


def level_starts(shapes):
    starts = [0]
    for height, width in shapes[:-1]:
        starts.append(starts[-1] + height * width)
    return starts


def make_inputs(
    batch=2,
    queries=5,
    heads=2,
    channels=3,
    points=2,
    shapes=SHAPES,
    dtype=torch.float64,
    seed=0,
    device="cpu",
):
    """Value, locations (a third of them outside the map) and weights."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(height * width for height, width in shapes)
    levels = len(shapes)
    value = torch.randn(batch, tokens, heads, channels, generator=generator, dtype=torch.float64)
    locations = torch.rand(
        batch, queries, heads, levels, points, 2, generator=generator, dtype=torch.float64
    )
    weights = torch.randn(
        batch, queries, heads, levels, points, generator=generator, dtype=torch.float64
    )
    return [x.to(device, dtype) for x in (value, locations * 1.6 - 0.3, weights)]


def by_definition(value, shapes, locations, weights):
    """The definition, pixel by pixel: every pixel counts by the product of two triangles."""
    device = value.device
    value, locations, weights = value.cpu(), locations.cpu(), weights.cpu()
    batch, _, heads, channels = value.shape
    _, queries, _, levels, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads, channels, dtype=torch.float64)
    for n in range(batch):
        for q in range(queries):
            for m in range(heads):
                first_token = 0
                for (height, width), level in zip(shapes, range(levels), strict=True):
                    for k in range(points):
                        x = locations[n, q, m, level, k, 0].item() * width - 0.5
                        y = locations[n, q, m, level, k, 1].item() * height - 0.5
                        if not (-1 < x < width and -1 < y < height):
                            continue
                        for row in range(height):
                            for column in range(width):
                                share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                                pixel = value[n, first_token + row * width + column, m]
                                output[n, q, m] += weights[n, q, m, level, k] * share * pixel
                    first_token += height * width
    return output.flatten(2).to(device)


def gradients(function, value, shapes, locations, weights, grad_output=None):
    inputs = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    output = function(inputs[0], shapes, level_starts(shapes), inputs[1], inputs[2])
    if grad_output is None:
        generator = torch.Generator().manual_seed(9)
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(grad_output.to(output))
    return [tensor.grad for tensor in inputs]


def make_module_inputs(reference_dim=2, shapes=SHAPES, batch=2, queries=5, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    tokens = sum(height * width for height, width in shapes)
    query = torch.randn(batch, queries, 16, generator=generator)
    reference = torch.rand(batch, queries, len(shapes), reference_dim, generator=generator)
    values = torch.randn(batch, tokens, 16, generator=generator)
    mask = torch.rand(batch, tokens, generator=generator) > 0.8
    query, reference, values, mask = (x.to(device) for x in (query, reference, values, mask))
    return query, reference, values, shapes, level_starts(shapes), mask


def make_module(device="cpu"):
    torch.manual_seed(0)
    module = MSDeformAttn(embed_dim=16, num_heads=4, num_levels=3, num_points=2)
    nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    nn.init.normal_(module.attention_weights.weight, std=0.1)
    return module.to(device)
