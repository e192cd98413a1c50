"""A small detector to which colours matter, and an image of strong colours."""

from ddetr_d2.checkpoint import DetrCheckpointer
from ddetr_d2.engine import setup_cfg

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from ..conftest import ROOT, TINY


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("integrations")
    torch.manual_seed(0)
    classes = ["MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]
    cfg = setup_cfg(str(ROOT / "configs" / "deformable_detr_refine.yaml"), [*TINY, *classes])
    model = build_model(cfg).eval()
    for head in model.transformer.decoder.heads:  # boxes and scores that differ
        torch.nn.init.normal_(head.bbox_embed[-2].weight, std=0.2)
        torch.nn.init.normal_(head.class_embed.weight, std=0.3)
    names = ["circle", "square", "star"]
    DetrCheckpointer(model, str(folder), class_names=names, config=cfg.dump()).save("model")
    return folder / "model.pth"


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    """File of an image of 160 x 120 pixels: red above, yellow below, with some noise."""
    pixels = np.random.default_rng(0).integers(0, 60, (120, 160, 3), dtype=np.uint8)
    pixels[:, :, 0] += 190
    pixels[60:, :, 1] += 150
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path
