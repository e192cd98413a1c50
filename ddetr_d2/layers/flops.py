"""Multiply-adds of the operators that fvcore has no count for, as handles for its analyses.

As in fvcore, one multiply-add is one FLOP; elementwise arithmetic, reductions, softmax and moves of
data are free. A handle takes the inputs and outputs of a node of a traced graph, see
:meth:`fvcore.nn.jit_analysis.JitModelAnalysis.set_op_handle`.
"""

from collections import Counter
from math import prod
from typing import Any

from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from fvcore.nn.jit_handles import conv_flop_count, generic_activation_jit, get_shape

# A bilinear sample is four pixels, each times its share.
BILINEAR = 4

# Free operators that neither fvcore nor Detectron2 lists as such.
_FREE_OPS = (
    "aten::all",
    "aten::cos",
    "aten::cumsum",
    "aten::expand_as",
    "aten::fill_",
    "aten::log",
    "aten::logit",
    "aten::lt",
    "aten::mean",
    "aten::pad",
    "aten::pow",
    "aten::repeat",
    "aten::sin",
    "aten::sum",
    "aten::topk",
    "aten::unflatten",
    "aten::where",
)


def ms_deform_attn_flops(
    batch: int, queries: int, heads: int, levels: int, points: int, channels: int
) -> int:
    """Multiply-adds of :func:`ddetr_d2.layers.ms_deform_attn`: 5 * N * Q * M * L * K * D.

    Each of the N * Q * M * L * K samples is read from D channels, and each channel costs four
    multiply-adds for the bilinear interpolation and one for the attention weight. With C = M * D
    that is the term 5 * N_q * K * C of the paper (appendix A.1), on L levels. What a sample costs
    once for all its channels (its place in pixels, the four shares) is left out, as fvcore does
    for ``grid_sample``, which alone it counts with 4 * N * Q * M * L * K * D. The projections of
    the attention are linear layers and not part of this.

    Args:
        batch: images N.
        queries: queries Q.
        heads: heads M.
        levels: levels L.
        points: sampling points K per head and level.
        channels: channels D per head.
    """
    return (BILINEAR + 1) * batch * queries * heads * levels * points * channels


def _ms_deform_attn(inputs: list[Any], outputs: list[Any]) -> int:
    """value (N, S, M, D), spatial_shapes, sampling_locations (N, Q, M, L, K, 2), weights."""
    batch, queries, heads, levels, points, _ = get_shape(inputs[2])
    return ms_deform_attn_flops(
        batch, queries, heads, levels, points, channels=get_shape(inputs[0])[-1]
    )


def _grid_sampler(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """The only sampling in the model is that of the operator in plain PyTorch, which multiplies
    the samples with their weights elementwise: count it as the compiled one."""
    return Counter({"ms_deform_attn": (BILINEAR + 1) * prod(get_shape(outputs[0]))})


def _attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """query (..., Q, E), key (..., S, E), value (..., S, V): the two matrix products."""
    *heads, queries, width = get_shape(inputs[0])
    *_, keys, value_width = get_shape(inputs[2])
    return Counter({"attention": prod(heads) * queries * keys * (width + value_width)})


def _deform_conv(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """A convolution and, for each value that it reads, a bilinear sample and its mask if any."""
    x_shape, w_shape, out_shape = map(get_shape, (inputs[0], inputs[1], outputs[0]))
    samples = x_shape[0] * x_shape[1] * prod(w_shape[2:]) * prod(out_shape[2:])
    use_mask = inputs[-1].toIValue()
    return Counter(
        {
            "deform_conv": conv_flop_count(x_shape, w_shape, out_shape)
            + samples * (BILINEAR + use_mask)
        }
    )


def _free(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


def add_flop_handles(analysis: FlopCountAnalysis) -> None:
    """Let ``analysis`` count the operators of DETR and Deformable DETR.

    Batch normalisation is free: at inference it is one factor and one summand per channel, which
    is elementwise arithmetic and can be folded into the convolution before it.
    """
    analysis.set_op_handle(
        **{
            "ddetr_d2::ms_deform_attn": _ms_deform_attn,
            "aten::grid_sampler": _grid_sampler,
            "aten::scaled_dot_product_attention": _attention,
            "torchvision::deform_conv2d": _deform_conv,
            # A count that is there already is only replaced by another, not by ignoring the
            # operator.
            "aten::batch_norm": _free,
        }
    )
    analysis.set_op_handle(**dict.fromkeys(_FREE_OPS))


def add_activation_handles(analysis: ActivationCountAnalysis) -> None:
    """Let ``analysis`` count the outputs of the same operators as activations."""
    analysis.set_op_handle(
        **{
            "ddetr_d2::ms_deform_attn": generic_activation_jit(),
            "aten::scaled_dot_product_attention": generic_activation_jit("attention"),
            "torchvision::deform_conv2d": generic_activation_jit("deform_conv"),
        }
    )
