"""Where the last layers of encoder and decoder look (paper, figure 6)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import MSDeformAttn
from ..modeling import DeformableDETR
from ..modeling.feature_levels import FeatureLevels


@dataclass(frozen=True)
class SamplingPoints:
    """What one query of deformable attention looks at, on the CPU.

    Positions are (x, y) in pixels of the image, (0, 0) being its top left corner; points can lie
    outside of the image.

    Attributes:
        reference: (2,) the reference point.
        locations: (M, L, K, 2) the points of each head on each level.
        weights: (M, L, K) attention weights, which sum to 1 over the levels and points of a head.
        cell: (x0, y0, x1, y1) of an encoder's token; None for a query of the decoder.
    """

    reference: Tensor
    locations: Tensor
    weights: Tensor
    cell: tuple[float, float, float, float] | None = None


class SamplingRecorder:
    """Remembers what the last encoder and decoder layer are given, to tell where they look.

    ::

        with SamplingRecorder(model) as recorder:
            instances = predictor(image)["instances"]
        points = recorder.decoder_points(instances.queries[0], image.shape[:2])

    The forward pass in the ``with`` block has to be of one image; of several passes the last one
    counts.
    """

    def __init__(self, model: DeformableDETR):
        self._transformer = model.transformer
        self._hooks: list[Any] = []
        self._arguments: dict[nn.Module, tuple] = {}

    def __enter__(self) -> "SamplingRecorder":
        modules = [self._transformer, self._decoder_attention()]
        if self._transformer.encoder.layers:
            modules.append(self._encoder_attention())
        self._hooks = [module.register_forward_pre_hook(self._remember) for module in modules]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def decoder_points(self, query: int, image_size: tuple[int, int]) -> SamplingPoints:
        """Where the last decoder layer looks for a query.

        Args:
            query: its index, as ``Instances.queries`` of a detection has it.
            image_size: (height, width) of the image in whose pixels the answer is wanted.
        """
        return self._points(self._decoder_attention(), int(query), image_size)

    def encoder_points(self, pixel: tuple[int, int], image_size: tuple[int, int]) -> SamplingPoints:
        """Where the last encoder layer looks from the finest level's token at a pixel.

        Args:
            pixel: (x, y), column and row of the pixel.
            image_size: (height, width) of the image that the pixel belongs to.

        Raises:
            UserError: the pixel lies outside of the image, or the model has no encoder layer.
        """
        check_pixel(pixel, image_size)
        if not self._transformer.encoder.layers:
            raise UserError(
                "there are no sampling points of the encoder: MODEL.DEFORMABLE_DETR.ENC_LAYERS "
                "is 0."
            )
        levels = self._levels()
        size = torch.tensor([image_size[1], image_size[0]], dtype=torch.float64)
        height, width = levels.spatial_shapes[0]
        cells = torch.tensor([width, height]) * levels.valid_ratios[0, 0].cpu().double()
        column, row = ((torch.tensor(pixel) + 0.5) / size * cells).long().tolist()
        points = self._points(self._encoder_attention(), row * width + column, image_size)
        corners = torch.tensor([[column, row], [column + 1, row + 1]]) / cells * size
        return SamplingPoints(
            points.reference, points.locations, points.weights, tuple(corners.flatten().tolist())
        )

    def _encoder_attention(self) -> MSDeformAttn:
        return self._transformer.encoder.layers[-1].self_attn

    def _decoder_attention(self) -> MSDeformAttn:
        return self._transformer.decoder.layers[-1].cross_attn

    def _remember(self, module: nn.Module, arguments: tuple) -> None:
        self._arguments[module] = arguments

    def _levels(self) -> FeatureLevels:
        if self._transformer not in self._arguments:
            raise RuntimeError("SamplingRecorder: the model has not run in the with block")
        return self._arguments[self._transformer][0]

    @torch.no_grad()
    def _points(
        self, attention: MSDeformAttn, query: int, image_size: tuple[int, int]
    ) -> SamplingPoints:
        levels = self._levels()
        content, reference, _, spatial_shapes, *_ = self._arguments[attention]
        chosen = slice(query, query + 1)
        reference = reference[:1, chosen]
        locations, weights = attention.sampling(content[:1, chosen], reference, spatial_shapes)
        # Fractions of the padded levels become fractions of the image as in token_centers(), so
        # that a reference point lies where the model itself takes it to be.
        height, width = image_size
        scale = reference.new_tensor([width, height]) / levels.valid_ratios[0]  # (L, 2)
        return SamplingPoints(
            (reference[0, 0, 0, :2] * scale[0]).cpu(),
            (locations[0, 0] * scale[:, None]).cpu(),
            weights[0, 0].cpu(),
        )


def check_pixel(pixel: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Raise a :class:`UserError` unless (x, y) is a pixel of an image of (height, width)."""
    (x, y), (height, width) = pixel, image_size
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"pixel {x},{y} lies outside of the image of {width} x {height} pixels; give X from 0 "
            f"to {width - 1} and Y from 0 to {height - 1}."
        )
