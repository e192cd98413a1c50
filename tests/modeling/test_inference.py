"""A model prepared for inference gives what the model gives."""

import copy

import pytest
import torch
from torch import nn

from ddetr_d2.layers import MSDeformAttn
from ddetr_d2.modeling.inference import (
    FeedForwardInPieces,
    OneDNNLinear,
    prepare_for_inference,
)

from ..conftest import MEMBERS, TINY
from .test_deformable_detr import build, make_batch


def randomize(model: nn.Module) -> nn.Module:
    """Weights and statistics that are all different, so that none may be left out."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = (
                    torch.rand_like(tensor) / 2 if "norm" in name else torch.randn_like(tensor) / 50
                )
                tensor.add_(noise)
    return model.eval()


def raw(model: nn.Module, batch: list[dict]) -> list[torch.Tensor]:
    images = model.preprocess_image(batch)
    layers, _ = model.predict(images.tensor, model._padding_mask(images))
    return list(layers[-1])


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", ""])
@pytest.mark.parametrize("variant", MEMBERS)
def test_output_stays_and_the_model_too(variant, norm):
    model = randomize(build(variant, *TINY, "MODEL.RESNETS.NORM", norm))
    before = copy.deepcopy(model.state_dict())
    prepared = prepare_for_inference(model)
    linear = prepared.transformer.encoder.layers[0].ffn.linear1
    assert isinstance(linear, OneDNNLinear) == torch.backends.mkldnn.is_available()
    for batch in (make_batch(), make_batch()[:1]):  # with padding and without
        plain = raw(model, batch)  # with gradients: nothing is fused
        with torch.inference_mode():
            for got, expected in zip(raw(prepared, batch), plain, strict=True):
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.requires_grad for n, p in model.named_parameters() if "transformer" in n)


def test_prepared_models_run_under_autocast_and_in_double():
    model = randomize(build("deformable_detr", *TINY))
    prepared = prepare_for_inference(model)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for output in raw(prepared, make_batch()):
            assert output.isfinite().all()
    expected = raw(model.double(), make_batch()[:1])
    with torch.inference_mode():
        for got, wanted in zip(
            raw(prepare_for_inference(model), make_batch()[:1]), expected, strict=True
        ):
            assert got.dtype == torch.float64
            assert got.shape == wanted.shape


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 30])
def test_feed_forward_in_pieces(tokens, monkeypatch):
    monkeypatch.setattr(FeedForwardInPieces, "TOKENS", 7)
    model = randomize(build("deformable_detr", *TINY))
    plain = model.transformer.encoder.layers[0].ffn
    pieces = prepare_for_inference(model).transformer.encoder.layers[0].ffn
    assert type(pieces) is FeedForwardInPieces
    x = torch.randn(2, tokens, plain.linear1.in_features)
    sizes = []
    pieces.linear1.register_forward_hook(lambda module, args, y: sizes.append(y.shape[1]))
    with torch.inference_mode():
        torch.testing.assert_close(pieces(x), plain(x))
    assert sum(sizes) == tokens
    assert max(sizes) <= 7


def test_feed_forward_in_pieces_is_whole_in_graphs(monkeypatch):
    monkeypatch.setattr(FeedForwardInPieces, "TOKENS", 7)
    model = randomize(build("deformable_detr", *TINY))
    plain = model.transformer.encoder.layers[0].ffn
    pieces = prepare_for_inference(model).transformer.encoder.layers[0].ffn
    width = plain.linear1.in_features
    traced = torch.jit.trace(pieces, torch.randn(1, 20, width))
    compiled = torch.compile(pieces, dynamic=True, fullgraph=True, backend="eager")
    for tokens in (5, 33):
        x = torch.randn(2, tokens, width)
        with torch.no_grad():
            torch.testing.assert_close(traced(x), plain(x))
            torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize("reference", [2, 4])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.float16, 1e-2),
        (torch.bfloat16, 3e-2),
    ],
)
@pytest.mark.parametrize("sizes", [(64, 8, 4, 4), (64, 8, 1, 3), (40, 2, 3, 5), (96, 4, 5, 8)])
def test_attention_without_gradients(sizes, dtype, tolerance, reference):
    """Locations and softmax are computed inside of the operator then."""
    torch.manual_seed(0)
    module = MSDeformAttn(*sizes)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    module = module.to(dtype)
    levels = sizes[2]
    shapes = [(13, 17), (7, 9), (4, 5), (2, 3), (1, 1)][:levels]
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(levels)]
    tokens = sum(h * w for h, w in shapes)
    query = torch.randn(2, 50, sizes[0], dtype=dtype)
    points = torch.rand(2, 50, levels, reference, dtype=torch.promote_types(dtype, torch.float32))
    values = torch.randn(2, tokens, sizes[0], dtype=dtype)
    with torch.no_grad():
        got = module(query, points, values, shapes, starts)
    exact = module.double()(query.double(), points.double(), values.double(), shapes, starts)
    assert got.dtype == dtype
    assert (got.double() - exact).norm() <= tolerance * exact.norm()


def test_attention_without_gradients_keeps_nan_and_infinity():
    module = MSDeformAttn(16, 2, 1, 4)
    query = torch.randn(1, 3, 16)
    query[0, 1] = torch.nan
    points, values = torch.full((1, 3, 1, 2), 0.5), torch.ones(1, 12, 16)
    with torch.no_grad():
        got = module(query, points, values, [(3, 4)], [0])
    expected = module(query, points, values, [(3, 4)], [0])
    torch.testing.assert_close(got, expected, equal_nan=True)
