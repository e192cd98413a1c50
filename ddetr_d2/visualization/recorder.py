"""What the last layers of encoder and decoder are given, and so where they look."""

import inspect
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import MSDeformAttn
from ..modeling import SetDetector
from .heat_map import HeatMap, heat_map
from .sampling import SamplingPoints, sampling_points


class AttentionRecorder:
    """Remembers what the last encoder and decoder layer are given, to tell where they look.

    ::

        with AttentionRecorder(model) as recorder:
            instances = predictor(image)["instances"]
        points = recorder.from_query(instances.queries[0], image.shape[:2])

    A forward pass of one image has to run in the ``with`` block; of several the last one counts.
    Deformable DETR answers with :class:`SamplingPoints`, DETR with a :class:`HeatMap`.

    Raises:
        UserError: the model is of another kind.
    """

    def __init__(self, model: SetDetector):
        if not isinstance(model, SetDetector):
            raise UserError(
                "where a model looks can be shown of DETR and DeformableDETR only; this one is a "
                f"{type(model).__name__} (MODEL.META_ARCHITECTURE)."
            )
        self._projection = model.projection
        self._transformer = model.transformer
        self._encoder = [layer.self_attn for layer in model.transformer.encoder.layers[-1:]]
        self._decoder = model.transformer.decoder.layers[-1].cross_attn
        self._hooks: list[Any] = []
        # Arguments by name of each call in the last forward pass.
        self._calls: dict[nn.Module, list[dict[str, Any]]] = defaultdict(list)

    def __enter__(self) -> "AttentionRecorder":
        modules = [self._projection, self._transformer, *self._encoder, self._decoder]
        self._hooks = [
            module.register_forward_pre_hook(self._remember, with_kwargs=True) for module in modules
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def from_query(self, query: int, image_size: tuple[int, int]) -> SamplingPoints | HeatMap:
        """Where the last decoder layer looks for a query.

        Args:
            query: its index, as ``Instances.queries`` of a detection has it.
            image_size: (height, width) of the image in whose pixels the answer is wanted.
        """
        return self._look(self._decoder, int(query), image_size)

    def from_pixel(
        self, pixel: tuple[int, int], image_size: tuple[int, int]
    ) -> SamplingPoints | HeatMap:
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
                "the model has no encoder that could look from a pixel: "
                "MODEL.DEFORMABLE_DETR.ENC_LAYERS is 0."
            )
        height, width = self._finest_shape()
        cell = self._padded_size(image_size) / torch.tensor([width, height])
        column, row = ((torch.tensor(pixel) + 0.5) / cell).long().tolist()
        look = self._look(self._encoder[0], row * width + column, image_size)
        corners = torch.tensor([[column, row], [column + 1, row + 1]]) * cell
        return replace(look, cell=tuple(corners.flatten().tolist()))

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module is self._projection:  # a forward pass begins
            self._calls.clear()
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        self._calls[module].append(arguments)

    def _finest_shape(self) -> tuple[int, int]:
        return self._calls[self._transformer][0]["levels"].spatial_shapes[0]

    def _padded_size(self, image_size: tuple[int, int]) -> Tensor:
        """(width, height) of what the levels cover, the image and its padding, in pixels of the
        image."""
        height, width = image_size
        size = torch.tensor([width, height])
        padding_mask = self._calls[self._projection][0]["image_mask"]
        if padding_mask is None:
            return size
        inside = ~padding_mask[0]  # (H, W)
        return size / torch.stack([inside[0].float().mean(), inside[:, 0].float().mean()]).cpu()

    def _look(
        self,
        attention: MSDeformAttn | nn.MultiheadAttention,
        query: int,
        image_size: tuple[int, int],
    ) -> SamplingPoints | HeatMap:
        # An encoder layer that attends to each level by itself begins with the finest one.
        arguments = self._calls[attention][0]
        size = self._padded_size(image_size)
        if isinstance(attention, MSDeformAttn):
            return sampling_points(attention, arguments, query, size)
        return heat_map(attention, arguments, query, self._finest_shape(), size)


def check_pixel(pixel: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Raise a :class:`UserError` unless (x, y) is a pixel of an image of (height, width)."""
    (x, y), (height, width) = pixel, image_size
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"pixel {x},{y} lies outside of the image of {width} x {height} pixels; give X from 0 "
            f"to {width - 1} and Y from 0 to {height - 1}."
        )
