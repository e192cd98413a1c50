"""Where the last layers of encoder and decoder look (paper, figure 6)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import MSDeformAttn
from ..modeling import DeformableDETR


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

    A forward pass of one image has to run in the ``with`` block; of several the last one counts.

    Raises:
        UserError: the model is of another kind.
    """

    def __init__(self, model: DeformableDETR):
        if not isinstance(model, DeformableDETR):
            raise UserError(
                f"only a DeformableDETR has sampling points; the model is a {type(model).__name__} "
                "(MODEL.META_ARCHITECTURE)."
            )
        self._projection = model.projection
        self._encoder = [layer.self_attn for layer in model.transformer.encoder.layers[-1:]]
        self._decoder = model.transformer.decoder.layers[-1].cross_attn
        self._hooks: list[Any] = []
        self._arguments: dict[nn.Module, tuple] = {}

    def __enter__(self) -> "SamplingRecorder":
        modules = [self._projection, *self._encoder, self._decoder]
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
        return self._points(self._decoder, int(query), image_size)

    def encoder_points(self, pixel: tuple[int, int], image_size: tuple[int, int]) -> SamplingPoints:
        """Where the last encoder layer looks from the finest level's token at a pixel.

        Args:
            pixel: (x, y), column and row of the pixel.
            image_size: (height, width) of the image that the pixel belongs to.

        Raises:
            UserError: the pixel lies outside of the image, or the model has no encoder layer.
        """
        check_pixel(pixel, image_size)
        if not self._encoder:
            raise UserError(
                "the model has no encoder whose sampling points could be shown: "
                "MODEL.DEFORMABLE_DETR.ENC_LAYERS is 0."
            )
        spatial_shapes = self._arguments[self._encoder[0]][3]
        height, width = spatial_shapes[0]
        cell = self._padded_size(image_size) / torch.tensor([width, height])
        column, row = ((torch.tensor(pixel) + 0.5) / cell).long().tolist()
        points = self._points(self._encoder[0], row * width + column, image_size)
        corners = torch.tensor([[column, row], [column + 1, row + 1]]) * cell
        return replace(points, cell=tuple(corners.flatten().tolist()))

    def _remember(self, module: nn.Module, arguments: tuple) -> None:
        self._arguments[module] = arguments

    def _padded_size(self, image_size: tuple[int, int]) -> Tensor:
        """(width, height) of what the levels cover, the image and its padding, in pixels of the
        image."""
        height, width = image_size
        size = torch.tensor([width, height])
        padding_mask = self._arguments[self._projection][1]
        if padding_mask is None:
            return size
        inside = ~padding_mask[0]  # (H, W)
        return size / torch.stack([inside[0].float().mean(), inside[:, 0].float().mean()]).cpu()

    @torch.no_grad()
    def _points(
        self, attention: MSDeformAttn, query: int, image_size: tuple[int, int]
    ) -> SamplingPoints:
        content, reference, _, spatial_shapes, *_ = self._arguments[attention]
        chosen = slice(query, query + 1)
        reference = reference[:1, chosen]
        locations, weights = attention.sampling(content[:1, chosen], reference, spatial_shapes)
        size = self._padded_size(image_size)
        return SamplingPoints(
            # That of the finest level; on padded images those of other levels can lie beside it.
            reference[0, 0, 0, :2].float().cpu() * size,
            locations[0, 0].float().cpu() * size,
            weights[0, 0].float().cpu(),
        )


def check_pixel(pixel: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Raise a :class:`UserError` unless (x, y) is a pixel of an image of (height, width)."""
    (x, y), (height, width) = pixel, image_size
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"pixel {x},{y} lies outside of the image of {width} x {height} pixels; give X from 0 "
            f"to {width - 1} and Y from 0 to {height - 1}."
        )
