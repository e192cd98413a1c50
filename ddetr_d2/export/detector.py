"""The detector between plain tensors, as it is exported."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import MSDeformAttn
from ..modeling import SetDetector
from .sampling import sample_with_extension, sample_with_gather, sample_with_grid_sample

# How exported files sample: formulation by name; None leaves the operator of ddetr_d2.
SAMPLINGS: dict[str, Callable[..., Tensor] | None] = {
    "grid_sample": sample_with_grid_sample,
    "gather": sample_with_gather,
    "extension": sample_with_extension,
    "operator": None,
}


class ExportableDetector(nn.Module):
    """A copy of a detector, for inference, that takes and returns a fixed number of tensors.

    Attributes:
        input_names: names of the arguments of :meth:`forward`.
        output_names: names of what it returns.
    """

    def __init__(
        self,
        model: SetDetector,
        *,
        preprocess: bool = True,
        postprocess: bool = True,
        sampling: str = "grid_sample",
    ):
        """
        Args:
            model: the detector; it is not changed.
            preprocess: normalise the images and mask their padding inside.
            postprocess: choose the best detections and scale their boxes inside.
            sampling: one of :data:`SAMPLINGS`.
        """
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.preprocess = preprocess
        self.postprocess = postprocess
        self.sampling = sampling
        self.input_names = ["images", "image_sizes" if preprocess else "padding_mask"]
        self.output_names = ["logits", "boxes"]
        if postprocess:
            self.input_names.append("output_sizes")
            self.output_names = ["scores", "labels", "boxes"]
        operator = SAMPLINGS[sampling]
        if operator is not None:
            for module in self.model.modules():
                if isinstance(module, MSDeformAttn):
                    module.operator = operator

    def forward(
        self, images: Tensor, sizes_or_mask: Tensor, output_sizes: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Detect on a batch of images padded at the right and the bottom.

        Args:
            images: with ``preprocess`` (N, 3, H, W) uint8 in the channel order of
                ``INPUT.FORMAT``; otherwise float32, normalised, zero on the padding.
            sizes_or_mask: with ``preprocess`` (N, 2) int64, height and width of each image
                without its padding; otherwise (N, H, W) bool, True on padding.
            output_sizes: with ``postprocess`` (N, 2) int64, height and width of the pictures in
                whose pixels boxes are wanted, usually those of the images before any resizing.

        Returns:
            with ``postprocess`` scores (N, R) from 0 to 1, the best first, labels (N, R) int64
            from 0 and boxes (N, R, 4), (x0, y0, x1, y1) in pixels; otherwise logits (N, Q, K), with
            a softmax (N, Q, K + 1), the last one of "no object", and boxes (N, Q, 4),
            (cx, cy, w, h) as fractions of the unpadded image.

        Raises:
            ValueError: with ``postprocess`` there are no ``output_sizes``.
        """
        if self.preprocess:
            images, padding_mask = self.prepare(images, sizes_or_mask)
        else:
            padding_mask = sizes_or_mask
        layers, _ = self.model.predict(images, padding_mask)
        if not self.postprocess:
            return layers[-1].logits, layers[-1].boxes
        if output_sizes is None:
            raise ValueError("output_sizes are needed with postprocess")
        best = self.model.best(layers[-1])
        scale = output_sizes[:, [1, 0, 1, 0]].to(best.boxes.dtype)  # width, height, width, height
        return best.scores, best.classes, best.boxes * scale[:, None]

    def prepare(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise images and mask their padding: the arguments with ``preprocess`` to those
        without, see :meth:`forward`."""
        divisor = self.model.backbone.size_divisibility
        if divisor > 1:
            images = F.pad(images, (0, -images.shape[-1] % divisor, 0, -images.shape[-2] % divisor))
        height, width = images.shape[-2:]
        y = torch.arange(height, device=images.device)
        x = torch.arange(width, device=images.device)
        below = y >= image_sizes[:, :1]  # (N, H)
        beside = x >= image_sizes[:, 1:]  # (N, W)
        padding_mask = below[:, :, None] | beside[:, None]
        images = (images.float() - self.model.pixel_mean) / self.model.pixel_std
        return images.masked_fill(padding_mask[:, None], 0.0), padding_mask

    @property
    def coarsest_stride(self) -> int:
        """Pixels of the image to one token of the coarsest level, along each axis."""
        features = self.model.in_features
        stride = self.model.backbone.output_shape()[features[-1]].stride
        return stride * 2 ** (len(self.model.projection.input_proj) - len(features))
