"""ddetr_d2.layers.flops: the formulas against counts by hand."""

import sys

from ddetr_d2.layers import MSDeformAttn, ms_deform_attn
from ddetr_d2.layers.deform_conv import DeformConv, ModulatedDeformConv
from ddetr_d2.layers.flops import add_activation_handles, add_flop_handles, ms_deform_attn_flops

import pytest
import torch
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import ActivationCountAnalysis
from torch import nn

SHAPES = ((4, 6), (2, 3))
N, Q, M, L, K, D = 2, 5, 2, 2, 3, 4


class Sampling(nn.Module):
    def forward(self, value, locations, weights):
        return ms_deform_attn(value, SHAPES, (0, 24), locations, weights)


@pytest.fixture
def sampled():
    tokens = sum(height * width for height, width in SHAPES)
    return torch.rand(N, tokens, M, D), torch.rand(N, Q, M, L, K, 2), torch.rand(N, Q, M, L, K)


def flops(module, *inputs):
    analysis = FlopCountAnalysis(module.eval(), inputs)
    add_flop_handles(analysis)
    analysis.uncalled_modules_warnings(False)
    counts = analysis.by_operator()
    assert not analysis.unsupported_ops()
    return dict(counts)


def multiply_adds_of_sampling(value, locations, weights):
    """Run the definition on scalars that count: four pixels and one weight for each channel."""
    count = 0
    for _ in locations.flatten(0, -2):
        for _ in range(value.shape[-1]):
            corners = [(0, 0), (0, 1), (1, 0), (1, 1)]
            count += len(corners)  # sample += share * pixel
            count += 1  # output += weight * sample
    return count


def test_sampling(sampled):
    expected = multiply_adds_of_sampling(*sampled)
    assert expected == 2400
    assert ms_deform_attn_flops(N, Q, M, L, K, D) == expected
    assert flops(Sampling(), *sampled) == {"ms_deform_attn": expected}


def test_sampling_in_plain_pytorch_counts_the_same(sampled, monkeypatch):
    monkeypatch.setattr(sys.modules[ms_deform_attn.__module__], "_COMPILED_DEVICES", ())
    assert flops(Sampling(), *sampled) == {"ms_deform_attn": 2400}


def test_sampling_is_five_quarters_of_grid_sample(sampled, monkeypatch):
    monkeypatch.setattr(sys.modules[ms_deform_attn.__module__], "_COMPILED_DEVICES", ())
    analysis = FlopCountAnalysis(Sampling(), sampled).unsupported_ops_warnings(False)
    assert analysis.by_operator()["grid_sampler"] == 2400 * 4 // 5


def test_projections_of_the_attention_are_linear_layers():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = MSDeformAttn(M * D, M, L, K)

        def forward(self, query, reference, tokens):
            return self.attention(query, reference, tokens, SHAPES, (0, 24))

    counts = flops(
        Attention(), torch.rand(N, Q, M * D), torch.rand(N, Q, L, 4), torch.rand(N, 30, M * D)
    )
    offsets, weights, output = Q * 8 * M * L * K * 2, Q * 8 * M * L * K, Q * 8 * 8
    values = 30 * 8 * 8
    assert counts["linear"] == N * (offsets + weights + output + values)
    assert counts["ms_deform_attn"] == 2400


@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention(need_weights):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, query, value):
            return self.attention(query, query, value, need_weights=need_weights)[0]

    counts = flops(Attention(), torch.rand(N, Q, 12), torch.rand(N, Q, 12))
    products = 2 * N * Q * Q * 12
    assert sum(counts.values()) == 4 * N * Q * 12 * 12 + products


@pytest.mark.parametrize(("kind", "per_sample"), [(DeformConv, 4), (ModulatedDeformConv, 5)])
def test_deformable_convolution(kind, per_sample):
    conv = kind(4, 6, kernel_size=3, padding=1, stride=2)
    inputs = [torch.rand(1, 4, 8, 10), torch.rand(1, 18, 4, 5)]
    if kind is ModulatedDeformConv:
        inputs.append(torch.rand(1, 9, 4, 5))
    samples = 4 * 9 * (4 * 5)
    assert flops(conv, *inputs) == {"deform_conv": samples * 6 + samples * per_sample}


def test_batch_normalisation_is_free():
    convolution = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    counts = flops(convolution, torch.rand(1, 3, 5, 7))
    assert counts.pop("batch_norm", 0) == 0
    assert counts == {"conv": 3 * 4 * 5 * 7}


def test_activations(sampled):
    analysis = ActivationCountAnalysis(Sampling(), sampled).unsupported_ops_warnings(False)
    add_activation_handles(analysis)
    assert analysis.by_operator() == {"ms_deform_attn": N * Q * M * D}
