"""Dense self-attention in training."""

from ddetr_d2.layers import self_attention

import pytest
import torch
from torch import nn

from .operator_inputs import needs_extension

# Keeps every weight, but goes the way of dropout.
NEXT_TO_NOTHING = 1e-9


def make(dropout, dtype=torch.float64):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, dropout=dropout, batch_first=True, dtype=dtype)
    nn.init.normal_(attention.in_proj_bias)
    query, content = (torch.randn(2, 7, 12, dtype=dtype, requires_grad=True) for _ in range(2))
    return attention, query, content


@needs_extension
@pytest.mark.parametrize("mixed", [False, True])
def test_same_as_pytorch(mixed):
    attention, query, content = make(NEXT_TO_NOTHING, torch.float32 if mixed else torch.float64)
    inputs = [query, content, *attention.parameters()]
    found = []
    for training in (True, False):
        attention.train(training)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            output = self_attention(attention, query, content)
        found.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for got, expected in zip(*found, strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() <= (0.02 if mixed else 1e-8) * expected.norm()


@needs_extension
def test_drops_weights_and_scales_the_others():
    attention, _, _ = make(0.25)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        attention.in_proj_bias[24:] = 1.0  # values
        attention.out_proj.weight.copy_(torch.eye(12))
    query = torch.zeros(10, 200, 12, dtype=torch.float64)
    output = self_attention(attention, query, query)
    assert output.grad_fn is not None
    # 200 equal weights, each kept with a probability of 0.75
    assert abs(output.mean() - 1) < 0.01
    assert abs(output[..., ::4].std() - (0.25 / 0.75 / 200) ** 0.5) < 0.003
    torch.manual_seed(0)
    first = self_attention(attention, query, query)
    torch.manual_seed(0)
    assert torch.equal(self_attention(attention, query, query), first)
    assert not torch.equal(first, output)


def test_other_modules_are_called():
    class Double(nn.MultiheadAttention):
        def forward(self, *inputs, **options):
            return (2 * super().forward(*inputs, **options)[0],)

    attention = Double(12, 3, dropout=0.5, batch_first=True)
    x = torch.randn(2, 7, 12)
    torch.manual_seed(0)
    got = self_attention(attention, x, x)
    torch.manual_seed(0)
    expected = nn.MultiheadAttention.forward(attention, x, x, x, need_weights=False)[0]
    assert torch.equal(got, 2 * expected)


@needs_extension
def test_gradients_with_dropout():
    attention, query, content = make(0.3)

    def function(query, content, *parameters):
        torch.manual_seed(0)
        return self_attention(attention, query, content)

    inputs = (query, content, *attention.parameters())
    torch.autograd.gradcheck(function, inputs, fast_mode=True)
