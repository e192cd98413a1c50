"""The operator and its module under torch.compile, torch.export and autocast."""

import copy

from ddetr_d2.layers import ms_deform_attn

import pytest
import torch
from torch import nn

from .operator_inputs import (
    SHAPES,
    gradients,
    make_inputs,
    make_module,
    make_module_inputs,
    needs_extension,
)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype, device):
    value, locations, weights = make_inputs(dtype=dtype, device=device)
    flat = [size for shape in SHAPES for size in shape]
    operators = torch.ops.ddetr_d2
    inputs = [tensor.clone().requires_grad_() for tensor in (value, locations, weights)]
    torch.library.opcheck(operators.ms_deform_attn.default, (inputs[0], flat, *inputs[1:]))
    grad_output = torch.ones(2, 5, 6, dtype=dtype, device=device)
    torch.library.opcheck(
        operators.ms_deform_attn_backward.default, (grad_output, value, flat, locations, weights)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_function(fresh_dynamo, dynamic, device):
    compiled = torch.compile(ms_deform_attn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shapes, queries in ((SHAPES, 5), ([(6, 3), (2, 5), (4, 4)], 7)):
        inputs = make_inputs(shapes=shapes, queries=queries, device=device)
        got = gradients(compiled, inputs[0], shapes, *inputs[1:])
        expected = gradients(ms_deform_attn, inputs[0], shapes, *inputs[1:])
        for grad, exact in zip(got, expected, strict=True):
            torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reference_dim", [2, 4])
def test_compile_module(fresh_dynamo, dynamic, reference_dim, device):
    module = make_module(device)
    compiled = torch.compile(
        copy.deepcopy(module), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for shapes in (SHAPES, [(6, 3), (2, 5), (4, 4)]):
        inputs = make_module_inputs(reference_dim, shapes, device=device)
        expected, got = module(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected)
        expected.sum().backward()
        got.sum().backward()
    for parameter, other in zip(module.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad)


@needs_extension
def test_compile_with_inductor(fresh_dynamo, device):
    compiled = torch.compile(ms_deform_attn, fullgraph=True)
    inputs = make_inputs(device=device)
    got = gradients(compiled, inputs[0], SHAPES, *inputs[1:])
    expected = gradients(ms_deform_attn, inputs[0], SHAPES, *inputs[1:])
    for grad, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, exact, atol=1e-13, rtol=1e-13)


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
def test_autocast_function(device):
    value, locations, weights = make_inputs(dtype=torch.float32, channels=8, device=device)
    expected = gradients(ms_deform_attn, value, SHAPES, locations, weights)
    with torch.autocast(device, torch.bfloat16):
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
def test_autocast_module(fresh_dynamo, compile_it, reference_dim, device):
    module = make_module(device)
    inputs = make_module_inputs(reference_dim, device=device)
    expected = module(*inputs)
    function = torch.compile(module, fullgraph=True, backend="aot_eager") if compile_it else module
    with torch.autocast(device, torch.bfloat16):
        output = function(*inputs)
    assert output.dtype == torch.bfloat16
    assert (output - expected).norm() / expected.norm() < 3e-2
    output.float().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
