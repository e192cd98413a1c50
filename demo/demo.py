#!/usr/bin/env python
"""Draw detections on images, a video or the pictures of a webcam.

::

    python demo/demo.py --input photos/ --output drawings/ --opts MODEL.WEIGHTS model_final.pth

Exit code: 0; 1 if an input could not be read and was skipped; 2 for a mistake in the arguments.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from detectron2.utils.logger import setup_logger
from files import find_images, name_drawings, name_samplings, name_video
from images import run_on_images
from sampling import SamplingRequest, parse_pixels
from video import run_on_video
from window import check_windows

from ddetr_d2 import Detector
from ddetr_d2.errors import UserError, exit_on_user_error

SAMPLING_DETECTIONS = 4


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
        help="folder for the drawings, or a file for a single one; else they are shown in a window",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score that is drawn, 0 to 1 (default: 0.5)",
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
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    args = get_parser().parse_args(argv)
    if not 0 <= args.confidence_threshold <= 1:
        raise UserError(
            f"--confidence-threshold {args.confidence_threshold} is no score; give 0 to 1."
        )
    show_sampling = (
        args.show_sampling or args.sampling_pixels or args.sampling_detections is not None
    )
    if show_sampling and not args.input:
        raise UserError("where the detector looks is drawn of images only; give them with --input.")
    count = SAMPLING_DETECTIONS if args.sampling_detections is None else args.sampling_detections
    if count < 0:
        raise UserError(
            f"--sampling-detections {count} is no number of detections; give 0 or more."
        )
    # Everything that can be wrong with inputs and output is found before the model is loaded.
    if args.output is None:
        check_windows()
    if args.input:
        images, problems, left_out = find_images(args.input)
        if not images:
            raise UserError(f"--input: nothing to detect on: {'; '.join(problems)}")
        for problem in problems:
            print(f"skipped: {problem}", file=sys.stderr)
        for message in left_out:
            print(message, file=sys.stderr)
        drawings = None if args.output is None else name_drawings(images, args.output)
        sampling = None
        if show_sampling:
            pixels = parse_pixels(args.sampling_pixels or [], images)
            files = drawings and name_samplings(images, drawings, args.output)
            sampling = SamplingRequest(count, pixels, files)
    else:
        source = None if args.webcam else os.path.expanduser(args.video_input)
        if source and not os.path.isfile(source):
            raise UserError(f"--video-input {source} does not exist.")
        output = None if args.output is None else name_video(source, args.output)

    setup_logger(name="fvcore")
    setup_logger(name="ddetr_d2")
    detector = Detector(config=args.config_file, opts=args.opts, array_format="BGR")
    if not args.input:
        run_on_video(detector, source or 0, output, args.confidence_threshold)
        return 0
    unreadable = run_on_images(detector, images, drawings, args.confidence_threshold, sampling)
    if drawings is not None:
        print(f"{len(images) - unreadable} drawings in {os.path.dirname(drawings[0]) or '.'}")
    if unreadable or problems:
        print(f"{unreadable + len(problems)} inputs were skipped, see above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
