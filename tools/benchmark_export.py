#!/usr/bin/env python
"""Time a detector in its exported forms on the CPU, side by side with the model itself.

::

    OMP_NUM_THREADS=2 python tools/benchmark_export.py \\
        --config-file configs/deformable_detr_refine.yaml --forms onnx/grid_sample onnx/gather

Weights are random: times do not depend on them. All forms take turns on the same image, so that
whatever else the machine does hits them alike; speeds are those of the lowest times, to which it
has added least.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from detectron2.modeling import build_model
from tabulate import tabulate
from tqdm import tqdm

from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError, exit_on_user_error
from ddetr_d2.export import LOADERS, WRITERS, ExportableDetector, example_inputs
from ddetr_d2.modeling import SetDetector

STANDARD = ("grid_sample", "gather")
FORMS = [
    *(f"{format}/{sampling}" for format in WRITERS for sampling in STANDARD),
    "torch_export/operator",
    "torch.compile",
]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="configuration file")
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=FORMS,
        default=["onnx/grid_sample", "onnx/gather"],
        metavar="FORM",
        help=f"what to time beside the model: {', '.join(FORMS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=(800, 1066),
        metavar=("HEIGHT", "WIDTH"),
        help="of the image, in pixels (default: 800 1066)",
    )
    parser.add_argument(
        "--repetitions", type=int, default=5, help="measured passes of each form (default: 5)"
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE")
    return parser


def prepare(form: str, model: SetDetector, folder: str) -> Callable:
    """The detector in one of FORMS, as a function of tensors."""
    if form == "torch.compile":
        detector = ExportableDetector(model, sampling="operator")
        return torch.compile(detector, dynamic=True, fullgraph=True)
    format, sampling = form.split("/")
    path = os.path.join(folder, f"{format}_{sampling}.pt2")
    WRITERS[format](ExportableDetector(model, sampling=sampling), path, {})
    return LOADERS[format](path)[0]


def measure(
    forms: dict[str, Callable], inputs: tuple[torch.Tensor, ...], repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each pass of each form, after one pass that is not measured."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    with torch.no_grad():
        for repetition in tqdm(range(repetitions + 1), unit="round"):
            for name, run in forms.items():
                start = time.perf_counter()
                run(*inputs)
                if repetition:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    if args.repetitions < 1 or min(args.size) < 1:
        raise UserError("--repetitions and --size must be at least 1.")
    cfg = setup_cfg(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES = cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES or 80
    model = build_model(cfg).eval()
    detector = ExportableDetector(model, sampling="operator")
    inputs = example_inputs(detector, tuple(args.size))
    with tempfile.TemporaryDirectory() as folder:
        forms = {"model": detector}
        forms |= {form: prepare(form, model, folder) for form in args.forms}
        seconds = measure(forms, inputs, args.repetitions)
    fastest = min(seconds["model"])
    rows = [
        [name, min(values), statistics.median(values), max(values), fastest / min(values)]
        for name, values in seconds.items()
    ]
    headers = ["form", "lowest s", "median s", "highest s", "speed, model = 1"]
    print(f"{args.size[0]} x {args.size[1]} pixels, {torch.get_num_threads()} threads")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".2f"))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
