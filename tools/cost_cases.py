"""What tools/compare_cost.py measures: one encoder layer, or the whole model, of each detector."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddetr_d2.engine import setup_cfg
from ddetr_d2.modeling import SetDetector

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import peak_gpu_memory
from benchmarks.timing import Run

CONFIGS = Path(__file__).parent.parent / "configs"
PARTS = ("encoder layer", "model")
PASSES = ("inference", "forward + backward")
CLASSES, OBJECTS = 91, 10


@dataclass(frozen=True)
class Member:
    """One detector.

    Attributes:
        label: what tables and pictures call it.
        config: name of a file in configs/.
        options: changes to it.
    """

    label: str
    config: str
    options: tuple[str, ...] = ()


# 300 queries, the focal loss and feed-forward networks of one width in all of them: only what the
# attention looks at differs.
MEMBERS = {
    "dense": Member(
        "dense, stride 16", "detr_dc5_plus", ("MODEL.DEFORMABLE_DETR.DIM_FEEDFORWARD", "1024")
    ),
    "deformable": Member("deformable, stride 16", "deformable_detr_single_scale_dc5"),
    "multi-scale": Member("deformable, strides 8 to 64", "deformable_detr"),
}


def build(member: str, device: str, opts: Sequence[str] = ()) -> SetDetector:
    """The detector with random weights.

    Args:
        member: a key of :data:`MEMBERS`.
        device: ``cpu`` or ``cuda``.
        opts: further changes to the configuration.
    """
    options = {
        "MODEL.WEIGHTS": "",
        "MODEL.DEVICE": device,
        "MODEL.DEFORMABLE_DETR.NUM_CLASSES": str(CLASSES),
    }
    fixed = [text for item in options.items() for text in item]
    torch.manual_seed(0)
    config = str(CONFIGS / f"{MEMBERS[member].config}.yaml")
    return build_model(setup_cfg(config, [*MEMBERS[member].options, *fixed, *opts]))


def case(model: SetDetector, part: str, pass_: str, size: tuple[int, int]) -> Run:
    """One pass of a part of the model, for one image without padding.

    In training there is dropout, and all gradients are computed: those of the weights, and for an
    encoder layer those of its tokens.

    Args:
        model: what :func:`build` gives; it is put into training or inference.
        part: one of :data:`PARTS`.
        pass_: one of :data:`PASSES`.
        size: height and width of the image in pixels.
    """
    make = {"encoder layer": _encoder_layer, "model": _whole_model}[part]
    training = pass_ == "forward + backward"
    module, call, inputs = make(model, size)
    parameters = [x for x in module.parameters() if x.requires_grad]

    def run() -> None:
        # All parts share their modules, so that each run says which of the two it is.
        model.train(training)
        if training:
            torch.autograd.grad(call().sum(), [*parameters, *inputs], allow_unused=True)
        else:
            with torch.inference_mode():
                call()

    return run


def _encoder_layer(
    model: SetDetector, size: tuple[int, int]
) -> tuple[nn.Module, Callable[[], Tensor], list[Tensor]]:
    """A layer, a call of it, and the tokens that it reads."""
    generator = torch.Generator().manual_seed(0)
    features = []
    for name in model.in_features:
        shape = model.backbone.output_shape()[name]
        height, width = (-(-length // shape.stride) for length in size)
        feature = torch.randn(1, shape.channels, height, width, generator=generator)
        features.append(feature.to(model.device))
    with torch.no_grad():
        levels = model.projection(features, None)
    tokens = levels.tokens.requires_grad_()
    layer = model.transformer.encoder.layers[0]
    return layer, lambda: layer(tokens, levels), [tokens]


def _whole_model(
    model: SetDetector, size: tuple[int, int]
) -> tuple[nn.Module, Callable[[], object], list[Tensor]]:
    """The model and a call of it: its losses in training, else its detections."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    corners = torch.rand(OBJECTS, 2, generator=generator) * 0.6
    extent = 0.1 + 0.3 * torch.rand(OBJECTS, 2, generator=generator)
    boxes = torch.cat((corners, corners + extent), dim=1)
    instances = Instances(size)
    instances.gt_boxes = Boxes(boxes * torch.tensor([width, height, width, height]))
    instances.gt_classes = torch.randint(CLASSES, (OBJECTS,), generator=generator)
    image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
    batch = [{"image": image, "instances": instances}]

    def call() -> object:
        output = model(batch)
        return torch.stack(list(output.values())) if model.training else output

    return model, call, []


def peak_bytes(run: Run, device: str) -> int:
    """Memory that one call takes at most: tensors that exist at once, beyond those before it.

    What a kernel allocates for itself counts where it asks PyTorch for it.
    """
    if device == "cuda":
        run()
        return peak_gpu_memory(run)[0]
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((x.start_ns(), x.nbytes()) for x in events if x.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak
