"""Layers with dense attention: every query looks at every token (DETR, appendix A.3)."""

from torch import Tensor

from .feature_levels import FeatureLevels
from .transformer import DecoderLayer, EncoderLayer, TransformerSize, dense_attention


class DenseEncoderLayer(EncoderLayer):
    """Each token looks at all tokens."""

    def __init__(self, size: TransformerSize):
        super().__init__(size, dense_attention(size))

    def attend(self, tokens: Tensor, levels: FeatureLevels) -> Tensor:
        """See :meth:`EncoderLayer.attend`."""
        query = tokens + levels.position
        return self.self_attn(
            query, query, tokens, key_padding_mask=levels.padding_mask, need_weights=False
        )[0]


class DenseDecoderLayer(DecoderLayer):
    """Each query looks at all tokens of the memory; it has no reference."""

    def __init__(self, size: TransformerSize):
        super().__init__(size, dense_attention(size))

    def attend(
        self, query: Tensor, reference: Tensor | None, memory: Tensor, levels: FeatureLevels
    ) -> Tensor:
        """See :meth:`DecoderLayer.attend`."""
        return self.cross_attn(
            query,
            memory + levels.position,
            memory,
            key_padding_mask=levels.padding_mask,
            need_weights=False,
        )[0]
