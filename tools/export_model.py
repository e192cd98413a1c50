#!/usr/bin/env python
"""Export a detector to ONNX, TorchScript or torch.export, for use without this project.

::

    python tools/export_model.py --format onnx --output model.onnx --opts MODEL.WEIGHTS model.pth

Inputs, outputs and metadata of the files are described in docs/export.md. What was written is
compared with the model on images of other sizes; a file that differs is not kept.
"""

import argparse
import os
from collections.abc import Sequence

from ddetr_d2.data import build_augmentation, read_image
from ddetr_d2.detector import configure
from ddetr_d2.errors import UserError, exit_on_user_error
from ddetr_d2.export import (
    LOADERS,
    OPSETS,
    SAMPLINGS,
    WRITERS,
    ExportableDetector,
    compare,
    describe,
    example_inputs,
)
from ddetr_d2.export.formats import require_package
from ddetr_d2.export.verify import load_onnx, load_onnx_in_openvino

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import Tensor

# Largest difference allowed, of scores and of boxes as fractions of the image.
TOLERANCE = 1e-3
# Height and width of the two images, padded to one size, that files are verified with.
SIZES = (301, 417), (333, 350)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="configuration file (default: what the weights tell of theirs)",
    )
    parser.add_argument("--format", required=True, choices=WRITERS, help="kind of file")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--sampling",
        choices=SAMPLINGS,
        default="grid_sample",
        help="how attention samples: the fastest of standard operators on CPUs; by gather for "
        "TensorRT; with the compiled operator, torch_export only, which needs ddetr_d2 again; with "
        "an extension of OpenVINO or onnxruntime, onnx only (default: %(default)s)",
    )
    parser.add_argument(
        "--openvino-extension",
        default="",
        metavar="FILE",
        help="extension to verify with, for --sampling extension; "
        "python -m ddetr_d2.export.openvino_extension FILE builds it",
    )
    parser.add_argument(
        "--onnxruntime-extension",
        default="",
        metavar="FILE",
        help="the same for onnxruntime; "
        "python -m ddetr_d2.export.onnxruntime_extension FILE builds it",
    )
    parser.add_argument(
        "--opset",
        type=int,
        choices=OPSETS,
        metavar=f"{OPSETS[0]}-{OPSETS[-1]}",
        help="ONNX operator set (default: 17)",
    )
    parser.add_argument(
        "--no-preprocess",
        action="store_true",
        help="normalised images and their padding mask go in, instead of pixels and sizes",
    )
    parser.add_argument(
        "--no-postprocess",
        action="store_true",
        help="logits and relative boxes of all queries come out, instead of the best detections",
    )
    parser.add_argument(
        "--sample-image", metavar="FILE", help="verify with this image instead of random ones"
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes to the configuration, as in: --opts MODEL.WEIGHTS model_final.pth",
    )
    return parser


def sample_inputs(detector: ExportableDetector, cfg: CfgNode, path: str) -> tuple[Tensor, ...]:
    """Inputs of the detector made of one image file, resized as for evaluation.

    Raises:
        UserError: the image cannot be read.
    """
    image = read_image(path, cfg.INPUT.FORMAT)
    height, width = image.shape[:2]
    augmented = T.AugInput(image)
    T.AugmentationList(build_augmentation(cfg, is_train=False))(augmented)
    pixels = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
    images = torch.from_numpy(pixels)[None].to(detector.model.device)
    image_sizes = torch.tensor([augmented.image.shape[:2]], device=images.device)
    inputs = [images, image_sizes]
    if not detector.preprocess:
        inputs = detector.prepare(images, image_sizes)
    if detector.postprocess:
        inputs = [*inputs, torch.tensor([[height, width]], device=images.device)]
    return tuple(inputs)


def check_output(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Find what is wrong with the arguments before the work is done.

    Raises:
        UserError: the output cannot be written, or options do not go together.
    """
    if args.format == "onnx":
        require_package("onnx", "--format onnx")
        runtime = "openvino" if args.openvino_extension else "onnxruntime"
        require_package(runtime, "--format onnx")
    elif args.opset is not None:
        raise UserError(f"--opset {args.opset} is for --format onnx, not for {args.format}.")
    if args.sampling == "operator" and args.format != "torch_export":
        raise UserError(
            f"--sampling operator is for --format torch_export, not for {args.format}; "
            "choose grid_sample or gather."
        )
    extensions = {
        "openvino": args.openvino_extension,
        "onnxruntime": args.onnxruntime_extension,
    }
    given = {runtime: path for runtime, path in extensions.items() if path}
    if len(given) != int(args.sampling == "extension"):
        raise UserError(
            "--sampling extension goes together with either --openvino-extension FILE or "
            "--onnxruntime-extension FILE: the one writes what the other runs."
        )
    if args.sampling == "extension" and args.format != "onnx":
        raise UserError(f"--sampling extension is for --format onnx, not for {args.format}.")
    for runtime, path in given.items():
        if not os.path.isfile(path):
            raise UserError(
                f"--{runtime}-extension {path} does not exist; "
                f"python -m ddetr_d2.export.{runtime}_extension builds it."
            )
    if args.format == "torch_export" and not args.output.endswith(".pt2"):
        raise UserError(f"--output {args.output}: files of torch.export end in .pt2.")
    if os.path.isdir(args.output):
        raise UserError(f"--output {args.output} is a folder; give a file.")
    if os.path.realpath(args.output) == os.path.realpath(cfg.MODEL.WEIGHTS or ""):
        raise UserError(f"--output {args.output} would replace MODEL.WEIGHTS; give another name.")
    folder = os.path.dirname(args.output) or "."
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot create {folder}: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output: cannot write into {folder}; give another folder.")


def main(arguments: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    configured = configure(args.config_file, args.opts)
    cfg = configured.cfg
    check_output(args, cfg)
    if args.format == "onnx":
        cfg.MODEL.DEVICE = "cpu"  # the file is the same
    model = configured.build()
    options = {"preprocess": not args.no_preprocess, "postprocess": not args.no_postprocess}
    detector = ExportableDetector(model, sampling=args.sampling, **options)
    reference = ExportableDetector(model, sampling="operator", **options)
    if args.sample_image:
        inputs = sample_inputs(reference, cfg, args.sample_image)
    else:
        inputs = example_inputs(reference, *SIZES)

    # The file gets its name when it is known to be right.
    stem, suffix = os.path.splitext(args.output)
    unverified = f"{stem}.unverified{suffix}"
    try:
        print(f"writing {args.format} with {args.sampling}", flush=True)
        opset = {} if args.opset is None else {"opset": args.opset}
        metadata = describe(detector, cfg, configured.class_names)
        WRITERS[args.format](detector, unverified, metadata, **opset)
        print("comparing it with the model", flush=True)
        if args.openvino_extension:
            run, _ = load_onnx_in_openvino(unverified, args.openvino_extension)
        elif args.onnxruntime_extension:
            run, _ = load_onnx(unverified, args.onnxruntime_extension)
        else:
            run, _ = LOADERS[args.format](unverified)
        differences = compare(reference, run, inputs)
        print(
            f"largest differences: {differences.scores:.1e} in scores, "
            f"{differences.boxes:.1e} of the image in boxes"
        )
        if max(differences) > TOLERANCE:
            raise UserError(
                f"the exported file does not detect what the model does (differences above "
                f"{TOLERANCE}); nothing was written to {args.output}. Try another --sampling or "
                "--opset, or another version of PyTorch."
            )
        os.replace(unverified, args.output)
    finally:
        if os.path.exists(unverified):
            os.remove(unverified)
    print(f"wrote {args.output}, {os.path.getsize(args.output) / 1e6:.1f} MB")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
