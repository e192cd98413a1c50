"""From backbone features to the tokens that the transformer reads (paper, section 4.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import sine_position_embedding


@dataclass(frozen=True)
class FeatureLevels:
    """L feature levels of N images, flattened to S = sum_l H_l * W_l tokens of width C.

    Attributes:
        tokens: (N, S, C) features, level after level, row after row.
        position: (N or 1, S, C) position and level embedding of each token.
        padding_mask: (N, S) bool, True where a token lies on padding; None if there is none.
        spatial_shapes: (H_l, W_l) of each level.
        level_start_index: index of each level's first token.
        valid_ratios: (N, L, 2) unpadded over full width and height of each level.
    """

    tokens: Tensor
    position: Tensor
    padding_mask: Tensor | None
    spatial_shapes: tuple[tuple[int, int], ...]
    level_start_index: tuple[int, ...]
    valid_ratios: Tensor

    def token_centers(self) -> Tensor:
        """Centre (x, y) of each token as a fraction of the unpadded image: (N, S, 2)."""
        centers = []
        for level, (height, width) in enumerate(self.spatial_shapes):
            options = {"dtype": self.valid_ratios.dtype, "device": self.valid_ratios.device}
            y = (torch.arange(height, **options) + 0.5) / height
            x = (torch.arange(width, **options) + 0.5) / width
            grid = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1)
            centers.append(grid.flatten(0, 1) / self.valid_ratios[:, None, level])
        return torch.cat(centers, dim=1)


class FeatureProjection(nn.Module):
    """Project backbone features to the levels of the transformer.

    Each feature passes a 1x1 convolution and GroupNorm. Further levels are 3x3 convolutions of
    stride 2, the first of them on the coarsest backbone feature, each next one on its
    predecessor's output.
    """

    def __init__(self, in_channels: Sequence[int], num_levels: int, hidden_dim: int):
        """
        Args:
            in_channels: channels of the backbone features, fine to coarse.
            num_levels: levels in all, at least ``len(in_channels)``.
            hidden_dim: width C of the tokens, a multiple of 32 (groups of the normalisation).
        """
        super().__init__()
        projections = [nn.Conv2d(channels, hidden_dim, kernel_size=1) for channels in in_channels]
        channels = in_channels[-1]
        for _ in range(num_levels - len(in_channels)):
            projections.append(nn.Conv2d(channels, hidden_dim, kernel_size=3, stride=2, padding=1))
            channels = hidden_dim
        for projection in projections:
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        self.input_proj = nn.ModuleList(
            nn.Sequential(projection, nn.GroupNorm(32, hidden_dim)) for projection in projections
        )
        self.level_embed = nn.Parameter(torch.empty(num_levels, hidden_dim))
        nn.init.normal_(self.level_embed)

    def forward(self, features: Sequence[Tensor], image_mask: Tensor | None) -> FeatureLevels:
        """
        Args:
            features: (N, C_l, H_l, W_l) backbone features, fine to coarse.
            image_mask: (N, H, W) bool, True on the padding of the images; None if there is none.
        """
        tokens, positions, masks, shapes, valid_ratios = [], [], [], [], []
        coarsest = features[-1]
        for level, projection in enumerate(self.input_proj):
            if level < len(features):
                feature = projection(features[level])
            else:
                feature = coarsest = projection(coarsest)
            height, width = feature.shape[-2:]
            if image_mask is None:  # then positions are the same in all images
                mask = torch.zeros((1, height, width), dtype=torch.bool, device=feature.device)
            else:
                mask = F.interpolate(image_mask[:, None].float(), size=(height, width))[:, 0].bool()
            # Positions and ratios in 16 bits would be off by pixels.
            dtype = torch.promote_types(feature.dtype, torch.float32)
            position = sine_position_embedding(mask, feature.shape[1], dtype)
            position = position.flatten(1, 2) + self.level_embed[level]
            valid = (~mask).to(dtype)
            valid_ratios.append(
                torch.stack((valid[:, 0, :].mean(1), valid[:, :, 0].mean(1)), dim=-1)
            )
            tokens.append(feature.flatten(2).transpose(1, 2))
            positions.append(position.to(feature.dtype))
            masks.append(mask.flatten(1))
            shapes.append((height, width))
        starts = [0]
        for height, width in shapes[:-1]:
            starts.append(starts[-1] + height * width)
        return FeatureLevels(
            tokens=torch.cat(tokens, dim=1),
            position=torch.cat(positions, dim=1),
            padding_mask=None if image_mask is None else torch.cat(masks, dim=1),
            spatial_shapes=tuple(shapes),
            level_start_index=tuple(starts),
            valid_ratios=torch.stack(valid_ratios, dim=1).expand(tokens[0].shape[0], -1, -1),
        )
