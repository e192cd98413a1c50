"""The operator with values of 16 bits: read exactly, summed in float, rounded once."""

from ddetr_d2.layers import ms_deform_attn, ms_deform_attn_reference

import pytest
import torch

from .operator_inputs import (
    IMPLEMENTATIONS,
    SHAPES,
    by_definition,
    gradients,
    level_starts,
    make_inputs,
    needs_extension,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("locations_dtype", ["same", "float32"])
def test_16_bit_types(function, dtype, locations_dtype, device):
    value, locations, weights = (
        tensor.to(dtype) for tensor in make_inputs(channels=8, device=device)
    )
    if locations_dtype == "float32":
        locations, weights = locations.float(), weights.float()
    output = function(value, SHAPES, level_starts(SHAPES), locations, weights)
    assert output.dtype == dtype
    exact = by_definition(value.double(), SHAPES, locations.double(), weights.double())
    torch.testing.assert_close(output.double(), exact, atol=2e-2, rtol=1e-2)

    grads = gradients(function, value, SHAPES, locations, weights)
    exact = gradients(
        ms_deform_attn_reference, value.double(), SHAPES, locations.double(), weights.double()
    )
    for grad, expected, like in zip(grads, exact, (value, locations, weights), strict=True):
        assert grad.dtype == like.dtype
        error = (grad.double() - expected).norm() / expected.norm()
        assert error < 1e-2


def all_numbers(dtype, device):
    """Each of the 65,536 bit patterns, as values (1, 1, 2048, 32) of a single pixel."""
    numbers = torch.arange(2**16).to(torch.uint16).view(dtype)
    return numbers.view(1, 1, 2048, 32).to(device)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", [1.0, 1.0 + 2**-8 + 2**-20, 1.37, 0.51, -(2.0**-9), 2.0**9])
def test_every_number_is_read_exactly_and_rounded_once(dtype, weight, device):
    value = all_numbers(dtype, device)
    locations = torch.full((1, 1, 2048, 1, 1, 2), 0.5, device=device)
    weights = torch.full((1, 1, 2048, 1, 1), weight, device=device)
    output = ms_deform_attn(value, [(1, 1)], [0], locations, weights).view(value.shape)
    expected = (value.float() * weight).to(dtype)
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    # The same of the gradients of values, whose sums lie in two halves meanwhile.
    value.requires_grad_()
    output = ms_deform_attn(value, [(1, 1)], [0], locations, weights)
    (grad,) = torch.autograd.grad(output, value, all_numbers(dtype, device).view(output.shape))
    torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)
