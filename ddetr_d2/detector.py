"""From weights to a detector: the one place that joins weights, classes and configuration."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from PIL import Image
from torch import nn

from .checkpoint import DetrCheckpointer
from .checkpoint.architecture import (
    CLASS_LOSS,
    NUM_CLASSES,
    differences,
    infer_options,
    num_classes,
    variant,
)
from .checkpoint.formats import Weights, read_weights
from .config import config_file
from .data import build_augmentation, data_set_classes, read_image
from .data.images import as_array
from .engine.setup import saved_cfg, setup_cfg, value_of
from .errors import UserError
from .modeling import inference_dtype, prepare_for_inference
from .modeling.test_time_augmentation import SetDetectorWithTTA, keep_original_size
from .visualization import draw_detections

ImageLike = str | os.PathLike | np.ndarray | Image.Image


class Configured(NamedTuple):
    """What a detector is built of.

    Attributes:
        cfg: its configuration, the number of classes included.
        class_names: names of its classes, None where nothing tells them.
        weights: its weights, as they were read.
    """

    cfg: CfgNode
    class_names: list[str] | None
    weights: Weights

    def build(self) -> nn.Module:
        """The detector with its weights, for inference.

        Raises:
            UserError: the weights do not fit the configuration.
        """
        model = build_model(self.cfg).eval()
        checkpointer = DetrCheckpointer(model, strict=True)
        checkpointer.load_weights(self.weights, self.cfg.MODEL.WEIGHTS)
        return model


def configure(config_path: str = "", opts: Sequence[str] = ()) -> Configured:
    """Find out which detector the weights named by MODEL.WEIGHTS are of.

    Without a configuration file it is the one that the checkpoint was written with; weights of
    other implementations tell theirs by their names and shapes. Class names are those of the
    weights, else those of the configuration's data sets.

    Args:
        config_path: path of a YAML file; empty to take the weights' own.
        opts: alternating keys and values that override it.

    Raises:
        UserError: there are no weights, or they are of a backbone alone; or the number of their
            classes is unknown; or configuration or weights are wrong.
    """
    cfg = setup_cfg(config_path, opts) if config_path else None
    path = cfg.MODEL.WEIGHTS if cfg else _last(opts, "MODEL.WEIGHTS")
    if not path:
        raise UserError("no weights: give MODEL.WEIGHTS FILE, a checkpoint of a detector.")
    weights = read_weights(path)
    if cfg is None:
        cfg = _own_configuration(weights, path, opts)
    names = weights.class_names
    node = cfg.MODEL.DEFORMABLE_DETR
    if names is not None:
        node.NUM_CLASSES = len(names)
    else:
        names = _data_set_classes(cfg)
        node.NUM_CLASSES = node.NUM_CLASSES or len(names or ())
        if len(names or ()) != node.NUM_CLASSES:
            names = None
    return Configured(cfg, names, weights)


def nearest_configuration(weights: Weights, path: str = "") -> tuple[str, dict[str, Any]]:
    """The configuration in configs/ that comes nearest to a detector's weights.

    Args:
        weights: of a detector.
        path: another configuration file to compare with, in which only the number of classes is
            the weights'.

    Returns:
        path of the configuration file; keys and values that differ from it.
    """
    options = infer_options(weights.model, weights.options)
    configuration = path or config_file(variant(options))
    given = setup_cfg(configuration, ["MODEL.DEVICE", "cpu"])
    if path:
        told = {CLASS_LOSS: value_of(given, CLASS_LOSS)} | weights.options
        options = {NUM_CLASSES: num_classes(weights.model, told)}
    return configuration, differences(options, {key: value_of(given, key) for key in options})


class Detector:
    """Detects objects on images.

    ::

        detector = Detector("output/model_final.pth")
        instances = detector("photo.jpg")
        drawing = detector.draw("photo.jpg", instances)

    Attributes:
        cfg: the configuration.
        class_names: names of the classes, None where nothing tells them.
        metadata: names and colours of the classes, as Detectron2's visualizers take them.
        model: prepared for inference; with ``TEST.AUG.ENABLED``, with test-time augmentation.
    """

    def __init__(
        self,
        weights: str | os.PathLike = "",
        *,
        config: str = "",
        opts: Sequence[str] = (),
        array_format: str = "RGB",
    ):
        """
        Args:
            weights: whatever MODEL.WEIGHTS takes: a checkpoint, a folder of transformers, a name
                on the hub (``hf://ORG/NAME``), a file of the reference implementation; empty to
                take the configuration's.
            config: a YAML file, or the name of a configuration of this project such as
                ``deformable_detr_refine``; by default what the weights tell.
            opts: alternating keys and values that override the configuration.
            array_format: order of the channels of images given as arrays, ``RGB`` or ``BGR`` (of
                OpenCV). Files and PIL images have their own.

        Raises:
            UserError: weights or configuration are missing, wrong, or do not fit each other.
        """
        if array_format not in ("RGB", "BGR"):
            raise UserError(f"array_format is {array_format!r}; expected RGB or BGR.")
        if config and not config.endswith((".yaml", ".yml")):
            config = config_file(config)
        named = ["MODEL.WEIGHTS", os.fspath(weights)] if weights else []
        configured = configure(config, [*opts, *named])
        self.cfg, self.class_names, _ = configured
        self.cfg.freeze()
        self.metadata = _metadata(self.class_names)
        self.model = prepare_for_inference(configured.build(), inference_dtype(self.cfg.TEST.DTYPE))
        input_cfg = self.cfg
        if self.cfg.TEST.AUG.ENABLED:
            self.model = SetDetectorWithTTA(self.cfg, self.model)
            input_cfg = keep_original_size(self.cfg)
        self._array_format = array_format
        self._augmentation = T.AugmentationList(build_augmentation(input_cfg, is_train=False))

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], batch_size: int = 1
    ) -> Instances | list[Instances]:
        """Detect on an image, or on each image of a list.

        Args:
            images: a path, an (H, W, 3) or (H, W) uint8 array, a PIL image; or a list of them.
                Files are turned upright by their EXIF data, PIL images are taken as they are.
            batch_size: images that the model gets at a time. They are padded to one size.

        Returns:
            for each image Detectron2's ``Instances`` on the CPU with ``pred_boxes`` in pixels of
            the image, ``scores`` and ``pred_classes``, the best first.

        Raises:
            UserError: an image cannot be read.
        """
        if isinstance(images, str | os.PathLike | np.ndarray | Image.Image):
            return self([images])[0]
        results: list[Instances] = []
        for first in range(0, len(images), batch_size):
            batch = [self._input(image) for image in images[first : first + batch_size]]
            with torch.no_grad():
                results += [result["instances"].to("cpu") for result in self.model(batch)]
        return results

    def draw(self, image: ImageLike, instances: Instances, threshold: float = 0.5) -> np.ndarray:
        """Draw detections of at least a score.

        Args:
            image: what they were detected on.
            instances: the detections.
            threshold: lowest score that is drawn, 0 to 1.

        Returns:
            (s * H, s * W, 3) uint8 RGB; small images are enlarged by a whole number s.
        """
        chosen = instances[instances.scores >= threshold]
        return draw_detections(self._rgb(image), chosen, self.metadata)

    def _input(self, image: ImageLike) -> dict[str, Any]:
        pixels = self._rgb(image)
        height, width = pixels.shape[:2]
        if self.cfg.INPUT.FORMAT == "BGR":
            pixels = pixels[:, :, ::-1]
        augmented = T.AugInput(pixels)
        self._augmentation(augmented)
        tensor = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}

    def _rgb(self, image: ImageLike) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        if isinstance(image, str | os.PathLike):
            return read_image(os.fspath(image), format="RGB")
        if isinstance(image, Image.Image):
            return as_array(image)
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)):
            raise UserError(
                f"an image is an array of {image.dtype} of the shape {image.shape}; uint8 of the "
                "shape (H, W, 3) or (H, W) is expected."
            )
        if image.ndim == 2:
            return np.stack([image] * 3, axis=-1)
        return image if self._array_format == "RGB" else image[:, :, ::-1]


def _own_configuration(weights: Weights, path: str, opts: Sequence[str]) -> CfgNode:
    saved = weights.rest.get("config")
    if isinstance(saved, str):
        return saved_cfg(saved, path, opts)
    if weights.is_backbone:
        raise UserError(
            f"{path} is a backbone alone; MODEL.WEIGHTS has to name a checkpoint of a detector."
        )
    nearest, changed = nearest_configuration(weights)
    if weights.class_names is not None:
        changed.pop(NUM_CLASSES, None)
    return setup_cfg(nearest, [*map(str, sum(changed.items(), ())), *opts])


def _data_set_classes(cfg: CfgNode) -> list[str] | None:
    """Names of the configured data sets' classes, None if they are not to be had and not needed.

    Detectron2 knows those of its own data sets; others are read from their annotation files.
    """
    known, reason = None, "none is named"
    try:
        known = data_set_classes(cfg)
    except UserError as error:
        reason = str(error)
    if known is None and not cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES:
        raise UserError(
            f"{cfg.MODEL.WEIGHTS} does not name its classes, and neither do the data sets of "
            f"the configuration ({reason}); give {NUM_CLASSES}."
        )
    return known


def _metadata(names: list[str] | None) -> Metadata:
    if names is None:
        return Metadata()
    palette = colormap(rgb=True, maximum=255)
    colors = [palette[i % len(palette)].tolist() for i in range(len(names))]
    return Metadata(thing_classes=names, thing_colors=colors)


def _last(opts: Sequence[str], key: str) -> str:
    """The value that ``opts`` give ``key``, empty if they do not."""
    return next((opts[i + 1] for i in reversed(range(0, len(opts) - 1, 2)) if opts[i] == key), "")
