"""Where DETR looks: the weights are those of the layer, and the cells lie on the right pixels."""

from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError
from ddetr_d2.visualization import AttentionRecorder, HeatMap, SamplingPanel, draw_sampling
from ddetr_d2.visualization.heat_map import heat_map

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torch import nn

from ..conftest import ROOT, TINY

OPTIONS = [
    *TINY,
    *("MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"),
    # With one head, the weights and the values give the output of the attention.
    *("MODEL.DEFORMABLE_DETR.NUM_HEADS", "1"),
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_model(setup_cfg(str(ROOT / "configs/detr.yaml"), OPTIONS)).eval()
    for layers in (model.transformer.encoder.layers, model.transformer.decoder.layers):
        for layer in layers:  # so that no two tokens get the same weight
            nn.init.normal_(layer.self_attn.in_proj_weight, std=0.1)
    return model


def record(model, attention, height, width):
    """Run the model, seen as one of images of twice the size; arguments and output of ``attention``
    as well."""
    seen = []
    hook = attention.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args, kwargs, output[0])), with_kwargs=True
    )
    inputs = {"image": torch.rand(3, height, width) * 255, "height": 2 * height, "width": 2 * width}
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        (output,) = model([inputs])
    hook.remove()
    ((query, key, value), kwargs, attended) = seen[0]
    return recorder, output["instances"], value, attended


def attended_with(attention, weights, value):
    """What the attention computes with these weights (H, W)."""
    width = attention.embed_dim
    weight, bias = attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
    return attention.out_proj(weights.flatten() @ F.linear(value[0], weight, bias)).detach()


@pytest.mark.parametrize("divisor", [0, 64])
def test_weights_of_the_decoder_are_those_of_its_last_layer(model, monkeypatch, divisor):
    monkeypatch.setattr(type(model.backbone), "size_divisibility", divisor)
    attention = model.transformer.decoder.layers[-1].cross_attn
    recorder, instances, value, attended = record(model, attention, 64, 96)
    for query in instances.queries[:3].tolist():
        look = recorder.from_query(query, instances.image_size)
        assert look.weights.shape == (2, 3 if divisor == 0 else 4)
        torch.testing.assert_close(look.weights.sum(), torch.tensor(1.0))
        assert look.cell is None
        expected = attended_with(attention, look.weights, value)
        torch.testing.assert_close(attended[0, query], expected, rtol=1e-3, atol=1e-4)


def test_weights_of_the_encoder_are_those_of_the_token_at_the_pixel(model):
    attention = model.transformer.encoder.layers[-1].self_attn
    recorder, _, value, attended = record(model, attention, 64, 96)
    looks = {}
    # Cells are 64 pixels wide in the image of twice the size.
    for pixel, token in {(0, 0): 0, (130, 70): 5, (63, 64): 3}.items():
        looks[token] = recorder.from_pixel(pixel, (128, 192))
        expected = attended_with(attention, looks[token].weights, value)
        torch.testing.assert_close(attended[0, token], expected, rtol=1e-3, atol=1e-4)
    assert looks[5].cell == (128, 64, 192, 128) and looks[5].size == (192, 128)
    assert (looks[5].weights - looks[0].weights).abs().max() > 1e-3


def test_padding_has_no_weight_and_lies_beside_the_image(model, monkeypatch):
    """80 pixels are padded to 128: four cells, of which three lie on the image or begin there."""
    monkeypatch.setattr(type(model.backbone), "size_divisibility", 64)
    attention = model.transformer.encoder.layers[-1].self_attn
    recorder, instances, *_ = record(model, attention, 64, 80)
    look = recorder.from_pixel((159, 5), (128, 160))
    assert look.size == (256, 128) and look.cell == (128, 0, 192, 64)
    for shown in (look, recorder.from_query(instances.queries[0], (128, 160))):
        assert (shown.weights[:, 3] == 0).all()
        torch.testing.assert_close(shown.weights.sum(), torch.tensor(1.0))


def test_no_encoder():
    opts = [*OPTIONS, "MODEL.DEFORMABLE_DETR.ENC_LAYERS", "0"]
    model = build_model(setup_cfg(str(ROOT / "configs/detr.yaml"), opts)).eval()
    attention = model.transformer.decoder.layers[-1].cross_attn
    recorder, instances, *_ = record(model, attention, 64, 96)
    assert recorder.from_query(instances.queries[0], (128, 192)).weights.shape == (2, 3)
    with pytest.raises(UserError, match="ENC_LAYERS is 0"):
        recorder.from_pixel((5, 5), (128, 192))


def test_a_known_attention_lies_on_the_right_pixels():
    """Projections of the identity, and keys of which one alone is like the query: row 1, column 2
    of 3 x 4 tokens, on an image of 160 x 120 pixels that is padded to 200 x 150."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.eye(8).repeat(3, 1))
    keys = torch.zeros(2, 12, 8)
    keys[0, 1 * 4 + 2] = 10.0
    arguments = {"query": torch.full((2, 5, 8), 10.0), "key": keys, "value": keys}
    look = heat_map(attention, arguments, 3, (3, 4), torch.tensor([200.0, 150.0]))
    expected = torch.zeros(3, 4)
    expected[1, 2] = 1.0
    torch.testing.assert_close(look.weights, expected)

    image = np.zeros((120, 160, 3), np.uint8)
    box = (100.0, 50.0, 150.0, 100.0)  # the cell: columns of 50 pixels, rows of 50
    for shown in (look, HeatMap(torch.ones(3, 4) / 12, (200.0, 150.0))):
        picture = draw_sampling(image, [SamplingPanel("cell", shown, box)]).astype(int)
        axes = picture[:, : int(picture.shape[1] * 0.83)]  # without the colour bar
        green = np.argwhere((axes[..., 1] > 200) & (axes[..., 0] < 50))
        yellow = np.argwhere((axes[..., 0] > 180) & (axes[..., 1] > 180) & (axes[..., 2] < 100))
        (top, left), (bottom, right) = green.min(0), green.max(0)
        inside = (yellow >= [top, left]).all(1) & (yellow <= [bottom, right]).all(1)
        if shown is look:
            assert inside.all()
            assert len(yellow) > 0.9 * (bottom - top - 4) * (right - left - 4)
        else:  # the whole image, without its padding: 12.8 cells, some of the box is drawn over
            assert len(yellow) > 6 * (bottom - top) * (right - left)
