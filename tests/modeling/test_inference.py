"""A model prepared for inference gives what the model gives."""

import copy
import pickle

from ddetr_d2.errors import UserError
from ddetr_d2.layers import MSDeformAttn
from ddetr_d2.layers.onednn import PackedConv2d, PackedLinear
from ddetr_d2.modeling import inference_dtype, prepare_for_inference
from ddetr_d2.modeling import packed as packed_parts
from ddetr_d2.modeling.packed import FeedForwardInPieces

import pytest
import torch
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from torch import nn

from ..conftest import MEMBERS, TINY
from .test_deformable_detr import build, make_batch

# Parameters that keep 32 bits.
WIDE = ("class_embed", "bbox_embed.4", "bbox_embed.6", "queries.query_embed", "reference_points")


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
    assert isinstance(linear, PackedLinear) == torch.backends.mkldnn.is_available()
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


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("variant", MEMBERS)
def test_bfloat16(variant, packed, monkeypatch):
    """By oneDNN, and as on a GPU or a processor that has no instructions for it."""
    if packed and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 here")
    if not packed:
        monkeypatch.setattr(packed_parts, "can_pack", lambda module: False)
    model = randomize(build(variant, *TINY))
    prepared = prepare_for_inference(model, torch.bfloat16)
    assert packed == any(isinstance(module, PackedConv2d) for module in prepared.modules())
    for name, tensor in prepared.transformer.named_parameters():
        wide = any(part in name for part in WIDE)
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name
    for batch in (make_batch(), make_batch()[:1]):  # with padding and without
        expected = raw(model, batch)
        with torch.inference_mode():
            got = raw(prepared, batch)
        for x, y in zip(got, expected, strict=True):
            assert (
                x.dtype == torch.float32
            )  # computed so: there are numbers between those of 16 bits
            assert not torch.equal(x, x.bfloat16().float())
            x, y = x.sort(1).values, y.sort(1).values  # two stages order queries by their scores
            assert (x - y).norm() <= 0.06 * y.norm()


def test_bfloat16_keeps_positions_and_locations(monkeypatch):
    seen = []
    model = prepare_for_inference(randomize(build("deformable_detr_refine", *TINY)), torch.bfloat16)
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.register_forward_pre_hook(lambda module, args: seen.append(args[:3]))
    with torch.inference_mode():
        raw(model, make_batch())
    for query, reference_points, values in seen:
        assert query.dtype == values.dtype == torch.bfloat16
        assert reference_points.dtype == torch.float32
    assert len(seen) == len(model.transformer.encoder.layers) + len(
        model.transformer.decoder.layers
    )


def test_bfloat16_with_deformable_convolution():
    options = (*TINY, "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.DEFORM_ON_PER_STAGE")
    model = randomize(build("deformable_detr", *options, "[False, False, False, True]"))
    prepared = prepare_for_inference(model, torch.bfloat16)
    batch = make_batch()
    with torch.inference_mode():
        for x, y in zip(raw(prepared, batch), raw(model, batch), strict=True):
            assert (x - y).norm() <= 0.02 * y.norm()


def test_other_types_are_refused():
    model = build("deformable_detr", *TINY)
    with pytest.raises(ValueError, match="expected float32 or bfloat16, got torch.float16"):
        prepare_for_inference(model, torch.float16)
    assert inference_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(UserError, match="TEST.DTYPE is 'half'; expected one of float32, bfloat16"):
        inference_dtype("half")


def test_prepared_models_can_be_copied_and_pickled():
    prepared = prepare_for_inference(randomize(build("deformable_detr", *TINY)))
    with torch.inference_mode():
        batch = make_batch()
        expected = raw(prepared, batch)
        for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
            for got, wanted in zip(raw(other, batch), expected, strict=True):
                assert torch.equal(got, wanted)


def test_residual_blocks_leave_what_others_read():
    """The output of the stem is a feature, and the input of a block without shortcut."""
    names = ["stem", "res2"]
    blocks = ResNet.make_stage(BasicBlock, 2, in_channels=8, out_channels=8, norm="FrozenBN")
    backbone = ResNet(BasicStem(3, 8, norm="FrozenBN"), [blocks], out_features=names)
    backbone = randomize(backbone)
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        got, expected = prepare_for_inference(backbone)(images), backbone(images)
    for name in names:
        torch.testing.assert_close(got[name], expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 30])
def test_feed_forward_in_pieces(tokens, monkeypatch):
    monkeypatch.setattr(FeedForwardInPieces, "BYTES_PER_CHANNEL", 28)
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
    monkeypatch.setattr(FeedForwardInPieces, "BYTES_PER_CHANNEL", 28)
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
