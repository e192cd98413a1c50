"""Where object queries come from: learned embeddings, or proposals of the encoder."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import sine_embedding
from ..layers.precision import at_least_float
from .feature_levels import FeatureLevels
from .heads import DetectionHead, Predictions, at_most

# Side of the anchors on the finest level as a fraction of the image; it doubles per level.
ANCHOR_SIZE = 0.05
# Anchors with a coordinate outside (margin, 1 - margin) make no proposals.
ANCHOR_MARGIN = 0.01


@dataclass(frozen=True)
class Queries:
    """Object queries as they enter the decoder.

    Attributes:
        content: (N, Q, C), contiguous: a stride of 2C would make torch.export, which compares
            strides with those of N images, take a batch of two for a special case.
        position: (N, Q, C), added to queries and keys.
        reference: (N, Q, 2 or 4) reference points or boxes in [0, 1]; None where there are none.
        proposals: predictions of all encoder tokens where the queries come from them.
    """

    content: Tensor
    position: Tensor
    reference: Tensor | None = None
    proposals: Predictions | None = None


class LearnedQueries(nn.Module):
    """One learned embedding per query, split into position and content (paper, section 4.1)."""

    def __init__(self, num_queries: int, hidden_dim: int):
        """
        Args:
            num_queries: Q.
            hidden_dim: width C of the tokens.
        """
        super().__init__()
        self.query_embed = nn.Embedding(num_queries, 2 * hidden_dim)
        self.reference_points = nn.Linear(hidden_dim, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, memory: Tensor, levels: FeatureLevels) -> Queries:
        """The same queries for each of the N images of ``memory`` (N, S, C)."""
        position, content = self.query_embed.weight.expand(memory.shape[0], -1, -1).chunk(2, dim=-1)
        reference = at_least_float(self.reference_points(position)).sigmoid()
        content = content.to(memory.dtype).contiguous()  # see Queries
        return Queries(content, position.to(memory.dtype), reference)


class LearnedPositions(nn.Module):
    """A learned position per query; the content starts from zero (DETR, appendix A.3)."""

    def __init__(self, num_queries: int, hidden_dim: int):
        """
        Args:
            num_queries: Q.
            hidden_dim: width C of the tokens.
        """
        super().__init__()
        self.query_embed = nn.Embedding(num_queries, hidden_dim)

    def forward(self, memory: Tensor, levels: FeatureLevels) -> Queries:
        """The same queries for each of the N images of ``memory`` (N, S, C)."""
        position = self.query_embed.weight.to(memory.dtype).expand(memory.shape[0], -1, -1)
        return Queries(torch.zeros_like(position), position)


class EncoderProposals(nn.Module):
    """Every encoder token proposes a box, the best become queries (paper, section 4.2)."""

    def __init__(self, num_queries: int, hidden_dim: int, head: DetectionHead):
        """
        Args:
            num_queries: Q, the proposals that become queries.
            hidden_dim: width C of the tokens.
            head: scores and boxes of the proposals.
        """
        super().__init__()
        self.num_queries = num_queries
        self.enc_output = nn.Linear(hidden_dim, hidden_dim)
        self.enc_output_norm = nn.LayerNorm(hidden_dim)
        self.pos_trans = nn.Linear(2 * hidden_dim, 2 * hidden_dim)
        self.pos_trans_norm = nn.LayerNorm(2 * hidden_dim)
        self.head = head
        for linear in (self.enc_output, self.pos_trans):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, memory: Tensor, levels: FeatureLevels) -> Queries:
        """Choose the queries among the tokens of ``memory`` (N, S, C).

        Images with fewer tokens than ``num_queries`` get a query per token.
        """
        anchors, usable = self._anchors(levels)
        features = memory.masked_fill(~usable[..., None], 0.0)
        features = self.enc_output_norm(self.enc_output(features))
        proposals = self.head(features, anchors)

        # All labels of proposals are class 0: its score says how likely there is an object.
        count = at_most(self.num_queries, memory.shape[1])
        chosen = proposals.logits[..., 0].topk(count, dim=1).indices
        reference = proposals.boxes.detach().gather(1, chosen[..., None].expand(-1, -1, 4))
        embedding = sine_embedding(reference, memory.shape[2] // 2).to(memory.dtype)
        position, content = self.pos_trans_norm(self.pos_trans(embedding)).chunk(2, dim=-1)
        return Queries(content.contiguous(), position, reference, proposals)

    def _anchors(self, levels: FeatureLevels) -> tuple[Tensor, Tensor]:
        """Anchor boxes before the sigmoid (N, S, 4), +inf where a token makes no proposal, and
        which tokens do (N, S)."""
        centers = levels.token_centers()
        sizes = torch.cat(
            [
                centers.new_full((height * width, 2), ANCHOR_SIZE * 2**level)
                for level, (height, width) in enumerate(levels.spatial_shapes)
            ]
        )
        boxes = torch.cat((centers, sizes.expand_as(centers)), dim=-1)
        inside = ((boxes > ANCHOR_MARGIN) & (boxes < 1 - ANCHOR_MARGIN)).all(-1)
        usable = inside if levels.padding_mask is None else inside & ~levels.padding_mask
        return boxes.logit().masked_fill(~usable[..., None], math.inf), usable
