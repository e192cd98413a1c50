"""From backbone features to the tokens that the transformer reads (paper, section 4.1)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import sine_position_embedding
from ..layers.precision import at_least_float32


@dataclass(frozen=True)
class FeatureLevels:
    """L feature levels of N images, flattened to S = sum_l H_l * W_l tokens of width C.

    Attributes:
        tokens: (N, S, C) features, level after level, row after row.
        position: (N or 1, S, C) position and level embedding of each token.
        padding_mask: (N, S) bool, True where a token lies on padding; None if there is none.
        spatial_shapes: (H_l, W_l) of each level.
        level_start_index: index of each level's first token.
        valid_sizes: (N, L, 2) unpadded width and height of each level in tokens, whole numbers of
            a floating type.
    """

    tokens: Tensor
    position: Tensor
    padding_mask: Tensor | None
    spatial_shapes: tuple[tuple[int, int], ...]
    level_start_index: tuple[int, ...]
    valid_sizes: Tensor
    # What each layer asks for and is computed once. torch.compile does not take functools'
    # cached_property, which has a lock before Python 3.12.
    _known: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def _once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    @property
    def valid_ratios(self) -> Tensor:
        """Unpadded over full width and height of each level: (N, L, 2)."""
        return self._once("valid_ratios", self._valid_ratios)

    def _valid_ratios(self) -> Tensor:
        return torch.stack(
            [
                torch.stack((size[:, 0] / width, size[:, 1] / height), dim=-1)
                for size, (height, width) in self._valid_and_full_sizes()
            ],
            dim=1,
        )

    def token_centers(self) -> Tensor:
        """Centre (x, y) of each token as a fraction of the unpadded image: (N, S, 2).

        The size is a whole number of tokens: where it is 50 or 150, centres are exactly on the
        limits that anchors are held to, 0.01 and 0.99, and a rounded size would let some in.
        """
        return torch.cat(
            [_centers(*shape, size) for size, shape in self._valid_and_full_sizes()], dim=1
        )

    @property
    def reference_points(self) -> Tensor:
        """Centre of each token as a fraction of each padded level: (N, S, L, 2).

        Rounded as in the reference implementation, which here multiplies valid ratios by full
        sizes where :meth:`token_centers` has whole numbers. The offsets of a new model are whole
        pixels, so its samples lie on centres of pixels, where rounding decides which neighbour
        the gradient of a location comes from.
        """
        return self._once("reference_points", self._reference_points)

    def _reference_points(self) -> Tensor:
        ratios = self.valid_ratios
        centers = []
        for level, (height, width) in enumerate(self.spatial_shapes):
            size = torch.stack((ratios[:, level, 0] * width, ratios[:, level, 1] * height), dim=-1)
            centers.append(_centers(height, width, size))
        return torch.cat(centers, dim=1)[:, :, None] * ratios[:, None]

    def separate(self, tokens: Tensor) -> Iterator[tuple[Tensor, "FeatureLevels"]]:
        """Each level by itself: its part of ``tokens`` (N, S, C), and the level."""
        for level, (height, width) in enumerate(self.spatial_shapes):
            start = self.level_start_index[level]
            piece = slice(start, start + height * width)
            yield (
                tokens[:, piece],
                FeatureLevels(
                    tokens=self.tokens[:, piece],
                    position=self.position[:, piece],
                    padding_mask=None if self.padding_mask is None else self.padding_mask[:, piece],
                    spatial_shapes=((height, width),),
                    level_start_index=(0,),
                    valid_sizes=self.valid_sizes[:, level : level + 1],
                ),
            )

    def _valid_and_full_sizes(self) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """For each level (N, 2) unpadded width and height, and full height and width."""
        return zip(self.valid_sizes.unbind(1), self.spatial_shapes, strict=True)


def _centers(height: int, width: int, size: Tensor) -> Tensor:
    """Centres (x, y) of a level's tokens over ``size`` (N, 2), width and height: (N, H * W, 2)."""
    x = (torch.arange(width, dtype=size.dtype, device=size.device) + 0.5) / size[:, :1]
    y = (torch.arange(height, dtype=size.dtype, device=size.device) + 0.5) / size[:, 1:]
    x, y = x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)
    return torch.stack((x, y), dim=-1).flatten(1, 2)


class FeatureProjection(nn.Module):
    """Project backbone features to the levels of the transformer.

    The first projections read a backbone feature each. Further levels are made of the coarsest
    backbone feature, each next one of its predecessor's output.
    """

    def __init__(
        self,
        input_proj: Sequence[nn.Module],
        hidden_dim: int,
        *,
        level_embed: bool = True,
        pixel_center: float = 0.5,
    ):
        """
        Args:
            input_proj: a module for each level, to (N, C, H_l, W_l).
            hidden_dim: width C of the tokens.
            level_embed: add a learned embedding of the level to the position.
            pixel_center: see :func:`sine_position_embedding`.
        """
        super().__init__()
        self.input_proj = nn.ModuleList(input_proj)
        self.pixel_center = pixel_center
        if level_embed:
            self.level_embed = nn.Parameter(torch.empty(len(input_proj), hidden_dim))
            nn.init.normal_(self.level_embed)
        else:
            self.register_parameter("level_embed", None)

    def forward(self, features: Sequence[Tensor], image_mask: Tensor | None) -> FeatureLevels:
        """
        Args:
            features: (N, C_l, H_l, W_l) backbone features, fine to coarse.
            image_mask: (N, H, W) bool, True on the padding of the images; None if there is none.
        """
        tokens, positions, masks, shapes, valid_sizes = [], [], [], [], []
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
            # Positions and sizes in 16 bits would be off by pixels.
            dtype = at_least_float32(feature.dtype)
            position = sine_position_embedding(mask, feature.shape[1], dtype, self.pixel_center)
            position = position.flatten(1, 2)
            if self.level_embed is not None:
                position = position + self.level_embed[level]
            valid = (~mask).to(dtype)
            valid_sizes.append(torch.stack((valid[:, 0].sum(1), valid[:, :, 0].sum(1)), dim=-1))
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
            valid_sizes=torch.stack(valid_sizes, dim=1).expand(tokens[0].shape[0], -1, -1),
        )
