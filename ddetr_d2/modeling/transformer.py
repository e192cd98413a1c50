"""Encoder and decoder of the family; which attention looks at the image, their layers decide.

Layers are completed in :mod:`.dense_layers` (DETR) and :mod:`.deformable_layers`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..layers import dropout, feed_forward, self_attention
from .checkpointing import run_checkpointed
from .feature_levels import FeatureLevels
from .heads import DetectionHead, Predictions, inverse_sigmoid
from .queries import Queries


@dataclass(frozen=True)
class TransformerSize:
    """Widths and counts that all layers of one transformer share."""

    hidden_dim: int
    num_heads: int
    dim_feedforward: int
    dropout: float


def dense_attention(size: TransformerSize) -> nn.MultiheadAttention:
    """Multi-head attention of all queries to all keys, with Xavier uniform matrices."""
    attention = nn.MultiheadAttention(
        size.hidden_dim, size.num_heads, dropout=size.dropout, batch_first=True
    )
    nn.init.xavier_uniform_(attention.out_proj.weight)
    return attention


class FeedForward(nn.Module):
    """Two linear layers with ReLU, residual connection and LayerNorm."""

    def __init__(self, size: TransformerSize):
        super().__init__()
        self.linear1 = nn.Linear(size.hidden_dim, size.dim_feedforward)
        self.linear2 = nn.Linear(size.dim_feedforward, size.hidden_dim)
        self.norm = nn.LayerNorm(size.hidden_dim)
        self.dropout = nn.Dropout(size.dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, Q, C) to (N, Q, C)."""
        return self.norm(feed_forward(x, self.linear1, self.linear2, self.dropout.p, self.training))


class EncoderLayer(nn.Module):
    """Self-attention over the tokens of all levels, then a feed-forward network."""

    def __init__(self, size: TransformerSize, self_attn: nn.Module):
        """
        Args:
            size: widths and counts.
            self_attn: what :meth:`attend` uses.
        """
        super().__init__()
        self.self_attn = self_attn
        self.norm1 = nn.LayerNorm(size.hidden_dim)
        self.dropout = nn.Dropout(size.dropout)
        self.ffn = FeedForward(size)

    def forward(self, tokens: Tensor, levels: FeatureLevels) -> Tensor:
        """
        Args:
            tokens: (N, S, C).
            levels: where the tokens lie.
        """
        attended = self.attend(tokens, levels)
        return self.ffn(self.norm1(dropout(attended, self.dropout.p, self.training, tokens)))

    def attend(self, tokens: Tensor, levels: FeatureLevels) -> Tensor:
        """Self-attention, arguments as in :meth:`forward`, to (N, S, C)."""
        raise NotImplementedError


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, layers: Sequence[EncoderLayer], *, checkpoint: bool = False):
        """
        Args:
            layers: encoder layers.
            checkpoint: see :func:`run_checkpointed`.
        """
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.checkpoint = checkpoint

    def forward(self, levels: FeatureLevels) -> Tensor:
        """Return the tokens (N, S, C) after all layers."""
        tokens = levels.tokens
        for layer in self.layers:
            tokens = run_checkpointed(self.checkpoint, layer, tokens, levels)
        return tokens


class DecoderLayer(nn.Module):
    """Self-attention among the queries, cross-attention into the memory, feed-forward network.

    The norm after self-attention is ``norm2`` and that after cross-attention ``norm1``, as in the
    weights of Deformable DETR's reference implementation.
    """

    def __init__(self, size: TransformerSize, cross_attn: nn.Module):
        """
        Args:
            size: widths and counts.
            cross_attn: what :meth:`attend` uses.
        """
        super().__init__()
        self.self_attn = dense_attention(size)
        self.norm2 = nn.LayerNorm(size.hidden_dim)
        self.cross_attn = cross_attn
        self.norm1 = nn.LayerNorm(size.hidden_dim)
        self.dropout = nn.Dropout(size.dropout)
        self.ffn = FeedForward(size)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        reference: Tensor | None,
        memory: Tensor,
        levels: FeatureLevels,
    ) -> Tensor:
        """
        Args:
            content: (N, Q, C).
            position: (N, Q, C).
            reference: (N, Q, 2 or 4) reference points or boxes, fractions of the unpadded image;
                None where queries have none.
            memory: (N, S, C) output of the encoder.
            levels: where the tokens of the memory lie.
        """
        query = content + position
        attended = self_attention(self.self_attn, query, content)
        content = self.norm2(dropout(attended, self.dropout.p, self.training, content))
        attended = self.attend(content + position, reference, memory, levels)
        return self.ffn(self.norm1(dropout(attended, self.dropout.p, self.training, content)))

    def attend(
        self, query: Tensor, reference: Tensor | None, memory: Tensor, levels: FeatureLevels
    ) -> Tensor:
        """Cross-attention of queries (N, Q, C), content and position, to (N, Q, C)."""
        raise NotImplementedError


class Decoder(nn.Module):
    """A stack of decoder layers, each followed by a detection head.

    With as many heads as layers, boxes are refined iteratively: the box of one layer, detached,
    is the reference of the next (Deformable DETR, section 4.2). With a single head, all layers
    share it and start from the reference of the queries, if those have one.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        heads: Sequence[DetectionHead],
        *,
        norm: nn.Module | None = None,
        inverse_sigmoid_eps: float = 1e-5,
        checkpoint: bool = False,
    ):
        """
        Args:
            layers: decoder layers.
            heads: one for all layers, or one per layer.
            norm: what the outputs of all layers pass on their way to the heads.
            inverse_sigmoid_eps: see :func:`inverse_sigmoid`; how near references come to 0 and 1.
            checkpoint: see :func:`run_checkpointed`.
        """
        super().__init__()
        if len(heads) not in (1, len(layers)):
            raise ValueError(f"expected 1 or {len(layers)} heads, got {len(heads)}")
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.heads = nn.ModuleList(heads)
        self.refines_boxes = len(heads) == len(layers)
        self.inverse_sigmoid_eps = inverse_sigmoid_eps
        self.checkpoint = checkpoint

    def forward(self, queries: Queries, memory: Tensor, levels: FeatureLevels) -> list[Predictions]:
        """Return the predictions of every layer, the final ones last."""
        content = queries.content
        reference = queries.reference
        predictions = []
        for index, layer in enumerate(self.layers):
            content = run_checkpointed(
                self.checkpoint, layer, content, queries.position, reference, memory, levels
            )
            head = self.heads[index if self.refines_boxes else 0]
            features = content if self.norm is None else self.norm(content)
            reference_logits = (
                None if reference is None else inverse_sigmoid(reference, self.inverse_sigmoid_eps)
            )
            predictions.append(head(features, reference_logits))
            if self.refines_boxes and reference is not None:
                reference = predictions[-1].boxes.detach()
        return predictions


class Transformer(nn.Module):
    """Encoder, queries and decoder."""

    def __init__(self, encoder: Encoder, queries: nn.Module, decoder: Decoder):
        """
        Args:
            encoder: feature levels to memory.
            queries: a module from ``(memory, levels)`` to :class:`Queries`.
            decoder: queries and memory to predictions.
        """
        super().__init__()
        self.encoder = encoder
        self.queries = queries
        self.decoder = decoder

    def forward(self, levels: FeatureLevels) -> tuple[list[Predictions], Predictions | None]:
        """Return the predictions of every decoder layer, and the encoder's proposals if any."""
        memory = self.encoder(levels)
        queries = self.queries(memory, levels)
        return self.decoder(queries, memory, levels), queries.proposals
