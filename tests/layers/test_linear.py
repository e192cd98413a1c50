"""Linear layers and feed-forward networks in training."""

from ddetr_d2.layers import feed_forward, linear
from ddetr_d2.layers.linear import two_linears

import pytest
import torch
from torch import nn

from .operator_inputs import needs_extension

ROWS = 520  # enough for the fast way
MANY_ROWS = 4500  # in several pieces
TYPES = [torch.float32, torch.float64]


def layers(dtype):
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(12, 20), nn.Linear(20, 12)]).to(dtype)


def gradients(function, module, x):
    """The output, and the gradients of the input and of the parameters."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    output = function(x)
    (output * torch.linspace(-1, 2, output.numel()).view_as(output).to(output)).sum().backward()
    return [output, x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def name_of(output):
    return type(output.grad_fn).__name__


@needs_extension
@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    layer = nn.Linear(12, 20, bias=bias)
    x = torch.randn(2, ROWS // 2, 12)
    got = gradients(lambda x: linear(x, layer), layer, x)
    assert name_of(got[0]) == "_LinearBackward"
    for a, b in zip(got, gradients(layer, layer, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@needs_extension
def test_linear_of_a_strided_input_and_gradient():
    layer = nn.Linear(12, 12)
    x = torch.randn(12, 2, ROWS).permute(1, 2, 0)
    got = gradients(lambda x: linear(x, layer).transpose(0, 1), layer, x)
    for a, b in zip(got, gradients(lambda x: layer(x).transpose(0, 1), layer, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@needs_extension
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("positions", [None, 1, 2])
def test_two_linears(positions, wide):
    module = nn.ModuleList([nn.Linear(12, 20), nn.Linear(12, 5)])
    rows = ROWS // 2 if wide else 3  # too few for the fast way
    x = torch.randn(2, rows, 12)
    if positions is None:
        position, plus = None, lambda x: x
    else:
        module.register_parameter("position", nn.Parameter(torch.randn(positions, rows, 12)))
        position, plus = module.position, lambda x: x + module.position
    got = gradients(lambda x: torch.cat(two_linears(x, position, *module), -1), module, x)
    expected = gradients(lambda x: torch.cat([layer(plus(x)) for layer in module], -1), module, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
    output = two_linears(x, position, *module)[1]
    assert (name_of(output) == "_TwoLinearsBackward") == wide


@needs_extension
def test_two_linears_do_not_keep_the_sum():
    module = nn.ModuleList([nn.Linear(12, 20), nn.Linear(12, 5)])
    x, position = (torch.randn(1, ROWS, 12, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        two_linears(x, position, *module)
    own = [x, position, module[0].weight, module[1].weight]
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in own}


@needs_extension
@pytest.mark.parametrize("rows", [ROWS, MANY_ROWS])
@pytest.mark.parametrize("dtype", TYPES)
def test_feed_forward(dtype, rows):
    module = layers(dtype)
    first, second = module
    x = torch.randn(2, rows // 2, 12, dtype=dtype)
    got = gradients(lambda x: feed_forward(x, first, second, 0.5, False), module, x)
    assert name_of(got[0]) == "_FeedForwardBackward"
    expected = gradients(lambda x: x + second(first(x).relu()), module, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@needs_extension
def test_gradient_of_feed_forward_with_dropout():
    module = layers(torch.float64)
    first, second = module

    def function(x, *parameters):
        torch.manual_seed(0)
        return feed_forward(x, first, second, 0.3, True).view(5, -1).sum(1)

    x = torch.randn(MANY_ROWS, 12, dtype=torch.float64, requires_grad=True)
    # Along one direction in the space of inputs and parameters.
    torch.autograd.gradcheck(function, (x, *module.parameters()), fast_mode=True)


@needs_extension
def test_feed_forward_drops_hidden_and_output():
    module = layers(torch.float32)
    first, second = module
    with torch.no_grad():
        first.weight.zero_()
        first.bias.fill_(1.0)
        second.weight.zero_()
        second.bias.fill_(1.0)
        second.weight[0] = 1.0
    torch.manual_seed(0)
    x = torch.zeros(20_000, 12)
    output = feed_forward(x, first, second, 0.25, True)
    shares = output[:, 1:].unique(return_counts=True)
    torch.testing.assert_close(shares[0], torch.tensor([0.0, 1 / 0.75]))
    assert abs(shares[1][0] / output[:, 1:].numel() - 0.25) < 0.01
    # Sums of 20 hidden ones, of which those dropped are missing.
    kept = output[:, 0][output[:, 0] > 0] * 0.75 - 1
    assert abs(kept.mean() - 20) < 0.1
    assert kept.unique().numel() > 5


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_feed_forward_under_autocast(dtype):
    module = layers(torch.float32)
    first, second = module
    x = torch.randn(2, ROWS // 2, 12, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(lambda x: feed_forward(x, first, second, 0.5, False), module, x)
        expected = gradients(lambda x: x + second(first(x).relu()), module, x)
    assert name_of(got[0]) == "_FeedForwardBackward"
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 0.02 * b.norm()


def test_few_rows_inference_and_other_layers_go_the_usual_way():
    layer = nn.Linear(12, 20)
    assert name_of(linear(torch.randn(3, 12), layer)) == "AddmmBackward0"
    x = torch.randn(ROWS, 12)
    with torch.no_grad():
        assert torch.equal(linear(x, layer), layer(x))

    class Double(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    double = Double(12, 20)
    assert torch.equal(linear(x, double), 2 * nn.Linear.forward(double, x))
