"""Formulations of the sampling in standard operators, against the definition."""

from ddetr_d2.export.sampling import sample_with_gather, sample_with_grid_sample
from ddetr_d2.layers import ms_deform_attn_reference

import pytest
import torch

SHAPES = [(7, 5), (1, 3), (2, 1)]
STARTS = [0, 35, 38]


def make_inputs(low, high):
    generator = torch.Generator().manual_seed(0)
    options = {"dtype": torch.float64, "generator": generator}
    value = torch.randn(2, 40, 3, 4, **options)
    locations = torch.rand(2, 11, 3, 3, 2, 2, **options) * (high - low) + low
    weights = torch.rand(2, 11, 3, 3, 2, **options)
    return value, SHAPES, STARTS, locations, weights


@pytest.mark.parametrize("sample", [sample_with_grid_sample, sample_with_gather])
@pytest.mark.parametrize("low, high", [(0, 1), (-0.5, 1.5), (2, 3), (-1e30, 1e30)])
def test_equals_the_definition_inside_and_outside(sample, low, high):
    inputs = make_inputs(low, high)
    torch.testing.assert_close(sample(*inputs), ms_deform_attn_reference(*inputs))


@pytest.mark.parametrize("sample", [sample_with_grid_sample, sample_with_gather])
def test_pixel_centres_borders_and_corners(sample):
    value, shapes, starts, _, weights = make_inputs(0, 1)
    steps = torch.arange(11, dtype=torch.float64) / 10  # includes 0, 1 and centres of pixels
    locations = torch.stack((steps, steps.flip(0)), dim=-1)[None, :, None, None, None]
    locations = locations.expand(2, 11, 3, 3, 2, 2)
    inputs = value, shapes, starts, locations, weights
    torch.testing.assert_close(sample(*inputs), ms_deform_attn_reference(*inputs))
