#!/usr/bin/env python
"""Draw or save detections on images, a video or the pictures of a webcam.

::

    python demo/demo.py --input photos/ --output drawings/ --opts MODEL.WEIGHTS model_final.pth
    python demo/demo.py --input photos/ --save-detections found.json --opts MODEL.WEIGHTS ...

Exit code: 0; 1 if one process alone could not read an input and skipped it; 2 for a mistake in the
arguments.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence

from ddetr_d2 import Detector
from ddetr_d2.engine.launch import launch
from ddetr_d2.errors import UserError
from ddetr_d2.main_process import on_main_process

import torch
from detections import DetectionParts, check_detections_file, settings_of
from detectron2.utils import comm
from detectron2.utils.comm import is_main_process
from detectron2.utils.logger import setup_logger
from files import find_images, name_drawings, name_samplings, name_video
from images import Outputs, run_on_images
from sampling import SamplingRequest, parse_pixels
from torch import distributed as dist
from video import run_on_video
from window import check_windows

SAMPLING_DETECTIONS = 4
# Seconds without progress after which a process counts as hanging; a disk of the network may stand
# still for a while.
HANG_LIMIT = 600.0


def get_parser() -> argparse.ArgumentParser:
    """The program's arguments, named as in Detectron2's demo."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="configuration file (default: what the weights tell of theirs)",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="PATH", help="image files, globs such as 'a/*.jpg', folders"
    )
    source.add_argument("--video-input", metavar="FILE", help="video file")
    source.add_argument("--webcam", action="store_true", help="take pictures from the webcam")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="folder for the drawings, or a file for a single one; without this and "
        "--save-detections they are shown in a window",
    )
    parser.add_argument(
        "--save-detections",
        metavar="FILE",
        help="file for the detections: FILE.json of COCO results, whose ids FILE.images.json "
        "explains, or FILE.csv; a run that was ended goes on where it stopped",
    )
    parser.add_argument(
        "--recursive", action="store_true", help="search the folders in folders of --input as well"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="images that the detector gets at a time, padded to one size (default: 1)",
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="processes on this machine, which share the images and its GPUs (default: 1, or as "
        "torchrun says)",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score that is drawn or saved, 0 to 1 (default: 0.5)",
    )
    parser.add_argument(
        "--show-sampling",
        action="store_true",
        help="for each image a picture more, NAME_sampling.png: where the last decoder layer looks "
        "for the best detections, coloured by attention weight; sampling points, or a heat map of "
        "DETR",
    )
    parser.add_argument(
        "--sampling-detections",
        type=int,
        metavar="N",
        help=f"the same for the N best detections (default: {SAMPLING_DETECTIONS})",
    )
    parser.add_argument(
        "--sampling-pixels",
        nargs="+",
        metavar="X,Y",
        help="the same, and where the last encoder layer looks from these pixels (column,row) of "
        "the image",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes to the configuration, as in: --opts MODEL.WEIGHTS model_final.pth",
    )
    # What launch() wants to know beside the number of processes.
    parser.set_defaults(
        num_gpus=None, num_machines=1, machine_rank=0, dist_url="auto", hang_limit=HANG_LIMIT
    )
    return parser


def asks_for_sampling(args: argparse.Namespace) -> bool:
    """Whether the arguments ask for pictures of where the detector looks."""
    return bool(args.show_sampling or args.sampling_pixels or args.sampling_detections is not None)


def find_outputs(args: argparse.Namespace) -> tuple[dict[str, int], list[str], Outputs]:
    """Find images and output, and all that can be wrong with them before the model is loaded.

    Returns:
        of :func:`find_images` the images, and messages on what stands for no image; what becomes
        of the detections.
    """
    show_sampling = asks_for_sampling(args)
    count = SAMPLING_DETECTIONS if args.sampling_detections is None else args.sampling_detections
    if count < 0:
        raise UserError(
            f"--sampling-detections {count} is no number of detections; give 0 or more."
        )
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}; give 1 or more.")
    if show_sampling and args.batch_size > 1:
        raise UserError("where the detector looks is drawn of single images; give --batch-size 1.")
    window = args.output is None and args.save_detections is None
    if args.save_detections is not None:
        check_detections_file(args.save_detections)
        if show_sampling and args.output is None:
            raise UserError("where the detector looks is drawn, not saved; give --output PATH.")
    if window:
        if comm.get_world_size() > 1:
            raise UserError(
                "several processes have no window; give --output PATH or --save-detections FILE."
            )
        check_windows()
    # Once for all processes, which have to see the same files in the same order.
    found = [find_images(args.input, args.recursive, args.output) if is_main_process() else None]
    if comm.get_world_size() > 1:
        dist.broadcast_object_list(found)
    images, problems, left_out = found[0]
    if not images:
        raise UserError(f"--input: nothing to detect on: {'; '.join(problems)}")
    if is_main_process():
        for message in [f"skipped: {problem}" for problem in problems] + left_out:
            print(message, file=sys.stderr)
    drawings = None if args.output is None else name_drawings(images, args.output)
    sampling = None
    if show_sampling:
        pixels = parse_pixels(args.sampling_pixels or [], [*images])
        files = drawings and name_samplings(images, drawings, args.output)
        sampling = SamplingRequest(count, pixels, files)
    return images, problems, Outputs(args.confidence_threshold, drawings, None, window, sampling)


def run(args: argparse.Namespace) -> int:
    """Run the program, as one of several processes or alone; returns its exit code."""
    if not 0 <= args.confidence_threshold <= 1:
        raise UserError(
            f"--confidence-threshold {args.confidence_threshold} is no score; give 0 to 1."
        )
    return run_on_input(args) if args.input else run_on_camera(args)


def run_on_input(args: argparse.Namespace) -> int:
    """Detect on the images of ``--input``; returns the exit code."""
    found, problems, outputs = find_outputs(args)
    images = [*found]
    detector = make_detector(args)
    if outputs.sampling and detector.cfg.TEST.AUG.ENABLED:
        raise UserError(
            "with test-time augmentation there are several copies of an image to look at; "
            "to see where the detector looks, set TEST.AUG.ENABLED False."
        )
    with contextlib.ExitStack() as stack:
        if args.save_detections:
            settings = settings_of(detector, args.confidence_threshold, args.output)
            parts = stack.enter_context(DetectionParts(args.save_detections, settings))
            outputs = dataclasses.replace(outputs, parts=parts)
        unreadable = sum(comm.all_gather(run_on_images(detector, images, outputs, args.batch_size)))
        if args.save_detections:
            on_main_process(lambda: save(parts, args.save_detections, images, detector))
    if is_main_process():
        if outputs.drawings is not None:
            folder = args.output if os.path.isdir(args.output) else os.path.dirname(args.output)
            print(f"{len(images) - unreadable} drawings in {folder or '.'}")
        if unreadable or problems:
            print(f"{unreadable + len(problems)} inputs were skipped, see above", file=sys.stderr)
    return 1 if unreadable or problems else 0


def run_on_camera(args: argparse.Namespace) -> int:
    """Detect on the frames of a video or a webcam; returns the exit code."""
    if asks_for_sampling(args):
        raise UserError("where the detector looks is drawn of images only; give them with --input.")
    if args.save_detections is not None:
        raise UserError("--save-detections is for images only; give them with --input.")
    if comm.get_world_size() > 1:
        raise UserError("a video or webcam is for one process alone.")
    if args.output is None:
        check_windows()
    source = None if args.webcam else os.path.expanduser(args.video_input)
    if source and not os.path.isfile(source):
        raise UserError(f"--video-input {source} does not exist.")
    output = None if args.output is None else name_video(source, args.output)
    run_on_video(make_detector(args), source or 0, output, args.confidence_threshold)
    return 0


def make_detector(args: argparse.Namespace) -> Detector:
    """The detector of the arguments, on the GPU of this process if there are several."""
    for name in ("fvcore", "ddetr_d2"):
        setup_logger(name=name, distributed_rank=comm.get_rank())
    if comm.get_world_size() > 1 and torch.cuda.is_available():
        torch.cuda.set_device(comm.get_local_rank() % torch.cuda.device_count())
    return Detector(config=args.config_file, opts=args.opts, array_format="BGR")


def save(parts: DetectionParts, path: str, images: Sequence[str], detector: Detector) -> None:
    """Turn the parts into the file of detections."""
    number = detector.cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES
    names = detector.class_names or [str(category) for category in range(1, number + 1)]
    count = parts.finish(images, names)
    print(f"{count:,} detections in {path}")


def main(args: argparse.Namespace) -> None:
    """For :func:`launch`, whose processes end together if they end well."""
    code = run(args)
    if code and comm.get_world_size() == 1:
        sys.exit(code)


if __name__ == "__main__":
    arguments = get_parser().parse_args()
    if arguments.num_processes is None:
        arguments.num_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # of torchrun
    launch(main, arguments)
