"""A training step: forward, backward and update, on random images with random boxes."""

from collections.abc import Callable, Sequence
from functools import partial

from ddetr_d2.engine.optimizer import build_clipping, build_optimizer
from ddetr_d2.engine.training_step import TrainingStep
from ddetr_d2.modeling.checkpointing import PARTS

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_convert

from .cases import OURS, Case, Prepared
from .models import THEIRS, make_images, name_of, normalised, read_ours, read_theirs

OBJECTS = 10  # in each image
TOLERANCE = 1e-3  # of the losses in float32
DEMO_SIZE = (128, 170)
CHECKPOINTED = ["MODEL.ACTIVATION_CHECKPOINT", str(PARTS)]


def make_batch(batch: int, size: Sequence[int], device: str, classes: int) -> list[dict]:
    """Images with instances, as Detectron2's mapper gives them."""
    height, width = size
    generator = torch.Generator().manual_seed(3)
    records = []
    for image in make_images(batch, size, device):
        corners = torch.rand(OBJECTS, 2, generator=generator) * 0.6
        extents = 0.1 + 0.3 * torch.rand(OBJECTS, 2, generator=generator)
        boxes = torch.cat((corners, corners + extents), dim=1)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(boxes * torch.tensor([width, height, width, height]))
        instances.gt_classes = torch.randint(classes, (OBJECTS,), generator=generator)
        records.append({"image": image, "instances": instances})
    return records


def prepare_ours(
    folder: str,
    device: str,
    batch: int,
    size: Sequence[int],
    mixed_precision: bool,
    opts: Sequence[str] = (),
) -> Prepared:
    """A step of this project's recipe, parts of which ``opts`` override.

    The result is the losses of the last layer, without dropout: of classes, L1, GIoU.
    """
    configured = read_ours(folder, device, opts)
    cfg, model = configured.cfg, configured.build().train()
    step = TrainingStep(
        model, build_optimizer(cfg, model), build_clipping(cfg), mixed_precision=mixed_precision
    )
    records = make_batch(batch, size, device, cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES)

    def result() -> list[Tensor]:
        model.eval()
        model.training = True  # for losses instead of detections
        with torch.no_grad():
            losses = step.forward([records])
        model.train()
        return [torch.stack([losses[f"loss_{name}"].float() for name in ("class", "l1", "giou")])]

    tolerance = float("inf") if mixed_precision else TOLERANCE
    return Prepared(lambda: step([records]), result, tolerance, "profile")


def prepare_theirs(folder: str, device: str, batch: int, size: Sequence[int]) -> Prepared:
    """The same of transformers' model, with its own losses, AdamW and clipping."""
    model = read_theirs(folder, device).train()
    cfg = read_ours(folder, device).cfg
    records = make_batch(batch, size, device, cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES)
    pixels = normalised(folder, [record["image"] for record in records])
    height, width = size
    labels = [
        {
            "class_labels": x.gt_classes.to(device),
            "boxes": box_convert(x.gt_boxes.tensor, "xyxy", "cxcywh").to(device)
            / torch.tensor([width, height, width, height], device=device),
        }
        for x in (record["instances"] for record in records)
    ]
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.SOLVER.BASE_LR, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        model(pixels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()

    def result() -> list[Tensor]:
        model.eval()
        with torch.no_grad():
            losses = model(pixels, labels=labels).loss_dict
        model.train()
        config = model.config
        weights = {
            "loss_ce": config.class_cost,  # with which the losses here are weighted
            "loss_bbox": config.bbox_loss_coefficient,
            "loss_giou": config.giou_loss_coefficient,
        }
        return [torch.stack([weight * losses[name] for name, weight in weights.items()])]

    return Prepared(run, result)


def cases(
    folder: str,
    demo_folder: str,
    device: str,
    sizes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    quick: bool,
):
    """Two images of each size, four of the first with and without activation checkpointing, and
    the small model of ``make demo``.

    Args:
        folder: of the model.
        demo_folder: of the small model.
        device: ``cpu`` or ``cuda``.
        sizes: height and width of images; memory is measured with the first.
        dtypes: float32, and what mixed precision computes in on the device.
        quick: fewer and smaller images for the small model.
    """
    mixed = torch.float16 if device == "cuda" else torch.bfloat16

    def ours(*arguments: object) -> dict[str, Callable[[], Prepared]]:
        return {
            name_of(dtype): partial(prepare_ours, *arguments, dtype == mixed)
            for dtype in dtypes
            if dtype in (torch.float32, mixed)
        }

    for size in sizes:
        arguments = (folder, device, 2, size)
        yield Case(
            f"{size[0]}x{size[1]}, batch 2",
            {THEIRS: partial(prepare_theirs, *arguments), **ours(*arguments)},
            seconds=27 * size[0] * size[1] / (480 * 640),
            memory=size == sizes[0],
        )
    arguments = (folder, device, 4, sizes[0], False)
    yield Case(
        f"{sizes[0][0]}x{sizes[0][1]}, batch 4",
        {
            OURS: partial(prepare_ours, *arguments),
            f"{OURS}, checkpointed": partial(prepare_ours, *arguments, CHECKPOINTED),
        },
        seconds=25 * sizes[0][0] * sizes[0][1] / (480 * 640),
        memory=True,
    )
    batch, size = (2, sizes[0]) if quick else (8, DEMO_SIZE)
    yield Case(
        f"make demo, {size[0]}x{size[1]}, batch {batch}",
        ours(demo_folder, device, batch, size),
        seconds=1.5,
    )
