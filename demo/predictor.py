"""The detector of a checkpoint, with the names of its classes."""

from collections.abc import Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap

from ddetr_d2.checkpoint import DetrCheckpointer, read_class_names
from ddetr_d2.data import build_augmentation, data_set_classes
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError
from ddetr_d2.modeling import prepare_for_inference


class Predictor(DefaultPredictor):
    """Detectron2's predictor, with weights that must fit and the test augmentation of training."""

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg.clone()
        model = build_model(self.cfg)
        DetrCheckpointer(model, strict=True).load(cfg.MODEL.WEIGHTS)
        self.model = prepare_for_inference(model)
        (self.aug,) = build_augmentation(cfg, is_train=False)
        self.input_format = cfg.INPUT.FORMAT


def load_model(config_file: str, opts: Sequence[str]) -> tuple[Predictor, Metadata]:
    """Build the detector and what is known of its classes.

    The names come from the checkpoint, else from the configured data sets.

    Raises:
        UserError: if configuration or weights are missing or wrong.
    """
    cfg = setup_cfg(config_file, opts)
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no weights to detect with; give --opts MODEL.WEIGHTS FILE.")
    names = read_class_names(cfg.MODEL.WEIGHTS)
    node = cfg.MODEL.DEFORMABLE_DETR
    if names is not None:
        node.NUM_CLASSES = len(names)
    else:
        names = _data_set_classes(cfg)
        node.NUM_CLASSES = node.NUM_CLASSES or len(names or ())
    cfg.freeze()
    predictor = Predictor(cfg)
    if names is None or len(names) != node.NUM_CLASSES:
        return predictor, Metadata()
    palette = colormap(rgb=True, maximum=255)
    colors = [palette[i % len(palette)].tolist() for i in range(len(names))]
    return predictor, Metadata(thing_classes=names, thing_colors=colors)


def _data_set_classes(cfg: CfgNode) -> list[str] | None:
    """Names of the configured data sets' classes, None if they are not to be had.

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
            f"the configuration ({reason}); give --opts MODEL.DEFORMABLE_DETR.NUM_CLASSES."
        )
    return known


def detect(predictor: Predictor, image: np.ndarray, threshold: float) -> Instances:
    """Detections on an (H, W, 3) BGR image with at least this score, on the CPU."""
    instances = predictor(image)["instances"].to("cpu")
    return instances[instances.scores >= threshold]
