"""Tokens, masks, valid ratios and positions."""

import math

from ddetr_d2.layers import sine_position_embedding
from ddetr_d2.modeling.deformable_detr import level_projections
from ddetr_d2.modeling.feature_levels import FeatureProjection

import pytest
import torch
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrEncoder


def test_position_embedding_feature_by_feature():
    mask = torch.zeros(1, 3, 5, dtype=torch.bool)
    mask[:, 2:] = True  # 2 rows and 4 columns are image
    mask[:, :, 4:] = True
    embedding = sine_position_embedding(mask, 8)
    for y in range(2):
        for x in range(4):
            expected = []
            for position in ((y + 0.5) / 2, (x + 0.5) / 4):
                for i in range(2):
                    angle = position * 2 * math.pi / 10000 ** (2 * i / 4)
                    expected += [math.sin(angle), math.cos(angle)]
            assert embedding[0, y, x].tolist() == pytest.approx(expected, abs=1e-5)


def test_levels_of_a_padded_batch():
    projection = FeatureProjection(level_projections([8, 16], 4, 32), 32)
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 40:] = True
    mask[1, :, 48:] = True
    levels = projection([torch.randn(2, 8, 8, 12), torch.randn(2, 16, 4, 6)], mask)
    assert levels.spatial_shapes == ((8, 12), (4, 6), (2, 3), (1, 2))
    assert levels.level_start_index == (0, 96, 120, 126)
    assert levels.tokens.shape == levels.position.shape == (2, 128, 32)
    sizes = torch.tensor([[[12, 8], [6, 4], [3, 2], [2, 1]], [[6, 5], [3, 3], [2, 2], [1, 1]]])
    assert torch.equal(levels.valid_sizes, sizes.float())
    ratios = torch.tensor([[6 / 12, 5 / 8], [3 / 6, 3 / 4], [2 / 3, 1.0], [1 / 2, 1.0]])
    torch.testing.assert_close(levels.valid_ratios, torch.stack((torch.ones(4, 2), ratios)))
    assert levels.padding_mask[0].sum() == 0
    assert (~levels.padding_mask[1]).sum() == 5 * 6 + 3 * 3 + 2 * 2 + 1

    centers = levels.token_centers()
    torch.testing.assert_close(centers[0, 13], torch.tensor([1.5 / 12, 1.5 / 8]))
    torch.testing.assert_close(centers[1, 13], torch.tensor([1.5 / 6, 1.5 / 5]))
    torch.testing.assert_close(centers[1, 97], torch.tensor([1.5 / 3, 0.5 / 3]))


def test_reference_points_are_those_of_transformers_to_the_last_bit():
    """Samples of a new model lie on centres of pixels, where rounding decides on gradients."""
    projection = FeatureProjection(level_projections([8], 2, 32), 32)
    mask = torch.zeros(4, 200, 300, dtype=torch.bool)
    for image, (height, width) in enumerate([(200, 300), (115, 184), (93, 217), (8, 41)]):
        mask[image, height:] = True
        mask[image, :, width:] = True
    levels = projection([torch.randn(4, 8, 100, 150)], mask)
    expected = DeformableDetrEncoder.get_reference_points(
        levels.spatial_shapes, levels.valid_ratios, mask.device
    )
    assert torch.equal(levels.reference_points, expected)
    centers = levels.token_centers()[:, :, None] * levels.valid_ratios[:, None]
    torch.testing.assert_close(centers, expected)


def test_level_embedding_is_added_to_the_position():
    projection = FeatureProjection(level_projections([8], 2, 32), 32)
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    before = projection([torch.randn(1, 8, 4, 4)], mask).position
    with torch.no_grad():
        projection.level_embed[1] += 1.0
    after = projection([torch.randn(1, 8, 4, 4)], mask).position
    torch.testing.assert_close(after[:, :16], before[:, :16])
    torch.testing.assert_close(after[:, 16:], before[:, 16:] + 1.0)


def test_initialisation():
    projection = FeatureProjection(level_projections([8], 2, 32), 32)
    for convolution, norm in projection.input_proj:
        assert norm.num_groups == 32
        assert convolution.bias.abs().sum() == 0
        fan_in, fan_out = (math.prod(convolution.weight.shape[i::]) for i in (1, 2))
        fan_out *= convolution.out_channels
        assert convolution.weight.abs().max() <= math.sqrt(6 / (fan_in + fan_out))
