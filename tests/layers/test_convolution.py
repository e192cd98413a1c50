"""Convolutions with scaled weights in training."""

from ddetr_d2.layers import scaled_convolution

import pytest
import torch
import torch.nn.functional as F

from .operator_inputs import needs_extension

CASES = {
    "pointwise": {"size": 1},
    "strided": {"size": 1, "stride": (2, 2)},
    "3x3": {"size": 3, "padding": (1, 1)},
    "dilated groups": {"size": 3, "stride": (2, 1), "padding": (2, 2), "dilation": 2, "groups": 4},
}


def make(size, groups=1, dilation=1, channels_last=True, **arguments):
    """Input, weight, scale and bias, and what follows them."""
    torch.manual_seed(0)
    x = torch.randn(2, 12, 20, 28)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    tensors = (x, torch.randn(20, 12 // groups, size, size), torch.rand(20) + 0.5, torch.randn(20))
    arguments = {"stride": (1, 1), "padding": (0, 0)} | arguments
    return tensors, (*arguments.values(), (dilation, dilation), groups)


def expected(x, weight, scale, bias, *arguments):
    return F.conv2d(x, weight * scale[:, None, None, None], bias, *arguments)


def gradients(function, tensors, arguments, wanted):
    """The output, and the gradients of those tensors that are ``wanted``."""
    tensors = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
    # As activations do, the output is changed in place.
    output = function(*tensors, *arguments).relu_()
    factor = torch.linspace(-1, 2, output.numel()).view_as(output)
    return [output, *torch.autograd.grad((output * factor).sum(), [tensors[i] for i in wanted])]


@needs_extension
@pytest.mark.parametrize("wanted", [(0, 1, 3), (1,), (0,), (0, 1), (1, 3), (3,)], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case, channels_last, wanted):
    tensors, arguments = make(**CASES[case], channels_last=channels_last)
    got = gradients(scaled_convolution, tensors, arguments, wanted)
    for a, b in zip(got, gradients(expected, tensors, arguments, wanted), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-4)
    assert got[0].is_contiguous(memory_format=torch.channels_last) or not channels_last


@needs_extension
@pytest.mark.parametrize("case", ["pointwise", "3x3"])
def test_scaled_weights_are_not_kept(case):
    tensors, arguments = make(**CASES[case])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        output = scaled_convolution(*(x.requires_grad_() for x in tensors[:2]), *tensors[2:],
                                    *arguments)  # fmt: skip
    assert type(output.grad_fn).__name__ == "_ScaledConvolutionBackward"
    own = {x.data_ptr() for x in tensors}
    assert {x.data_ptr() for x in kept} <= own


def test_the_usual_way():
    """In other types, under autocast, and without gradients."""
    tensors, arguments = make(**CASES["3x3"])
    doubles = [x.double().requires_grad_() for x in tensors]
    for values, autocast in ((doubles, False), ([x.requires_grad_() for x in tensors], True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = scaled_convolution(*values, *arguments)
            torch.testing.assert_close(output, expected(*values, *arguments))
        assert type(output.grad_fn).__name__ == "ConvolutionBackward0"
    with torch.no_grad():
        assert not scaled_convolution(*tensors, *arguments).requires_grad
