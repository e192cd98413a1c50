"""DETR's own parts, and what it refuses."""

import math

from ddetr_d2.errors import UserError
from ddetr_d2.modeling.deformable_layers import DeformableEncoderLayer, SeparateLevelsEncoderLayer
from ddetr_d2.modeling.dense_layers import DenseDecoderLayer, DenseEncoderLayer
from ddetr_d2.modeling.feature_levels import FeatureLevels
from ddetr_d2.modeling.transformer import TransformerSize

import pytest
import torch

from ..conftest import TINY
from .test_deformable_detr import build, make_input

SIZE = TransformerSize(hidden_dim=8, num_heads=2, dim_feedforward=16, dropout=0.1)
NODE = "MODEL.DEFORMABLE_DETR."


def make_levels(shapes, padded=None):
    """One image; ``padded`` are the tokens on padding."""
    torch.manual_seed(0)
    count = sum(height * width for height, width in shapes)
    mask = None
    if padded is not None:
        mask = torch.zeros(1, count, dtype=torch.bool)
        mask[0, padded] = True
    starts = [0]
    for height, width in shapes[:-1]:
        starts.append(starts[-1] + height * width)
    return FeatureLevels(
        tokens=torch.randn(1, count, 8, dtype=torch.float64),
        position=torch.randn(1, count, 8, dtype=torch.float64),
        padding_mask=mask,
        spatial_shapes=tuple(shapes),
        level_start_index=tuple(starts),
        valid_sizes=torch.tensor([[[w, h] for h, w in shapes]], dtype=torch.float64),
    )


def slow_attention(attention, query, key, value, keys):
    """Multi-head attention of single vectors, one head and one query after the other."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    (wq, wk, wv), (bq, bk, bv) = weight.chunk(3), bias.chunk(3)
    outputs = []
    for q in query:
        heads = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            mine = (wq @ q + bq)[part]
            scores = {s: mine @ (wk @ key[s] + bk)[part] / math.sqrt(4) for s in keys}
            total = sum(score.exp() for score in scores.values())
            heads.append(sum(scores[s].exp() / total * (wv @ value[s] + bv)[part] for s in keys))
        outputs.append(attention.out_proj.weight @ torch.cat(heads) + attention.out_proj.bias)
    return torch.stack(outputs)


@torch.no_grad()
def test_attention_of_both_layers_leaves_padding_out():
    levels = make_levels([(2, 3)], padded=[2, 5])
    tokens, position = levels.tokens[0], levels.position[0]
    layer = DenseEncoderLayer(SIZE).double().eval()
    keys = [0, 1, 3, 4]
    moved = tokens + position
    expected = slow_attention(layer.self_attn, moved, moved, tokens, keys)
    torch.testing.assert_close(layer.attend(levels.tokens, levels)[0], expected)

    layer = DenseDecoderLayer(SIZE).double().eval()
    query = torch.randn(1, 4, 8, dtype=torch.float64)
    expected = slow_attention(layer.cross_attn, query[0], moved, tokens, keys)
    torch.testing.assert_close(layer.attend(query, None, levels.tokens, levels)[0], expected)


@torch.no_grad()
def test_separate_levels_are_attended_to_each_by_itself():
    levels = make_levels([(4, 6), (2, 3)])
    layer = SeparateLevelsEncoderLayer(SIZE, 2).double().eval()
    single = DeformableEncoderLayer(SIZE, 1, 2).double().eval()
    single.load_state_dict(layer.state_dict())
    whole = layer(levels.tokens, levels)
    for piece, level in levels.separate(levels.tokens):
        start = 0 if level.spatial_shapes == ((4, 6),) else 24
        alone = single(piece, level)
        torch.testing.assert_close(whole[:, start : start + alone.shape[1]], alone)
    # Changes of one level do not reach the other.
    tokens = levels.tokens.clone()
    tokens[:, 24:] += 1
    torch.testing.assert_close(layer(tokens, levels)[:, :24], whole[:, :24])


@torch.no_grad()
def test_positions_have_no_half_pixel():
    model = build("detr", *TINY)
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :, 32:] = True  # one column of the two is padding
    feature = torch.randn(1, model.projection.input_proj[0][0].in_channels, 2, 2)
    levels = model.projection([feature], mask)
    # y = 1/2 of the first row and 1 of the second; x = 1 of the only column that is there.
    y = torch.tensor([0.5, 0.5, 1.0, 1.0])
    torch.testing.assert_close(
        levels.position[0, :, 0], (2 * math.pi * y).sin(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        levels.position[0, ::2, 33],
        torch.ones(2),
        rtol=1e-4,
        atol=1e-5,  # cos(2 pi x)
    )
    assert levels.padding_mask.tolist() == [[False, True, False, True]]
    assert model.projection.level_embed is None


@torch.no_grad()
def test_padding_does_not_change_detections():
    torch.manual_seed(0)
    model = build("detr", *TINY).eval()
    small, large = make_input(64, 64, []), make_input(96, 128, [])
    alone = model([small])[0]["instances"]
    beside = model([small, large])[0]["instances"]
    # The backbone, whose padding is zeros as well, sees the same but at the lower right border.
    assert (alone.scores - beside.scores).abs().max() < 0.05
    assert alone.scores.std() > 0


@pytest.mark.parametrize(
    "opts, message",
    [
        (["WITH_BOX_REFINE", "True"], "WITH_BOX_REFINE is True, but DETR does not have that"),
        (["TWO_STAGE", "True"], "TWO_STAGE is True, but DETR does not have that"),
        (["NUM_FEATURE_LEVELS", "4"], "NUM_FEATURE_LEVELS is 4 and IN_FEATURES res5: DETR reads"),
        (["CLASS_LOSS", "hinge"], "CLASS_LOSS is 'hinge'; expected one of focal, cross_entropy"),
        (["IN_FEATURES", "['res9']"], "IN_FEATURES names res9, but the backbone gives res5"),
    ],
)
def test_what_it_does_not_have(opts, message):
    with pytest.raises(UserError, match=message):
        build("detr", *TINY, NODE + opts[0], opts[1])
