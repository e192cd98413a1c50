"""What a new model starts from, part by part."""

import math
import re
from collections.abc import Callable

from ddetr_d2.engine import setup_cfg

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..conftest import ROOT, TINY

WIDTH, HIDDEN = 128, 192
SIZES = [
    *TINY,
    *("MODEL.DEFORMABLE_DETR.HIDDEN_DIM", str(WIDTH)),
    *("MODEL.DEFORMABLE_DETR.DIM_FEEDFORWARD", str(HIDDEN)),
    *("MODEL.DEFORMABLE_DETR.NUM_CLASSES", "7"),
    *("MODEL.DEFORMABLE_DETR.NUM_QUERIES", "50"),
    *("MODEL.DEFORMABLE_DETR.ENC_LAYERS", "2"),
    *("MODEL.DEFORMABLE_DETR.DEC_LAYERS", "3"),
    *("MODEL.DEFORMABLE_DETR.DEC_POINTS", "2"),
]
TWO_STAGES = ["MODEL.DEFORMABLE_DETR.TWO_STAGE", "True"]
# Name, configuration, further options, heads of the decoder.
MODELS = [
    ("shared", "deformable_detr", [], 1),
    ("refined", "deformable_detr_refine", [], 3),
    ("two-stage", "deformable_detr_refine_two_stage", [], 3),
    ("two-stage, shared", "deformable_detr", TWO_STAGES, 1),
    ("single scale", "deformable_detr_single_scale", [], 1),
]
# Standard deviations that a mean may be off. The seed is fixed: what passes once always does.
SIGMAS = 4


def build(config: str, *opts: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(setup_cfg(str(ROOT / "configs" / f"{config}.yaml"), [*SIZES, *opts]))


def constant(value: float) -> Callable[[Tensor], None]:
    def check(tensor: Tensor) -> None:
        torch.testing.assert_close(tensor, torch.full_like(tensor, value))

    return check


def check_uniform(tensor: Tensor, bound: float) -> None:
    """Between -bound and bound, whose variance is bound^2 / 3."""
    count = tensor.numel()
    assert tensor.abs().max() <= bound
    # All n absolute values are below bound * (1 - c / n) with a chance of exp(-c).
    assert tensor.abs().max() >= bound * (1 - 14 / count)
    assert tensor.mean().abs() <= SIGMAS * bound / math.sqrt(3 * count)
    # Squares have the mean bound^2 / 3 and the variance bound^4 * 4 / 45.
    deviation = math.sqrt(4 / 45 / count) * bound**2
    assert abs(tensor.square().mean().item() - bound**2 / 3) <= SIGMAS * deviation


def xavier(tensor: Tensor) -> None:
    area = math.prod(tensor.shape[2:])
    check_uniform(tensor, math.sqrt(6 / (area * (tensor.shape[0] + tensor.shape[1]))))


def linear_default(inputs: int) -> Callable[[Tensor], None]:
    """Weights and biases as :class:`torch.nn.Linear` draws them."""

    def check(tensor: Tensor) -> None:
        check_uniform(tensor, 1 / math.sqrt(inputs))

    return check


def standard_normal(tensor: Tensor) -> None:
    count = tensor.numel()
    assert tensor.mean().abs() <= SIGMAS / math.sqrt(count)
    assert abs(tensor.square().mean().item() - 1) <= SIGMAS * math.sqrt(2 / count)
    # Not uniform, say: the fourth moment is 3, its own variance 96.
    assert abs(tensor.pow(4).mean().item() - 3) <= SIGMAS * math.sqrt(96 / count)


def directions(levels: int, points: int) -> Callable[[Tensor], None]:
    """Eight heads look at the eight neighbours of a pixel, point k at k + 1 times the distance."""
    around = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]

    def check(tensor: Tensor) -> None:
        expected = [
            [[[x * k, y * k] for k in range(1, points + 1)] for _ in range(levels)]
            for x, y in around
        ]
        torch.testing.assert_close(tensor, torch.tensor(expected).float().flatten())

    return check


def head_checks(size_bias: float) -> dict[str, Callable[[Tensor], None]]:
    last_bias = torch.tensor([0.0, 0.0, size_bias, size_bias])
    return {
        r"class_embed\.weight": linear_default(WIDTH),
        r"class_embed\.bias": constant(-math.log(99)),
        r"bbox_embed\.[03]\.(weight|bias)": linear_default(WIDTH),
        r"bbox_embed\.6\.weight": constant(0),
        r"bbox_embed\.6\.bias": lambda tensor: torch.testing.assert_close(tensor, last_bias),
    }


def checks(levels: int, two_stage: bool, heads: int) -> dict[str, Callable[[Tensor], None]]:
    """What holds for each parameter, by a pattern of its name."""
    result = {
        r"projection\.input_proj\.\d\.0\.weight": xavier,
        r"projection\.input_proj\.\d\.0\.bias": constant(0),
        r"projection\.level_embed": standard_normal,
        r".*norm\d?\.weight|projection\.input_proj\.\d\.1\.weight": constant(1),
        r".*norm\d?\.bias|projection\.input_proj\.\d\.1\.bias": constant(0),
        r".*\.sampling_offsets\.weight": constant(0),
        r".*\.encoder\..*\.sampling_offsets\.bias": directions(levels, 4),
        r".*\.decoder\..*\.sampling_offsets\.bias": directions(levels, 2),
        r".*\.attention_weights\.(weight|bias)": constant(0),
        r".*\.(value|output)_proj\.weight": xavier,
        r".*\.(value|output)_proj\.bias": constant(0),
        r".*\.self_attn\.(in_proj_|out_proj\.)weight": xavier,
        r".*\.self_attn\.(in_proj_|out_proj\.)bias": constant(0),
        r".*\.ffn\.linear[12]\.weight": xavier,
        r".*\.ffn\.linear1\.bias": linear_default(WIDTH),
        r".*\.ffn\.linear2\.bias": linear_default(HIDDEN),
    }
    queries = r"transformer\.queries\."
    if two_stage:
        result |= {
            queries + r"(enc_output|pos_trans)\.weight": xavier,
            queries + r"enc_output\.bias": linear_default(WIDTH),
            queries + r"pos_trans\.bias": linear_default(2 * WIDTH),
        }
        result |= {queries + r"head\." + part: check for part, check in head_checks(0).items()}
    else:
        result |= {
            queries + r"query_embed\.weight": standard_normal,
            queries + r"reference_points\.weight": xavier,
            queries + r"reference_points\.bias": constant(0),
        }
    for index in range(heads):
        # Small boxes to start from are for learned queries, and for their first head only.
        size_bias = -2.0 if index == 0 and not two_stage else 0.0
        head = rf"transformer\.decoder\.heads\.{index}\."
        result |= {head + part: check for part, check in head_checks(size_bias).items()}
    return result


@pytest.mark.parametrize("equal", ["True", "False"])
@pytest.mark.parametrize("config, opts, heads", [x[1:] for x in MODELS], ids=[x[0] for x in MODELS])
def test_every_parameter(config, opts, heads, equal):
    node = "MODEL.DEFORMABLE_DETR"
    start = [f"{node}.LAYERS_START_EQUAL", equal, f"{node}.HEADS_START_EQUAL", equal]
    model = build(config, *opts, *start)
    levels = len(model.projection.level_embed)
    expected = checks(levels, "TWO_STAGE" in str(opts) or "two_stage" in config, heads)
    check_parameters(model, expected)


def check_parameters(model: nn.Module, expected: dict[str, Callable[[Tensor], None]]) -> None:
    """Check every parameter but the backbone's by the one pattern that its name matches."""
    seen = set()
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            continue
        matches = [pattern for pattern in expected if re.fullmatch(pattern, name)]
        assert len(matches) == 1, (name, matches)
        seen |= {*matches}
        try:
            expected[matches[0]](parameter.detach())
        except AssertionError as error:
            raise AssertionError(f"{name} starts otherwise") from error
    assert seen == expected.keys()


@pytest.mark.parametrize("config, outputs", [("detr", 8), ("detr_dc5_plus", 7)])
def test_every_parameter_of_detr(config, outputs):
    """Matrices of the transformer are Xavier uniform; heads and projection as PyTorch draws them,
    but for the classes' bias where there is the focal loss."""
    model = build(config)
    channels = model.projection.input_proj[0][0].in_channels
    head = r"transformer\.decoder\.heads\.0\."
    bias = constant(-math.log(99)) if config == "detr_dc5_plus" else linear_default(WIDTH)
    expected = {
        r"projection\.input_proj\.0\.0\.(weight|bias)": linear_default(channels),
        r".*norm\d?\.weight": constant(1),
        r".*norm\d?\.bias": constant(0),
        r".*\.(self|cross)_attn\.(in_proj_|out_proj\.)weight": xavier,
        r".*\.(self|cross)_attn\.(in_proj_|out_proj\.)bias": constant(0),
        r".*\.ffn\.linear[12]\.weight": xavier,
        r".*\.ffn\.linear1\.bias": linear_default(WIDTH),
        r".*\.ffn\.linear2\.bias": linear_default(HIDDEN),
        r"transformer\.queries\.query_embed\.weight": standard_normal,
        head + r"class_embed\.weight": linear_default(WIDTH),
        head + r"class_embed\.bias": bias,
        head + r"bbox_embed\.[036]\.weight": linear_default(WIDTH),
        head + r"bbox_embed\.[036]\.bias": small(1 / math.sqrt(WIDTH)),
    }
    assert model.transformer.decoder.heads[0].class_embed.out_features == outputs
    assert model.transformer.decoder.norm.weight.shape == (WIDTH,)
    check_parameters(model, expected)


def small(bound: float) -> Callable[[Tensor], None]:
    """Too few numbers to tell their distribution."""

    def check(tensor: Tensor) -> None:
        assert 0 < tensor.abs().max() <= bound

    return check


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("config", ["deformable_detr_refine", "deformable_detr_refine_two_stage"])
def test_layers_and_heads_that_start_equal(config, copied):
    node = "MODEL.DEFORMABLE_DETR"
    for what, other in (("LAYERS", "HEADS"), ("HEADS", "LAYERS")):
        start = [f"{node}.{what}_START_EQUAL", str(copied), f"{node}.{other}_START_EQUAL", "False"]
        transformer = build(config, *start).transformer
        encoder, decoder = transformer.encoder.layers, transformer.decoder.layers
        layers = [equal(part[0], layer) for part in (encoder, decoder) for layer in part[1:]]
        heads = [*transformer.decoder.heads]
        if "two_stage" in config:
            heads.append(transformer.queries.head)
        hidden = [
            equal(heads[0].get_submodule(name), head.get_submodule(name))
            for head in heads[1:]
            for name in ("class_embed", "bbox_embed.0", "bbox_embed.3")
        ]
        # Copies at the start, but not one module that is trained as all of them.
        parameters = [id(p) for p in transformer.parameters()]
        assert len(parameters) == len(set(parameters))
        assert heads[0].class_embed.weight.data_ptr() != heads[1].class_embed.weight.data_ptr()
        assert encoder[0].norm1.weight.data_ptr() != encoder[1].norm1.weight.data_ptr()
        if what == "LAYERS":
            assert layers == [copied] * 3
            assert not any(hidden)
        else:
            assert hidden == [copied] * 3 * (len(heads) - 1)
            assert not any(layers)


def test_layers_and_heads_of_the_recipe_start_equal():
    transformer = build("deformable_detr_refine").transformer
    assert equal(*transformer.encoder.layers)
    assert equal(*(head.class_embed for head in transformer.decoder.heads[:2]))
