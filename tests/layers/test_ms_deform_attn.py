"""The operator: values, gradients, errors."""

import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ddetr_d2.layers import ms_deform_attn, ms_deform_attn_reference
from ddetr_d2.layers.ms_deform_attn import LIBRARIES

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
def test_forward_follows_the_definition(function, sizes, device):
    inputs = make_inputs(**sizes, device=device)
    shapes = sizes.get("shapes", SHAPES)
    expected = by_definition(inputs[0], shapes, *inputs[1:])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        value, locations, weights = (tensor.to(dtype) for tensor in inputs)
        output = function(value, shapes, level_starts(shapes), locations, weights)
        assert output.dtype == dtype and output.is_contiguous()
        torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_borders_and_far_outside(function, device):
    """Pixel centres, the last pixels, exactly -1 and exactly the width, and places far away."""
    shapes = [(4, 8)]  # Powers of two, so that all of these are exact.
    pixels = [-1e30, -9.0, -1.0, -0.75, -0.5, 0.0, 3.0, 3.5, 6.5, 7.0, 7.25, 8.0, 9.0, 1e30]
    x = (torch.tensor(pixels, dtype=torch.float64) + 0.5) / 8
    y = (torch.tensor(pixels, dtype=torch.float64) + 0.5) / 4
    locations = torch.cartesian_prod(x, y).view(1, -1, 1, 1, 1, 2).to(device)
    value, _, _ = make_inputs(batch=1, heads=1, shapes=shapes, device=device)
    weights = torch.ones_like(locations[..., 0])
    output = function(value, shapes, [0], locations, weights)
    expected = by_definition(value, shapes, locations, weights)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_gradcheck(function, device):
    inputs = make_inputs(batch=2, queries=3, heads=2, channels=3, points=2, device=device)
    value, locations, weights = (tensor.requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(
        lambda *tensors: function(tensors[0], SHAPES, level_starts(SHAPES), *tensors[1:]),
        (value, locations, weights),
        nondet_tol=0 if device == "cpu" else 1e-12,  # A GPU adds in any order.
    )


@needs_extension
@pytest.mark.parametrize("channels", [1, 5, 8, 32])
def test_gradients_are_those_of_the_reference(channels, device):
    inputs = make_inputs(queries=20, heads=3, channels=channels, points=3, device=device)
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
def test_nan_and_infinite_locations_contribute_nothing(function, dtype, bad, device):
    value, locations, weights = make_inputs(dtype=dtype, device=device)
    hit = torch.zeros_like(locations, dtype=torch.bool)
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
    tolerance = 0 if device == "cpu" else 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(grads[0], expected[0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_of_dropped_samples_do_not_matter(function, bad, device):
    value, locations, weights = make_inputs(device=device)
    dropped = torch.zeros_like(weights, dtype=torch.bool)
    dropped.view(-1)[::3] = True
    locations = locations.masked_fill(dropped[..., None], 9.0)
    expected = function(value, SHAPES, level_starts(SHAPES), locations, weights)
    spoilt = weights.masked_fill(dropped, bad)
    assert torch.equal(function(value, SHAPES, level_starts(SHAPES), locations, spoilt), expected)
    grads = gradients(function, value, SHAPES, locations, spoilt)
    for grad, wanted in zip(
        grads, gradients(function, value, SHAPES, locations, weights), strict=True
    ):
        tolerance = 0 if device == "cpu" else 1e-12
        torch.testing.assert_close(grad, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"batch": 0, "queries": 0}])
def test_empty(function, sizes, device):
    value, locations, weights = make_inputs(**sizes, device=device)
    output = function(value, SHAPES, level_starts(SHAPES), locations, weights)
    assert output.shape == (value.shape[0], locations.shape[1], 6)
    grads = gradients(function, value, SHAPES, locations, weights)
    for grad, tensor in zip(grads, (value, locations, weights), strict=True):
        assert grad.shape == tensor.shape and (grad == 0).all()


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_layout_of_inputs_does_not_matter(function, device):
    value, locations, weights = make_inputs(device=device)
    expected = gradients(function, value, SHAPES, locations, weights)

    def strided(tensor):
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    value, locations, weights = strided(value), strided(locations), strided(weights)
    assert not value.is_contiguous()
    grads = gradients(function, value, SHAPES, locations, weights)
    for grad, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, exact, atol=1e-13, rtol=1e-13)
    # An expanded gradient, as .sum().backward() makes.
    ones = torch.ones((), dtype=torch.float64, device=device).expand(2, 5, 6)
    gradients(function, value, SHAPES, locations, weights, ones)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_shapes_as_tensors(function, device):
    value, locations, weights = make_inputs(device=device)
    expected = function(value, SHAPES, level_starts(SHAPES), locations, weights)
    for dtype in (torch.int32, torch.int64):
        output = function(
            value,
            torch.tensor(SHAPES, dtype=dtype, device=device),
            torch.tensor(level_starts(SHAPES), dtype=dtype, device=device),
            locations,
            weights,
        )
        assert torch.equal(output, expected)


def random_case(seed):
    """Sizes that no loop was written for, with locations outside, on borders, infinite and NaN."""
    rng = random.Random(seed)
    shapes = [(rng.randint(1, 13), rng.randint(1, 13)) for _ in range(rng.randint(1, 5))]
    value, locations, weights = make_inputs(
        queries=rng.randint(1, 40),
        heads=rng.randint(1, 4),
        channels=rng.choice([8, 12, 16, 20, 24, 32, 40, 48, 64]),
        points=rng.randint(1, 8),
        shapes=shapes,
        seed=seed,
    )
    flat = locations.view(-1)
    for place, special in enumerate([math.nan, math.inf, -math.inf, 0.0, 1.0, 1e30, -1e30]):
        flat[place :: 31 + 2 * place] = special
    return shapes, value, locations, weights


@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.float16, 1e-2),
        (torch.bfloat16, 1e-2),
    ],
)
@pytest.mark.parametrize("seed", range(12))
def test_random_sizes_follow_the_reference_in_double(seed, dtype, tolerance, device):
    shapes, *inputs = random_case(seed)
    # Of 16 bits are the values alone: a location of 16 bits is another location.
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [x.to(device, y) for x, y in zip(inputs, (dtype, wide, wide), strict=True)]
    exact = [tensor.double() for tensor in inputs]
    grad_output = torch.ones_like(
        ms_deform_attn(inputs[0], shapes, level_starts(shapes), *inputs[1:])
    )
    expected = [ms_deform_attn_reference(exact[0], shapes, level_starts(shapes), *exact[1:])]
    expected += gradients(ms_deform_attn_reference, exact[0], shapes, *exact[1:], grad_output)
    got = [ms_deform_attn(inputs[0], shapes, level_starts(shapes), *inputs[1:])]
    got += gradients(ms_deform_attn, inputs[0], shapes, *inputs[1:], grad_output)
    for tensor, wanted in zip(got, expected, strict=True):
        assert (tensor.double() - wanted).norm() <= tolerance * wanted.norm()


@needs_extension
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_kernels_of_lesser_processors(capability):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__]
        + [str(Path(__file__).with_name("test_ms_deform_attn_16_bit.py"))]
        + ["-k", "random_sizes or definition or 16_bit"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_extension
def test_kernels_run_in_the_threads_of_torch():
    assert b"torch_parallel_for" in LIBRARIES[0].read_bytes()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries, channels", [(3, 9), (60, 9), (60, 32), (300, 9)])
def test_bit_identical_for_any_number_of_threads(queries, channels, dtype):
    inputs = make_inputs(
        batch=1, queries=queries, heads=3, channels=channels, points=4, dtype=dtype, shapes=SHAPES
    )
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 16, 2):
            torch.set_num_threads(number)
            output = ms_deform_attn(inputs[0], SHAPES, level_starts(SHAPES), *inputs[1:])
            results.append([output, *gradients(ms_deform_attn, inputs[0], SHAPES, *inputs[1:])])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for tensor, expected in zip(result, results[0], strict=True):
            assert torch.equal(tensor, expected)


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_the_library_asks_for_nothing_of_torch_but_its_stable_abi():
    """Names of PyTorch's C++ change from version to version, those of its C interface do not."""
    command = ["nm", "-D", "--undefined-only", str(LIBRARIES[0])]
    symbols = [
        line.split()[-1]
        for line in subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    ]
    assert "torch_library_impl" in symbols
    mangled = [name for name in symbols if re.match(r"_ZN?K?[0-9NSt]*(2at|3c10|5torch)", name)]
    assert not mangled


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
def test_errors_name_the_argument(function, arguments, message, device):
    shapes = arguments["spatial_shapes"]
    tensors = [arguments[x] for x in ("value", "sampling_locations", "attention_weights")]
    value, *rest = (x if x.is_meta else x.to(device) for x in tensors)
    with pytest.raises(ValueError, match=message):
        function(value, shapes, level_starts(shapes), *rest)


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
def test_errors_in_shapes_and_starts(function, shapes, starts, message, device):
    value, locations, weights = make_inputs(device=device)
    with pytest.raises(ValueError, match=message):
        function(value, shapes, starts, locations, weights)


@needs_extension
def test_direct_callers_of_the_operators_get_the_same_messages(device):
    value, locations, weights = make_inputs(device=device)
    flat = [size for shape in SHAPES for size in shape]
    operators = torch.ops.ddetr_d2
    with pytest.raises((ValueError, RuntimeError), match="spatial_shapes"):
        operators.ms_deform_attn(value, flat[:-1], locations, weights)
    with pytest.raises((ValueError, RuntimeError), match="value: expected S"):
        operators.ms_deform_attn_backward(
            torch.zeros(2, 5, 6, device=device), value[:, :-1], flat, locations, weights
        )
    for grad_output, message in (
        (value.new_zeros(2, 5, 7), "grad_output: expected shape"),
        (torch.zeros(2, 5, 6, device=device), "grad_output: expected .*type"),
        (torch.zeros(2, 5, 6, device="meta"), "grad_output: expected device"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            operators.ms_deform_attn_backward(grad_output, value, flat, locations, weights)


@needs_extension
def test_fake_kernel_checks_too():
    value, locations, weights = (tensor.to("meta") for tensor in make_inputs())
    assert ms_deform_attn(value, SHAPES, [0, 35, 47], locations, weights).shape == (2, 5, 6)
    with pytest.raises(ValueError, match="value: expected S"):
        ms_deform_attn(value[:, :-1], SHAPES, [0, 35, 47], locations, weights)


@needs_extension
def test_no_double_backward(device):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(device=device)]
    output = ms_deform_attn(inputs[0], SHAPES, [0, 35, 47], *inputs[1:])
    (grad,) = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()
