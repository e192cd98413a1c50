"""Where the time of a model goes, what makes the host wait, and a training step."""

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarking import Record, Run, synchronize, wall_seconds
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ddetr_d2.engine.optimizer import build_clipping, build_optimizer
from ddetr_d2.engine.training_step import TrainingStep

PARTS = {
    "backbone": "backbone",
    "projection": "projection",
    "encoder": "transformer.encoder",
    "queries": "transformer.queries",
    "decoder and heads": "transformer.decoder",
}
OBJECTS = 10  # in each image of a training step


def part_seconds(model: nn.Module, function: Run) -> dict[str, float]:
    """Seconds that one call spends in each part of ``model``, and in ``total``.

    On a GPU each part is waited for, so that the total is longer than without measuring.
    """
    spent: Counter[str] = Counter()

    def begin(part: str) -> None:
        synchronize()
        spent[part] -= time.perf_counter()

    def end(part: str) -> None:
        synchronize()
        spent[part] += time.perf_counter()

    with contextlib.ExitStack() as stack:
        for part, name in PARTS.items():
            module = model.get_submodule(name)
            before = module.register_forward_pre_hook(lambda *_, part=part: begin(part))
            after = module.register_forward_hook(lambda *_, part=part: end(part))
            stack.callback(before.remove)
            stack.callback(after.remove)
        total = wall_seconds(function)
    return {**{part: spent[part] for part in PARTS if part in spent}, "total": total}


def operators(function: Run, device: str, number: int = 15) -> list[Record]:
    """The operators that one call spends most time in by itself, on the device."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        function()
        synchronize()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # Each kernel on a GPU stands there again, as a row of its own.
    times = {
        x.key: (getattr(x, key), x.count)
        for x in profiler.key_averages()
        if x.device_type == DeviceType.CPU
    }
    total = sum(microseconds for microseconds, _ in times.values())
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:number]
    return [
        {"operator": name, "calls": count, "ms": us / 1e3, "share": us / total}
        for name, (us, count) in longest
    ]


def synchronizations(function: Run) -> Counter[str]:
    """Times that one call makes the host wait for the GPU, by line of the program."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"
        for warning in caught
        if "synchronizing" in str(warning.message)
    )


def training_step(
    cfg: CfgNode, batch: int, size: Sequence[int], amp: bool, channels_last: bool
) -> Run:
    """A step of the training recipe, on random images with random boxes.

    Args:
        cfg: the configuration.
        batch: images in a step.
        size: their height and width in pixels.
        amp: with mixed precision, as SOLVER.AMP.ENABLED has it.
        channels_last: False has the convolutions computed with channels first.
    """
    cfg = cfg.clone()
    cfg.SOLVER.AMP.ENABLED = amp
    torch.manual_seed(0)
    model = build_model(cfg).train()
    if not channels_last:
        _use_channels_first(model)
    step = TrainingStep(
        model, build_optimizer(cfg, model), build_clipping(cfg), mixed_precision=amp
    )
    inputs = [_training_input(size, cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES) for _ in range(batch)]

    return lambda: step([inputs])


def _use_channels_first(model: nn.Module) -> None:
    first = torch.contiguous_format
    for module in (model.backbone, model.projection):
        module.to(memory_format=first)
    model.backbone.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(memory_format=first),)
    )


def _training_input(size: Sequence[int], classes: int) -> Record:
    height, width = size
    instances = Instances((height, width))
    corners = torch.rand(OBJECTS, 2) * 0.6
    boxes = torch.cat((corners, corners + 0.1 + 0.3 * torch.rand(OBJECTS, 2)), dim=1)
    instances.gt_boxes = Boxes(boxes * torch.tensor([width, height, width, height]))
    instances.gt_classes = torch.randint(classes, (OBJECTS,))
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "instances": instances}
