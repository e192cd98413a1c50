import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ddetr_d2.layers import (
    MSDeformAttn,
    ms_deform_attn,
    ms_deform_attn_reference,
)

try:
    import ddetr_d2._C

    COMPILED = True
except ImportError:
    COMPILED = False

needs_extension = pytest.mark.skipif(not COMPILED, reason="the operator is not compiled")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
IMPLEMENTATIONS = [ms_deform_attn, ms_deform_attn_reference]
SHAPES = [(5, 7), (3, 4), (1, 1)]


def level_starts(shapes):
    starts = [0]
    for height, width in shapes[:-1]:
        starts.append(starts[-1] + height * width)
    return starts


def make_inputs(
    batch=2, queries=5, heads=2, channels=3, points=2, shapes=SHAPES, dtype=torch.float64, seed=0
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
    return value.to(dtype), (locations * 1.6 - 0.3).to(dtype), weights.to(dtype)


def by_definition(value, shapes, locations, weights):
    """The definition, pixel by pixel: every pixel counts by the product of two triangles."""
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
    return output.flatten(2)


def gradients(function, value, shapes, locations, weights, grad_output=None):
    inputs = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    output = function(inputs[0], shapes, level_starts(shapes), inputs[1], inputs[2])
    if grad_output is None:
        generator = torch.Generator().manual_seed(9)
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(grad_output.to(output))
    return [tensor.grad for tensor in inputs]


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"shapes": [(1, 1)]},
        {"shapes": [(1, 5)]},
        {"shapes": [(4, 1), (1, 3)]},
        {"channels": 1, "heads": 1, "points": 1},
        {"channels": 17, "points": 3, "batch": 1},
        {"channels": 8, "heads": 4, "queries": 1},
    ],
)
def test_forward_follows_the_definition(function, sizes):
    inputs = make_inputs(**sizes)
    shapes = sizes.get("shapes", SHAPES)
    expected = by_definition(inputs[0], shapes, *inputs[1:])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        value, locations, weights = (tensor.to(dtype) for tensor in inputs)
        output = function(value, shapes, level_starts(shapes), locations, weights)
        assert output.dtype == dtype and output.is_contiguous()
        torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_borders_and_far_outside(function):
    """Pixel centres, the last pixels, exactly -1 and exactly the width, and places far away."""
    shapes = [(4, 8)]  # Powers of two, so that all of these are exact.
    pixels = [-1e30, -9.0, -1.0, -0.75, -0.5, 0.0, 3.0, 3.5, 6.5, 7.0, 7.25, 8.0, 9.0, 1e30]
    x = (torch.tensor(pixels, dtype=torch.float64) + 0.5) / 8
    y = (torch.tensor(pixels, dtype=torch.float64) + 0.5) / 4
    locations = torch.cartesian_prod(x, y).view(1, -1, 1, 1, 1, 2)
    value, _, _ = make_inputs(batch=1, heads=1, shapes=shapes)
    weights = torch.ones(locations.shape[:-1], dtype=torch.float64)
    output = function(value, shapes, [0], locations, weights)
    expected = by_definition(value, shapes, locations, weights)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("locations_dtype", ["same", "float32"])
def test_16_bit_types(function, dtype, locations_dtype):
    value, locations, weights = (tensor.to(dtype) for tensor in make_inputs(channels=8))
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


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_gradcheck(function):
    inputs = make_inputs(batch=2, queries=3, heads=2, channels=3, points=2)
    value, locations, weights = (tensor.requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(
        lambda *tensors: function(tensors[0], SHAPES, level_starts(SHAPES), *tensors[1:]),
        (value, locations, weights),
    )


@needs_extension
@pytest.mark.parametrize("channels", [1, 5, 8, 32])
def test_gradients_are_those_of_the_reference(channels):
    inputs = make_inputs(queries=20, heads=3, channels=channels, points=3)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        value, locations, weights = (tensor.to(dtype) for tensor in inputs)
        got = gradients(ms_deform_attn, value, SHAPES, locations, weights)
        expected = gradients(
            ms_deform_attn_reference, value.double(), SHAPES, locations.double(), weights.double()
        )
        for grad, exact in zip(got, expected, strict=True):
            torch.testing.assert_close(grad.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38, -1e38])
def test_nan_and_infinite_locations_contribute_nothing(function, dtype, bad):
    value, locations, weights = make_inputs(dtype=dtype)
    hit = torch.zeros(locations.shape, dtype=torch.bool)
    hit.view(-1)[::3] = True  # Sometimes x, sometimes y, sometimes neither.
    spoilt = locations.masked_fill(hit, bad)
    dropped = hit.any(-1)
    expected = function(
        value, SHAPES, level_starts(SHAPES), locations, weights.masked_fill(dropped, 0)
    )
    output = function(value, SHAPES, level_starts(SHAPES), spoilt, weights)
    torch.testing.assert_close(output, expected, atol=0, rtol=0)

    grads = gradients(function, value, SHAPES, spoilt, weights)
    for grad in grads:
        assert grad.isfinite().all()
    assert (grads[1][dropped] == 0).all() and (grads[2][dropped] == 0).all()
    expected = gradients(function, value, SHAPES, locations, weights.masked_fill(dropped, 0))
    torch.testing.assert_close(grads[0], expected[0], atol=0, rtol=0)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"batch": 0, "queries": 0}])
def test_empty(function, sizes):
    value, locations, weights = make_inputs(**sizes)
    output = function(value, SHAPES, level_starts(SHAPES), locations, weights)
    assert output.shape == (value.shape[0], locations.shape[1], 6)
    grads = gradients(function, value, SHAPES, locations, weights)
    for grad, tensor in zip(grads, (value, locations, weights), strict=True):
        assert grad.shape == tensor.shape and (grad == 0).all()


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_layout_of_inputs_does_not_matter(function):
    value, locations, weights = make_inputs()
    expected = gradients(function, value, SHAPES, locations, weights)

    def strided(tensor):
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    value, locations, weights = strided(value), strided(locations), strided(weights)
    assert not value.is_contiguous()
    grads = gradients(function, value, SHAPES, locations, weights)
    for grad, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, exact, atol=1e-14, rtol=1e-14)
    # An expanded gradient, as .sum().backward() makes.
    ones = torch.ones((), dtype=torch.float64).expand(2, 5, 6)
    gradients(function, value, SHAPES, locations, weights, ones)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_shapes_as_tensors(function):
    value, locations, weights = make_inputs()
    expected = function(value, SHAPES, level_starts(SHAPES), locations, weights)
    for dtype in (torch.int32, torch.int64):
        output = function(
            value,
            torch.tensor(SHAPES, dtype=dtype),
            torch.tensor(level_starts(SHAPES), dtype=dtype),
            locations,
            weights,
        )
        assert torch.equal(output, expected)


@needs_extension
def test_kernels_are_compiled_with_threads():
    library = Path(ddetr_d2._C.__file__).read_bytes()
    assert b"GOMP_parallel" in library or b"__kmpc_fork_call" in library


@needs_extension
def test_bit_identical_for_any_number_of_threads():
    inputs = make_inputs(
        batch=1, queries=300, heads=3, channels=9, points=4, dtype=torch.float32, shapes=SHAPES
    )
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            output = ms_deform_attn(inputs[0], SHAPES, level_starts(SHAPES), *inputs[1:])
            results.append([output, *gradients(ms_deform_attn, inputs[0], SHAPES, *inputs[1:])])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for tensor, expected in zip(result, results[0], strict=True):
            assert torch.equal(tensor, expected)


# Errors


def bad_arguments():
    value, locations, weights = make_inputs(dtype=torch.float32)
    cases = []
    good = {
        "value": value,
        "spatial_shapes": SHAPES,
        "sampling_locations": locations,
        "attention_weights": weights,
    }
    for name, wrong, message in (
        ("value", value[0], r"value: expected shape \(N, S, M, D\)"),
        ("value", value[:, :-1], "value: expected S"),
        ("value", value.long(), "value: expected float32"),
        ("value", value.to(torch.complex64), "value: expected float32"),
        ("value", value.double(), "sampling_locations: expected type"),
        ("value", value[:1], "sampling_locations: expected shape"),
        ("value", value[:, :, :1], "sampling_locations: expected shape"),
        ("value", value.to("meta"), "sampling_locations: expected device meta"),
        ("sampling_locations", locations[..., 0], "sampling_locations: expected shape"),
        ("sampling_locations", locations[..., :1], "sampling_locations: expected shape"),
        ("sampling_locations", locations[:, :, :, :2], "sampling_locations: expected shape"),
        ("sampling_locations", locations.bfloat16(), "sampling_locations: expected type"),
        ("sampling_locations", locations.to("meta"), "sampling_locations: expected device"),
        ("attention_weights", weights[:, :-1], "attention_weights: expected shape"),
        ("attention_weights", weights[..., None], "attention_weights: expected shape"),
        ("attention_weights", weights.double(), "attention_weights: expected type"),
        ("attention_weights", weights.to("meta"), "attention_weights: expected device"),
        ("spatial_shapes", [(5, 7), (3, 4)], "value: expected S"),
        ("spatial_shapes", [(5, 7), (3, 4), (0, 1)], "spatial_shapes: .* at least 1"),
        ("spatial_shapes", [(5, 7), (-3, -4), (1, 1)], "spatial_shapes: .* at least 1"),
        ("spatial_shapes", [(5, 7), (13, 1)], "sampling_locations: expected shape"),
        ("spatial_shapes", [(2**32, 2**32), (6, 8), (1, 1)], "value: expected S"),
        ("spatial_shapes", [], "spatial_shapes: .* at least 1"),
    ):
        cases.append(pytest.param({**good, name: wrong}, message, id=message))
    return cases


@pytest.mark.parametrize("arguments, message", bad_arguments())
@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_errors_name_the_argument(function, arguments, message):
    shapes = arguments["spatial_shapes"]
    with pytest.raises(ValueError, match=message):
        function(
            arguments["value"],
            shapes,
            level_starts(shapes),
            arguments["sampling_locations"],
            arguments["attention_weights"],
        )


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shapes, starts, message",
    [
        (SHAPES, [0, 34, 47], r"level_start_index: expected \[0, 35, 47\]"),
        (SHAPES, [0, 35], "level_start_index: expected"),
        (SHAPES, torch.tensor([0, 35, 48]), "level_start_index: expected"),
        (SHAPES, torch.tensor([0.0, 35.0, 47.0]), "level_start_index: expected ints"),
        (torch.tensor(SHAPES) / 2, [0, 35, 47], "spatial_shapes: expected ints"),
        ([5, 7, 3, 4, 1, 1], [0, 35, 47], "spatial_shapes: expected one"),
        ([(5, 7, 1), (3, 4, 1), (1, 1, 1)], [0, 35, 47], "spatial_shapes: expected one"),
        ([(5.0, 7.0), (3, 4), (1, 1)], [0, 35, 47], "spatial_shapes: expected one"),
    ],
)
def test_errors_in_shapes_and_starts(function, shapes, starts, message):
    value, locations, weights = make_inputs()
    with pytest.raises(ValueError, match=message):
        function(value, shapes, starts, locations, weights)


@needs_extension
def test_direct_callers_of_the_operators_get_the_same_errors():
    value, locations, weights = make_inputs()
    flat = [size for shape in SHAPES for size in shape]
    operators = torch.ops.ddetr_d2
    with pytest.raises(ValueError, match="spatial_shapes"):
        operators.ms_deform_attn(value, flat[:-1], locations, weights)
    with pytest.raises(ValueError, match="value: expected S"):
        operators.ms_deform_attn_backward(
            torch.zeros(2, 5, 6), value[:, :-1], flat, locations, weights
        )
    for grad_output, message in (
        (torch.zeros(2, 5, 7, dtype=torch.float64), "grad_output: expected shape"),
        (torch.zeros(2, 5, 6), "grad_output: expected .*type"),
        (torch.zeros(2, 5, 6, device="meta"), "grad_output: expected device"),
    ):
        with pytest.raises(ValueError, match=message):
            operators.ms_deform_attn_backward(grad_output, value, flat, locations, weights)


@needs_extension
def test_fake_kernel_checks_too():
    value, locations, weights = (tensor.to("meta") for tensor in make_inputs())
    assert ms_deform_attn(value, SHAPES, [0, 35, 47], locations, weights).shape == (2, 5, 6)
    with pytest.raises(ValueError, match="value: expected S"):
        ms_deform_attn(value[:, :-1], SHAPES, [0, 35, 47], locations, weights)


@needs_extension
def test_no_double_backward():
    inputs = [tensor.requires_grad_() for tensor in make_inputs()]
    output = ms_deform_attn(inputs[0], SHAPES, [0, 35, 47], *inputs[1:])
    (grad,) = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


# torch.compile, torch.export, autocast


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    value, locations, weights = make_inputs(dtype=dtype)
    flat = [size for shape in SHAPES for size in shape]
    operators = torch.ops.ddetr_d2
    inputs = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    torch.library.opcheck(operators.ms_deform_attn.default, (inputs[0], flat, *inputs[1:]))
    grad_output = torch.ones(2, 5, 6, dtype=dtype)
    torch.library.opcheck(
        operators.ms_deform_attn_backward.default, (grad_output, value, flat, locations, weights)
    )


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_function(fresh_dynamo, dynamic):
    compiled = torch.compile(ms_deform_attn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shapes, queries in ((SHAPES, 5), ([(6, 3), (2, 5), (4, 4)], 7)):
        inputs = make_inputs(shapes=shapes, queries=queries)
        got = gradients(compiled, inputs[0], shapes, *inputs[1:])
        expected = gradients(ms_deform_attn, inputs[0], shapes, *inputs[1:])
        for grad, exact in zip(got, expected, strict=True):
            torch.testing.assert_close(grad, exact)


def make_module_inputs(reference_dim=2, shapes=SHAPES, batch=2, queries=5):
    generator = torch.Generator().manual_seed(3)
    tokens = sum(height * width for height, width in shapes)
    query = torch.randn(batch, queries, 16, generator=generator)
    reference = torch.rand(batch, queries, len(shapes), reference_dim, generator=generator)
    values = torch.randn(batch, tokens, 16, generator=generator)
    mask = torch.rand(batch, tokens, generator=generator) > 0.8
    return query, reference, values, shapes, level_starts(shapes), mask


def make_module():
    torch.manual_seed(0)
    module = MSDeformAttn(embed_dim=16, num_heads=4, num_levels=3, num_points=2)
    nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    nn.init.normal_(module.attention_weights.weight, std=0.1)
    return module


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reference_dim", [2, 4])
def test_compile_module(fresh_dynamo, dynamic, reference_dim):
    module = make_module()
    compiled = torch.compile(
        copy.deepcopy(module), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for shapes in (SHAPES, [(6, 3), (2, 5), (4, 4)]):
        inputs = make_module_inputs(reference_dim, shapes)
        expected, got = module(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected)
        expected.sum().backward()
        got.sum().backward()
    for parameter, other in zip(module.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad)


@needs_extension
def test_compile_with_inductor(fresh_dynamo):
    compiled = torch.compile(ms_deform_attn, fullgraph=True)
    inputs = make_inputs()
    got = gradients(compiled, inputs[0], SHAPES, *inputs[1:])
    expected = gradients(ms_deform_attn, inputs[0], SHAPES, *inputs[1:])
    for grad, exact in zip(got, expected, strict=True):
        assert torch.equal(grad, exact)


def test_export():
    module = make_module().eval()
    query, reference, values, shapes, starts, mask = make_module_inputs()

    class FixedShapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, query, reference, values, mask):
            return self.module(query, reference, values, shapes, starts, mask)

    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    program = torch.export.export(
        FixedShapes(), (query, reference, values, mask), dynamic_shapes=(batch,) * 4
    )
    query, reference, values, _, _, mask = make_module_inputs(batch=3)
    torch.testing.assert_close(
        program.module()(query, reference, values, mask),
        module(query, reference, values, shapes, starts, mask),
    )


@needs_extension
def test_autocast_function():
    value, locations, weights = make_inputs(dtype=torch.float32, channels=8)
    expected = gradients(ms_deform_attn, value, SHAPES, locations, weights)
    with torch.autocast("cpu", torch.bfloat16):
        # The types that a model under autocast arrives with.
        output = ms_deform_attn(value, SHAPES, [0, 35, 47], locations, weights.bfloat16())
        assert output.dtype == torch.bfloat16
        got = gradients(ms_deform_attn, value, SHAPES, locations, weights)
        output = ms_deform_attn(
            value.double(), SHAPES, [0, 35, 47], locations.double(), weights.double()
        )
        assert output.dtype == torch.float64
    for grad, exact in zip(got, expected, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize("reference_dim", [2, 4])
def test_autocast_module(fresh_dynamo, compile_it, reference_dim):
    module = make_module()
    inputs = make_module_inputs(reference_dim)
    expected = module(*inputs)
    function = torch.compile(module, fullgraph=True, backend="aot_eager") if compile_it else module
    with torch.autocast("cpu", torch.bfloat16):
        output = function(*inputs)
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() / expected.norm() < 3e-2
    output.float().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


# The module


def test_initial_values():
    module = MSDeformAttn(embed_dim=32, num_heads=8, num_levels=2, num_points=3)
    assert module.sampling_offsets.weight.shape == (8 * 2 * 3 * 2, 32)
    assert module.attention_weights.weight.shape == (8 * 2 * 3, 32)
    assert (module.sampling_offsets.weight == 0).all()
    assert (module.attention_weights.weight == 0).all()
    assert (module.attention_weights.bias == 0).all()
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    offsets = module.sampling_offsets.bias.detach().view(8, 2, 3, 2)
    for m, direction in enumerate(directions):
        for level in range(2):
            for k in range(3):
                expected = torch.tensor(direction, dtype=torch.float32) * (k + 1)
                torch.testing.assert_close(offsets[m, level, k], expected, atol=1e-5, rtol=0)
    bound = math.sqrt(6 / (32 + 32))
    for projection in (module.value_proj, module.output_proj):
        assert (projection.bias == 0).all()
        assert 0.9 * bound < projection.weight.abs().max() <= bound


@pytest.mark.parametrize("reference_dim", [2, 4])
def test_module_follows_the_definition(reference_dim):
    module = make_module().double()
    inputs = make_module_inputs(reference_dim)
    query, reference, values = (tensor.double() for tensor in inputs[:3])
    shapes, starts, mask = inputs[3:]

    offsets = module.sampling_offsets(query).view(2, 5, 4, 3, 2, 2)
    weights = module.attention_weights(query).view(2, 5, 4, 6).softmax(-1).view(2, 5, 4, 3, 2)
    locations = torch.zeros_like(offsets)
    for level, (height, width) in enumerate(shapes):
        for axis, size in enumerate((width, height)):
            point = reference[:, :, level, axis, None, None]
            offset = offsets[:, :, :, level, :, axis]
            if reference_dim == 2:
                locations[:, :, :, level, :, axis] = point + offset / size
            else:
                extent = reference[:, :, level, 2 + axis, None, None]
                locations[:, :, :, level, :, axis] = point + offset / 2 * extent * 0.5
    value = module.value_proj(values)
    value[mask] = 0
    expected = by_definition(value.view(2, -1, 4, 4), shapes, locations, weights)
    expected = module.output_proj(expected)
    output = module(query, reference, values, shapes, starts, mask)
    torch.testing.assert_close(output, expected)
    as_tensors = module(query, reference, values, torch.tensor(shapes), torch.tensor(starts), mask)
    assert torch.equal(as_tensors, output)


def test_padding_has_no_influence():
    module = make_module()
    query, reference, values, shapes, starts, mask = make_module_inputs()
    output = module(query, reference, values, shapes, starts, mask)
    changed = values.masked_fill(mask[..., None], 1e4)
    assert torch.equal(module(query, reference, changed, shapes, starts, mask), output)
    nothing_padded = module(query, reference, values, shapes, starts, torch.zeros_like(mask))
    assert torch.equal(module(query, reference, values, shapes, starts), nothing_padded)


def test_module_errors():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads = 8, got 30"):
        MSDeformAttn(embed_dim=30, num_heads=8)
    with pytest.raises(ValueError, match="num_points must be at least 1, got 0"):
        MSDeformAttn(num_points=0)
    module = make_module()
    query, reference, values, shapes, starts, mask = make_module_inputs()
    with pytest.raises(ValueError, match="spatial_shapes: expected 3 levels"):
        module(query, reference, values, shapes[:2], starts, mask)
    with pytest.raises(ValueError, match="reference_points: expected shape"):
        module(query, reference[:, :, :2], values, shapes, starts, mask)
    with pytest.raises(ValueError, match="reference_points: expected shape"):
        module(query, reference[..., :1], values, shapes, starts, mask)
    with pytest.raises(ValueError, match="padding_mask: expected a bool tensor"):
        module(query, reference, values, shapes, starts, mask[:, :-1])
    with pytest.raises(ValueError, match="padding_mask: expected a bool tensor"):
        module(query, reference, values, shapes, starts, mask.float())
    with pytest.raises(ValueError, match="value: expected S"):
        module(query, reference, values[:, :-1], shapes, starts, mask[:, :-1])


def test_without_the_extension_it_says_so_once_and_works():
    program = """
import sys
sys.modules["ddetr_d2._C"] = None
import torch
from ddetr_d2.layers import MSDeformAttn
module = MSDeformAttn(16, 4, 1, 2)
for _ in range(2):
    query, points, tokens = torch.rand(1, 3, 16), torch.rand(1, 3, 1, 2), torch.rand(1, 6, 16)
    output = module(query, points, tokens, [(2, 3)], [0])
    output.sum().backward()
print(tuple(output.shape))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3, 16)"
    assert done.stderr.count("ms_deform_attn on cpu: plain PyTorch") == 1
    assert "pip install -e . --no-build-isolation" in done.stderr


# On a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("channels", [1, 5, 32, 40])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        (torch.float64, 1e-11),
        (torch.float32, 1e-5),
        (torch.float16, 1e-2),
        (torch.bfloat16, 1e-2),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gpu_follows_the_reference(channels, dtype, tolerance, deterministic):
    inputs = [
        tensor.to("cuda", dtype) for tensor in make_inputs(queries=50, heads=3, channels=channels)
    ]
    inputs[1].view(-1)[::7] = math.nan
    starts = level_starts(SHAPES)
    exact = [tensor.cpu().double() for tensor in inputs]
    expected = [ms_deform_attn_reference(exact[0], SHAPES, starts, *exact[1:])]
    expected += gradients(ms_deform_attn_reference, exact[0], SHAPES, *exact[1:])
    results = []
    try:
        torch.use_deterministic_algorithms(deterministic)
        for _ in range(2):
            output = ms_deform_attn(inputs[0], SHAPES, starts, *inputs[1:])
            results.append([output, *gradients(ms_deform_attn, inputs[0], SHAPES, *inputs[1:])])
    finally:
        torch.use_deterministic_algorithms(False)
    for got, target in zip(results[0], expected, strict=True):
        assert got.dtype == dtype
        assert (got.cpu().double() - target).norm() <= tolerance * target.norm()
    if deterministic:
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)


@pytest.mark.gpu
@needs_gpu
def test_gpu_empty_errors_autocast_and_opcheck():
    for sizes in ({"batch": 0}, {"queries": 0}):
        inputs = [tensor.cuda() for tensor in make_inputs(**sizes)]
        for grad in gradients(ms_deform_attn, inputs[0], SHAPES, *inputs[1:]):
            assert (grad == 0).all()
    value, locations, weights = (tensor.float().cuda() for tensor in make_inputs())
    starts = level_starts(SHAPES)
    with pytest.raises(ValueError, match="sampling_locations: expected device cuda"):
        ms_deform_attn(value, SHAPES, starts, locations.cpu(), weights)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            assert ms_deform_attn(value, SHAPES, starts, locations, weights).dtype == dtype
    flat = [size for shape in SHAPES for size in shape]
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    torch.library.opcheck(torch.ops.ddetr_d2.ms_deform_attn.default, (inputs[0], flat, *inputs[1:]))
