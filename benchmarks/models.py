"""Whole models, this project's and transformers', with the same weights and the same images."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ddetr_d2.checkpoint.writing import write_checkpoint, write_transformers
from ddetr_d2.detector import Configured, configure
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError
from ddetr_d2.layers.onednn import PackedConv2d, PackedLinear, can_pack
from ddetr_d2.modeling import prepare_for_inference

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from safetensors.torch import load
from torch import Tensor, nn

from .cases import OURS, Case, Prepared
from .graphs import record

THEIRS = "transformers"
CLASSES = 91  # as in the published models
TOLERANCE = 1e-3  # of scores and boxes in float32
# Of the refined ResNet-50 and an image of 800x1066: the layer and the shape of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Linear | nn.Conv2d], tuple[int, ...]]] = {
    "linear, 17,821 x 256 to 1024": (partial(nn.Linear, 256, 1024), (17821, 256)),
    "linear, 17,821 x 1024 to 256": (partial(nn.Linear, 1024, 256), (17821, 1024)),
    "convolution 3x3, 128 channels": (partial(nn.Conv2d, 128, 128, 3, 1, 1), (1, 128, 100, 134)),
    "convolution 3x3, 512 channels": (partial(nn.Conv2d, 512, 512, 3, 1, 1), (1, 512, 25, 34)),
    "convolution 1x1, 1024 to 256": (partial(nn.Conv2d, 1024, 256, 1), (1, 1024, 50, 67)),
}


def write_weights(folder: str, config_file: str, weights: str, opts: Sequence[str]) -> None:
    """Write what :func:`read_ours` and :func:`read_theirs` read.

    Args:
        folder: is made if it is not there.
        config_file: path of a YAML file; empty for that of the weights.
        weights: whatever MODEL.WEIGHTS takes; empty for random ones.
        opts: alternating keys and values that override the configuration.

    Raises:
        UserError: weights or configuration are wrong.
    """
    if weights:
        cfg, names, _ = configured = configure(config_file, [*opts, "MODEL.WEIGHTS", weights])
        model = configured.build()
    else:
        classes = ["MODEL.DEFORMABLE_DETR.NUM_CLASSES", str(CLASSES)]
        cfg, names = setup_cfg(config_file, [*classes, *opts, "MODEL.WEIGHTS", ""]), None
        model = random_model(cfg)
    os.makedirs(folder, exist_ok=True)
    named = {"class_names": names} if names else {}
    write_checkpoint(f"{folder}/model.pth", model.state_dict(), config=cfg.dump(), **named)


def random_model(cfg: CfgNode) -> nn.Module:
    """The model of ``cfg``, with random weights that always are the same.

    Sampling points and scores are spread, as they are in a trained model.
    """
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            nn.init.normal_(parameter, std=0.05)
        elif name.endswith("class_embed.weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


def read_ours(folder: str, device: str, opts: Sequence[str] = ()) -> Configured:
    """This project's model and its configuration, parts of which ``opts`` override."""
    opts = ["MODEL.WEIGHTS", f"{folder}/model.pth", "MODEL.DEVICE", device, *opts]
    return configure("", opts)


def read_theirs(folder: str, device: str) -> nn.Module:
    """The same model in transformers, for inference.

    Raises:
        UserError: there is none.
    """
    import transformers

    path = Path(folder, "config.json")
    if not path.exists():
        cfg, _, weights = read_ours(folder, device)
        write_transformers(folder, weights.model, cfg)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(folder)
    (name,) = json.loads(path.read_text())["architectures"]
    # Weights left on the disk would be read, and counted as memory, by the first inference.
    weights = load(Path(folder, "model.safetensors").read_bytes())
    model = getattr(transformers, name).from_pretrained(None, config=config, state_dict=weights)
    return model.eval().to(device)


def make_images(batch: int, size: Sequence[int], device: str) -> list[Tensor]:
    """``batch`` images (3, H, W) of uint8."""
    generator = torch.Generator().manual_seed(2)
    shape = (3, *size)
    images = [torch.randint(256, shape, generator=generator).byte() for _ in range(batch)]
    return [image.to(device) for image in images]


def normalised(folder: str, images: Sequence[Tensor]) -> Tensor:
    """What transformers' image processor makes of the images: (N, 3, H, W)."""
    cfg = read_ours(folder, str(images[0].device)).cfg
    mean, std = (
        images[0].new_tensor(x, dtype=torch.float32)[:, None, None]
        for x in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    tensor = (torch.stack(list(images)) - mean) / std
    return tensor.flip(1) if cfg.INPUT.FORMAT == "BGR" else tensor


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision, if ``dtype`` has 16 bits."""
    enabled = dtype != torch.float32
    return torch.autocast(
        device,
        dtype if enabled else torch.bfloat16,
        enabled=enabled,
        # Kept copies of weights would outlive the CUDA graph that made them.
        cache_enabled=not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing(),
    )


def name_of(dtype: torch.dtype) -> str:
    """What tables call this project's model in ``dtype``."""
    return OURS if dtype == torch.float32 else f"{OURS}, {str(dtype).removeprefix('torch.')}"


def prepare_ours(
    folder: str, device: str, batch: int, size: Sequence[int], dtype: torch.dtype
) -> Prepared:
    """Detections of a model from ``prepare_for_inference``, as the demo asks for them.

    The result is scores (N, Q, K) and boxes (N, Q, 4), relative (cx, cy, w, h), of all queries.
    """
    # On a GPU by autocast, which has float16 as well.
    own = dtype if device == "cpu" and dtype != torch.float16 else torch.float32
    model = prepare_for_inference(read_ours(folder, device).build(), own)
    mixed = dtype if own == torch.float32 else torch.float32
    inputs = [{"image": image} for image in make_images(batch, size, device)]

    def run() -> list[dict]:
        with torch.inference_mode(), autocast(device, mixed):
            return model(inputs)

    def result() -> list[Tensor]:
        with torch.inference_mode(), autocast(device, mixed):
            layers, _ = model.predict(model.preprocess_image(inputs).tensor, None)
        return [layers[-1].logits.sigmoid(), layers[-1].boxes]

    tolerance = TOLERANCE if dtype == torch.float32 else float("inf")
    return Prepared(run, result, tolerance, "profile")


def prepare_graph(
    folder: str, device: str, batch: int, size: Sequence[int], dtype: torch.dtype
) -> Prepared:
    """The model as one CUDA graph, which gives scores and boxes and chooses no detections.

    Raises:
        UserError: it cannot be recorded.
    """
    model = prepare_for_inference(read_ours(folder, device).build())
    inputs = [{"image": image} for image in make_images(batch, size, device)]
    pixels = model.preprocess_image(inputs).tensor

    def predict() -> list[Tensor]:
        with torch.no_grad(), autocast(device, dtype):
            layers, _ = model.predict(pixels, None)
        return [layers[-1].logits.sigmoid(), layers[-1].boxes]

    replay, outputs = record(predict)

    def result() -> list[Tensor]:
        replay()
        return outputs

    return Prepared(replay, result, TOLERANCE if dtype == torch.float32 else float("inf"))


def prepare_theirs(folder: str, device: str, batch: int, size: Sequence[int]) -> Prepared:
    """The same of transformers' model, which gets normalised images and chooses no detections."""
    model = read_theirs(folder, device)
    pixels = normalised(folder, make_images(batch, size, device))

    def result() -> list[Tensor]:
        with torch.inference_mode():
            output = model(pixels)
        return [output.logits.sigmoid(), output.pred_boxes]

    return Prepared(result, result)


def prepare_layer(name: str, dtype: torch.dtype) -> Prepared:
    """One of :data:`LAYERS` as ``prepare_for_inference`` packs it.

    Raises:
        UserError: the processor does not compute in ``dtype``.
    """
    make, shape = LAYERS[name]
    layer = make().to(dtype)
    if not can_pack(layer):
        raise UserError(f"oneDNN does not compute in {dtype} on this processor.")
    x = torch.rand(shape).to(dtype)
    if isinstance(layer, nn.Linear):
        packed: nn.Module = PackedLinear(layer)
    else:
        packed, x = PackedConv2d(layer), x.to(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.inference_mode():
            return packed(x)

    return Prepared(run)


def cases(
    folder: str, device: str, sizes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]
):
    """Inference on one image and on four, beside transformers where that does not take minutes, and
    on a CPU layers by themselves."""
    for size in sizes:
        for batch in (1, 4):
            arguments = (folder, device, batch, size)
            make: dict[str, Callable[[], Prepared]] = {}
            if batch == 1 or device == "cuda":
                make[THEIRS] = partial(prepare_theirs, *arguments)
            make |= {name_of(dtype): partial(prepare_ours, *arguments, dtype) for dtype in dtypes}
            if device == "cuda":
                make |= {
                    f"{name_of(dtype)}, CUDA graph": partial(prepare_graph, *arguments, dtype)
                    for dtype in dtypes
                }
            yield Case(
                f"{size[0]}x{size[1]}, batch {batch}",
                make,
                seconds=(11 if THEIRS in make else 15) * size[0] * size[1] / (800 * 1066),
                memory=batch == 1,
            )
    if device == "cpu":
        for name in LAYERS:
            make = {name_of(dtype): partial(prepare_layer, name, dtype) for dtype in dtypes}
            yield Case(f"layer, {name}", make, seconds=0.5, short=True)
