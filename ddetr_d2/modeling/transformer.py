"""The deformable transformer (paper, section 4.1 and appendix A.4)."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..layers import MSDeformAttn
from .feature_levels import FeatureLevels
from .heads import DetectionHead, Predictions, inverse_sigmoid
from .queries import Queries


@dataclass(frozen=True)
class TransformerSize:
    """Widths and counts that all layers of one transformer share."""

    hidden_dim: int
    num_heads: int
    num_levels: int
    dim_feedforward: int
    dropout: float


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
        hidden = self.dropout(self.linear1(x).relu_())
        return self.norm(x + self.dropout(self.linear2(hidden)))


class DeformableTransformerEncoderLayer(nn.Module):
    """Deformable self-attention over the tokens of all levels, then a feed-forward network."""

    def __init__(self, size: TransformerSize, num_points: int):
        super().__init__()
        self.self_attn = MSDeformAttn(size.hidden_dim, size.num_heads, size.num_levels, num_points)
        self.norm1 = nn.LayerNorm(size.hidden_dim)
        self.dropout = nn.Dropout(size.dropout)
        self.ffn = FeedForward(size)

    def forward(self, tokens: Tensor, reference_points: Tensor, levels: FeatureLevels) -> Tensor:
        """
        Args:
            tokens: (N, S, C).
            reference_points: (N, S, L, 2) centre of each token on each level.
            levels: where the tokens lie.
        """
        attended = self.self_attn(
            tokens + levels.position,
            reference_points,
            tokens,
            levels.spatial_shapes,
            levels.level_start_index,
            levels.padding_mask,
        )
        return self.ffn(self.norm1(tokens + self.dropout(attended)))


class DeformableTransformerEncoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, size: TransformerSize, num_layers: int, num_points: int):
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableTransformerEncoderLayer(size, num_points) for _ in range(num_layers)
        )

    def forward(self, levels: FeatureLevels) -> Tensor:
        """Return the tokens (N, S, C) after all layers."""
        reference_points = levels.reference_points()
        tokens = levels.tokens
        for layer in self.layers:
            tokens = layer(tokens, reference_points, levels)
        return tokens


class DeformableTransformerDecoderLayer(nn.Module):
    """Self-attention among the queries, deformable cross-attention into the memory, FFN."""

    def __init__(self, size: TransformerSize, num_points: int):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(
            size.hidden_dim, size.num_heads, dropout=size.dropout, batch_first=True
        )
        nn.init.xavier_uniform_(self.self_attn.out_proj.weight)
        self.norm2 = nn.LayerNorm(size.hidden_dim)
        self.cross_attn = MSDeformAttn(size.hidden_dim, size.num_heads, size.num_levels, num_points)
        self.norm1 = nn.LayerNorm(size.hidden_dim)
        self.dropout = nn.Dropout(size.dropout)
        self.ffn = FeedForward(size)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        levels: FeatureLevels,
    ) -> Tensor:
        """
        Args:
            content: (N, Q, C).
            position: (N, Q, C).
            reference_points: (N, Q, L, 2 or 4) on each level.
            memory: (N, S, C) output of the encoder.
            levels: where the tokens of the memory lie.
        """
        query = content + position
        attended = self.self_attn(query, query, content, need_weights=False)[0]
        content = self.norm2(content + self.dropout(attended))
        attended = self.cross_attn(
            content + position,
            reference_points,
            memory,
            levels.spatial_shapes,
            levels.level_start_index,
            levels.padding_mask,
        )
        return self.ffn(self.norm1(content + self.dropout(attended)))


class DeformableTransformerDecoder(nn.Module):
    """A stack of decoder layers, each followed by a detection head.

    With as many heads as layers, boxes are refined iteratively: the box of one layer, detached,
    is the reference of the next (paper, section 4.2). With a single head, all layers share it
    and start from the reference of the queries.
    """

    def __init__(
        self,
        size: TransformerSize,
        num_layers: int,
        num_points: int,
        heads: list[DetectionHead],
        inverse_sigmoid_eps: float = 1e-5,
    ):
        """
        Args:
            size: widths and counts.
            num_layers: decoder layers.
            num_points: sampling points K per head and level.
            heads: one for all layers, or one per layer.
            inverse_sigmoid_eps: see :func:`inverse_sigmoid`; how near references come to 0 and 1.
        """
        super().__init__()
        if len(heads) not in (1, num_layers):
            raise ValueError(f"expected 1 or {num_layers} heads, got {len(heads)}")
        self.layers = nn.ModuleList(
            DeformableTransformerDecoderLayer(size, num_points) for _ in range(num_layers)
        )
        self.heads = nn.ModuleList(heads)
        self.refines_boxes = len(heads) == num_layers
        self.inverse_sigmoid_eps = inverse_sigmoid_eps

    def forward(self, queries: Queries, memory: Tensor, levels: FeatureLevels) -> list[Predictions]:
        """Return the predictions of every layer, the final ones last."""
        content = queries.content
        reference = queries.reference
        valid_ratios = levels.valid_ratios[:, None]
        predictions = []
        for index, layer in enumerate(self.layers):
            ratios = valid_ratios.repeat(1, 1, 1, reference.shape[-1] // 2)
            content = layer(
                content, queries.position, reference[:, :, None] * ratios, memory, levels
            )
            head = self.heads[index if self.refines_boxes else 0]
            reference_logits = inverse_sigmoid(reference, self.inverse_sigmoid_eps)
            predictions.append(head(content, reference_logits))
            if self.refines_boxes:
                reference = predictions[-1].boxes.detach()
        return predictions


class DeformableTransformer(nn.Module):
    """Encoder, queries and decoder."""

    def __init__(
        self,
        encoder: DeformableTransformerEncoder,
        queries: nn.Module,
        decoder: DeformableTransformerDecoder,
    ):
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
