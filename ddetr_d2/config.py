"""Configuration keys that DETR and Deformable DETR add to Detectron2's own."""

from pathlib import Path

import torch
from detectron2.config import CfgNode as CN

from .errors import UserError, nearest

_PACKAGE = Path(__file__).parent
# Within an installed package; in a clone beside it.
_CONFIGS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def config_file(name: str) -> str:
    """Path of a configuration of this project, such as ``deformable_detr_refine``.

    Args:
        name: of a file in configs/, with or without ``.yaml``.

    Raises:
        UserError: there is none of that name.
    """
    name = name.removesuffix(".yaml")
    folder = next((folder for folder in _CONFIGS if folder.is_dir()), _CONFIGS[-1])
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        raise UserError(
            f"there is no configuration {name!r}{nearest(name, known)}; there are: "
            f"{', '.join(known)}."
        )
    return str(path)


def add_deformable_detr_config(cfg: CN) -> None:
    """Add the keys of Deformable DETR, with the defaults of the multi-scale model, to ``cfg``."""
    cfg.MODEL.META_ARCHITECTURE = "DeformableDETR"
    # The GPU where there is one.
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    # Parts of which the backward pass computes the activations again instead of keeping them:
    # "backbone", "encoder", "decoder". Same gradients, less memory, more time.
    cfg.MODEL.ACTIVATION_CHECKPOINT = []

    # Keys of the whole family. DETR reads all but those of deformable attention, which are marked.
    cfg.MODEL.DEFORMABLE_DETR = node = CN()
    # Number of classes; 0 takes it from the training set.
    node.NUM_CLASSES = 0
    # Backbone features that become levels, fine to coarse.
    node.IN_FEATURES = ["res3", "res4", "res5"]
    # Levels in all; those beyond IN_FEATURES are strided convolutions on the coarsest feature. DETR
    # has one.
    node.NUM_FEATURE_LEVELS = 4
    # Object queries: the most objects an image can have.
    node.NUM_QUERIES = 300
    # Width of the tokens, heads of each attention, width of the feed-forward layers.
    node.HIDDEN_DIM = 256
    node.NUM_HEADS = 8
    node.DIM_FEEDFORWARD = 1024
    node.ENC_LAYERS = 6
    node.DEC_LAYERS = 6
    node.DROPOUT = 0.1
    # Sampling points per head and level (deformable).
    node.ENC_POINTS = 4
    node.DEC_POINTS = 4
    # Tokens of the encoder look at all levels, not only at their own (deformable).
    node.MULTI_SCALE_ATTENTION = True
    # Iterative box refinement (deformable): each decoder layer starts from the boxes of the one
    # before.
    node.WITH_BOX_REFINE = False
    # Queries from the encoder's proposals instead of learned ones (deformable).
    node.TWO_STAGE = False
    # Encoder layers, and decoder layers, start as copies of one another instead of being drawn one
    # by one; so do the heads of models with box refinement or two stages.
    node.LAYERS_START_EQUAL = False
    node.HEADS_START_EQUAL = False
    # References (deformable) are kept this far from 0 and 1 before the inverse sigmoid: 1e-5 in the
    # reference implementation, 1e-3 in detrex.
    node.INVERSE_SIGMOID_EPS = 1e-5
    # Weights of the terms, in the loss and in the matching cost alike.
    node.CLASS_WEIGHT = 2.0
    node.L1_WEIGHT = 5.0
    node.GIOU_WEIGHT = 2.0
    # "focal": a sigmoid per class. "cross_entropy": a softmax over the classes and "no object",
    # DETR's own.
    node.CLASS_LOSS = "focal"
    # Weight of queries without an object in the cross-entropy.
    node.NO_OBJECT_WEIGHT = 0.1
    # Focal loss.
    node.FOCAL_ALPHA = 0.25
    node.FOCAL_GAMMA = 2.0

    # Backbones of timm, MODEL.BACKBONE.NAME build_timm_backbone. Their feature maps are
    # IN_FEATURES, the last one dilated with MODEL.RESNETS.RES5_DILATION 2;
    # MODEL.BACKBONE.FREEZE_AT counts as for ResNets.
    cfg.MODEL.TIMM = CN()
    # Name of the model, such as swin_tiny_patch4_window7_224.ms_in1k.
    cfg.MODEL.TIMM.NAME = ""
    # Batch normalisation stays as it is in the weights, as with MODEL.RESNETS.NORM FrozenBN.
    cfg.MODEL.TIMM.FREEZE_BATCH_NORM = True

    # Data sets in COCO format: [name, annotation file, image folder] each.
    cfg.DATASETS.COCO_FORMAT = []
    # Take annotations with "iscrowd": 1 as ordinary objects: some tools mark all masks so.
    cfg.DATASETS.CROWDS_ARE_OBJECTS = False

    # How lengths are computed in a resize: "detectron2" rounds, "detr" truncates as the paper's
    # recipe does. See ddetr_d2.data.augmentation.resized_shape.
    cfg.INPUT.RESIZE_RULE = "detectron2"
    # Shortest sides before a random crop (INPUT.CROP), one of them chosen at random.
    cfg.INPUT.CROP.MIN_SIZE_TRAIN = (400, 500, 600)

    # Type of weights and features when a trained model is used, float32 or bfloat16, which on a CPU
    # with AVX512_BF16 or AMX takes half the time and memory.
    cfg.TEST.DTYPE = "float32"

    # How test-time augmentation (TEST.AUG) merges the detections of one class on an image and its
    # copies: "nms" drops those whose IoU with a better one is above NMS_THRESH, "soft_nms" lowers
    # their scores, the more the smaller SOFT_NMS_SIGMA is.
    cfg.TEST.AUG.MERGE = "nms"
    cfg.TEST.AUG.NMS_THRESH = 0.5
    cfg.TEST.AUG.SOFT_NMS_SIGMA = 0.5

    # Share of the training images that may turn out to be unreadable before the run stops.
    cfg.DATALOADER.MAX_UNREADABLE = 0.01

    cfg.SOLVER.OPTIMIZER = "AdamW"
    # Learning rates relative to BASE_LR: of the backbone, and of the linear layers that
    # predict sampling offsets and reference points.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.SOLVER.SAMPLING_MULTIPLIER = 0.1
    # Micro-batches that each process cuts its images of a step into: less memory, same gradients.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # Stop after so many hours with a checkpoint and exit code 75, to be resumed; 0 for no limit.
    cfg.SOLVER.MAX_HOURS = 0.0
    # Steps in a row that may be left out because a loss or gradient is not finite; then the run
    # stops and says why.
    cfg.SOLVER.MAX_SKIPPED_STEPS = 0
    # How many of the periodic checkpoints to keep, the newest ones; 0 for all.
    cfg.SOLVER.CHECKPOINTS_KEPT = 0
    # Keep the checkpoint of the highest AP as model_best.pth.
    cfg.SOLVER.KEEP_BEST = False
    # Exponential moving average of the weights, evaluated and saved beside the raw ones.
    cfg.SOLVER.EMA = CN()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9997
