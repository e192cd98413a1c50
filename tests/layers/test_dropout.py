"""Dropout by the compiled operator."""

import math

from ddetr_d2.layers import dropout

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from .operator_inputs import needs_extension

pytestmark = needs_extension
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def zeros_of(p, seed, count=1 << 18):
    return torch.ops.ddetr_d2.dropout(torch.ones(count), p, seed) == 0


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_share_of_zeros(p):
    count = 1 << 18
    deviation = math.sqrt(p * (1 - p) / count)
    shares = torch.tensor([zeros_of(p, seed).double().mean() for seed in range(8)])
    assert ((shares - p).abs() <= 4.5 * deviation).all()
    if 0 < p < 1:
        assert 0.3 * deviation < shares.std() < 2 * deviation


@pytest.mark.parametrize("distance", [1, 2, 16, 64, 256, 1 << 12])
def test_zeros_are_independent_of_one_another(distance):
    p = 0.3
    zeros = zeros_of(p, 5)
    together = (zeros[distance:] & zeros[:-distance]).double().mean()
    assert abs(together - p * p) < 5 * p / math.sqrt(len(zeros))


@pytest.mark.parametrize("other", [6, 5 + 2**32, -6, 5 ^ (1 << 62)])
def test_zeros_of_two_seeds_are_independent(other):
    p = 0.3
    zeros = zeros_of(p, 5)
    together = (zeros & zeros_of(p, other)).double().mean()
    assert abs(together - p * p) < 5 * p / math.sqrt(len(zeros))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 21), (2, 5, 64), (0, 4)])
def test_values(dtype, shape):
    x = torch.randn(shape, dtype=dtype)
    zeros = torch.ops.ddetr_d2.dropout(torch.ones(shape), 0.25, 7) == 0
    expected = (x.double() / 0.75).masked_fill(zeros, 0.0)
    torch.testing.assert_close(torch.ops.ddetr_d2.dropout(x, 0.25, 7), expected.to(dtype))
    residual = torch.randn(shape, dtype=dtype)
    got = torch.ops.ddetr_d2.dropout(x, 0.25, 7, residual, True)
    torch.testing.assert_close(got, (expected.relu() + residual.double()).to(dtype))
    in_place = x.clone()
    assert torch.ops.ddetr_d2.dropout_(in_place, 0.25, 7, residual, True) is not None
    assert torch.equal(in_place, got)


def test_residual_of_float_gives_float():
    x, residual = torch.randn(8, 100).bfloat16(), torch.randn(8, 100)
    zeros = torch.ops.ddetr_d2.dropout(torch.ones(8, 100), 0.25, 7) == 0
    got = torch.ops.ddetr_d2.dropout(x, 0.25, 7, residual)
    expected = residual + (x.float() / 0.75).masked_fill(zeros, 0.0)
    torch.testing.assert_close(got, expected)


def test_other_memory_format_has_the_same_zeros():
    x = torch.randn(64, 128)
    got = torch.ops.ddetr_d2.dropout(x.t().contiguous().t(), 0.5, 3)
    assert torch.equal(got, torch.ops.ddetr_d2.dropout(x, 0.5, 3))


def test_any_number_of_threads_gives_the_same():
    x, threads = torch.randn(300_001), torch.get_num_threads()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(torch.ops.ddetr_d2.dropout(x, 0.5, 11))
    torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_seed_comes_from_the_default_generator():
    x = torch.randn(1000)
    state = torch.get_rng_state()
    first, second = dropout(x, 0.5, True), dropout(x, 0.5, True)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x, 0.5, True), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients(with_residual):
    inputs = [torch.randn(6, 50, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def function(x, residual):
        torch.manual_seed(0)
        return dropout(x, 0.4, True, residual if with_residual else None)

    torch.autograd.gradcheck(function, inputs[: 1 + with_residual] + [None] * (not with_residual))


def test_checkpointing_repeats_the_zeros():
    x = torch.randn(1000, requires_grad=True)
    expected, got = (
        torch.autograd.grad(function(x).sum(), x)[0]
        for function in (
            lambda x: seeded(lambda: dropout(x.sin(), 0.5, True)),
            lambda x: seeded(
                lambda: checkpoint(lambda x: dropout(x.sin(), 0.5, True), x, use_reentrant=False)
            ),
        )
    )
    assert torch.equal(got, expected)


def seeded(function):
    torch.manual_seed(0)
    return function()


def test_nothing_is_dropped_without_training():
    x, residual = torch.randn(2, 100)
    assert dropout(x, 0.5, False) is x
    assert torch.equal(dropout(x, 0.5, False, residual), residual + x)


def test_traces_have_the_standard_operator():
    with torch.no_grad():
        graph = torch.jit.trace(lambda x: dropout(x, 0.5, True), torch.randn(10), check_trace=False)
    assert "aten::dropout" in str(graph.graph)
    graph = torch.export.export(Dropout(), (torch.randn(10),)).graph
    assert "ddetr_d2" not in str(graph)


class Dropout(torch.nn.Module):
    def forward(self, x):
        return dropout(x, 0.5, True)


def test_wrong_arguments():
    operator = torch.ops.ddetr_d2.dropout
    with pytest.raises(RuntimeError, match="probability between 0 and 1, got 1.5"):
        operator(torch.ones(3), 1.5, 0)
    with pytest.raises(RuntimeError, match="floating point"):
        operator(torch.ones(3, dtype=torch.int64), 0.5, 0)
    with pytest.raises(RuntimeError, match="residual with the shape and type"):
        operator(torch.ones(3), 0.5, 0, torch.ones(4))
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.ddetr_d2.dropout_(torch.ones(3, 4).t(), 0.5, 0)
