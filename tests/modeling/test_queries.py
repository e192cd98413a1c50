"""Which tokens of the encoder make proposals."""

from ddetr_d2.modeling.deformable_detr import level_projections
from ddetr_d2.modeling.feature_levels import FeatureLevels, FeatureProjection
from ddetr_d2.modeling.heads import DetectionHead
from ddetr_d2.modeling.queries import EncoderProposals

import pytest
import torch

STRIDES = (8, 16, 32, 64)


def make_levels(sizes: list[tuple[int, int]], dtype: torch.dtype) -> FeatureLevels:
    """Four levels of images of these heights and widths, padded to one size."""
    height, width = (max(lengths) for lengths in zip(*sizes, strict=True))
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for image, (h, w) in zip(mask, sizes, strict=True):
        image[:h, :w] = False
    features = [
        torch.randn(len(sizes), 32, -(-height // stride), -(-width // stride), dtype=dtype)
        for stride in STRIDES
    ]
    projection = FeatureProjection(level_projections([32] * 4, 4, 32), 32).to(dtype)
    return projection(features, mask if mask.any() else None)


def makes_proposal(index: int, count: int) -> bool:
    """Whether 0.01 < (index + 1/2) / count < 0.99, in whole numbers."""
    return count < 50 * (2 * index + 1) < 99 * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "sizes",
    [
        [(160, 400), (192, 520)],  # 50 tokens at stride 8, next to padding
        [(520, 192), (395, 160)],
        [(785, 136), (480, 792), (1184, 400)],  # 50 at stride 16
        [(136, 1196), (264, 1200), (250, 1333)],  # 150 at stride 8
        [(400, 1200)],  # the same without padding
        [(800, 1333)],
        [(30, 40), (24, 64)],
    ],
)
def test_tokens_near_the_border(sizes, dtype):
    """A centre that is at 0.01 or 0.99 exactly makes none."""
    levels = make_levels(sizes, dtype)
    proposals = EncoderProposals(5, 32, DetectionHead(32, 2)).to(dtype)
    with torch.no_grad():
        boxes = proposals(levels.tokens, levels).proposals.boxes
    masks = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    if levels.padding_mask is not None:
        masks = levels.padding_mask
    expected = torch.full(boxes.shape[:2], False)
    on_the_limit = 0
    for level, (start, (height, width)) in enumerate(
        zip(levels.level_start_index, levels.spatial_shapes, strict=True)
    ):
        for image, mask in enumerate(masks[:, start : start + height * width]):
            grid = ~mask.view(height, width)
            columns, rows = int(grid[0].sum()), int(grid[:, 0].sum())
            on_the_limit += (columns in (50, 150)) + (rows in (50, 150))
            assert levels.valid_sizes[image, level].tolist() == [columns, rows]
            for y in range(rows):
                for x in range(columns):
                    inside = makes_proposal(x, columns) and makes_proposal(y, rows)
                    expected[image, start + y * width + x] = inside
    assert on_the_limit or sizes == [(30, 40), (24, 64)]
    # The head of a new model adds nothing to an anchor; what makes no proposal is at infinity.
    assert torch.equal((boxes < 1).all(-1), expected)
