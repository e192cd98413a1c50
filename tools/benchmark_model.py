#!/usr/bin/env python
"""Time whole models: inference beside transformers, memory, growth with the image, training.

::

    python tools/benchmark_model.py --json model.json

Both models get the same random weights and the same image, and their detections are compared
before they are timed in turn. What each table means stands in docs/benchmarks.md.
"""

import argparse
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from benchmarking import (
    MEGABYTE,
    Record,
    Run,
    add_options,
    describe,
    environment,
    note,
    peak_gpu_memory,
    peak_memory,
    prepare,
    side_by_side,
    summary,
    table,
    write_json,
)
from benchmarking_models import (
    compare,
    make_images,
    make_ours,
    make_theirs,
    normalised,
    prepare_ours,
    prepare_theirs,
    run_ours,
    run_theirs,
    save_for_transformers,
)
from benchmarking_steps import operators, part_seconds, synchronizations, training_step
from detectron2.config import CfgNode
from torch import nn
from tqdm import tqdm

from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError, exit_on_user_error
from ddetr_d2.modeling import prepare_for_inference

OURS, THEIRS = "ddetr_d2", "transformers"
CLASSES = 91  # where the configuration leaves it open, as in the published models
INFERENCE_COLUMNS = {
    "implementation": "implementation",
    "batch": "batch",
    "median_ms": "median ms",
    "fastest_ms": "fastest ms",
    "images_per_second": "images/s",
    "speedup": "times as fast",
}
BREAKDOWN_COLUMNS = {"part": "part", "ms": "ms", "share": "share"}
OPERATOR_COLUMNS = {"operator": "operator", "calls": "calls", "ms": "ms", "share": "share"}
MEMORY_COLUMNS = {
    "implementation": "implementation",
    "extra_mb": "grows by, MB",
    "peak_mb": "peak, MB",
    "ratio": "growth relative to transformers",
}
SCALING_COLUMNS = {
    "height": "height",
    "width": "width",
    "median_ms": "median ms",
    "ns_per_pixel": "ns per pixel",
}
TRAINING_COLUMNS = {
    "batch": "batch",
    "amp": "mixed precision",
    "layout": "layout",
    "median_ms": "median ms",
    "images_per_second": "images/s",
}
WAIT_COLUMNS = {"place": "place", "times": "times"}


@dataclass
class Bench:
    """What the parts of the program share."""

    cfg: CfgNode
    args: argparse.Namespace
    ours: nn.Module
    theirs: nn.Module | None
    folder: str  # of transformers' files
    progress: tqdm

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.args.image_size)

    def time(self, functions: dict[str, Run], warm_up: int = 1) -> dict[str, list[float]]:
        """Seconds of the calls of each function, in turn."""
        for function in functions.values():
            for _ in range(warm_up):
                function()
        return side_by_side(functions, self.args.repetitions, self.progress)


def inference(bench: Bench) -> Record:
    """Durations of inference of each model, whose detections are compared first."""
    records = []
    report: Record = {"inference": records}
    if bench.theirs is not None:
        report["difference"] = compare(bench.cfg, bench.ours, bench.theirs, bench.size)
    for batch in bench.args.batch:
        images = [image.to(bench.args.device) for image in make_images(batch, bench.size)]
        functions: dict[str, Run] = {OURS: lambda images=images: run_ours(bench.ours, images)}
        if bench.theirs is not None:
            pixels = normalised(bench.cfg, images)
            functions[THEIRS] = lambda pixels=pixels: run_theirs(bench.theirs, pixels)
        times = bench.time(functions)
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, median in medians.items():
            records.append(
                {
                    "implementation": name,
                    "batch": batch,
                    **summary(times[name]),
                    "images_per_second": batch / median,
                    "speedup": medians[THEIRS] / median if THEIRS in medians else None,
                }
            )
    return report


def breakdown(bench: Bench) -> Record:
    """Durations of the parts of the median one of several inferences, and its operators."""
    images = [image.to(bench.args.device) for image in make_images(1, bench.size)]

    def run() -> object:
        return run_ours(bench.ours, images)

    run()
    times = []
    for _ in range(bench.args.repetitions):
        times.append(part_seconds(bench.ours, run))
        bench.progress.update()
    parts = sorted(times, key=lambda x: x["total"])[len(times) // 2]
    total = parts.pop("total")
    parts |= {"rest": total - sum(parts.values()), "total": total}
    report: Record = {
        "breakdown": [
            {"part": part, "ms": seconds * 1e3, "share": seconds / total}
            for part, seconds in parts.items()
        ],
        "operators": operators(run, bench.args.device),
    }
    if bench.args.device == "cuda":
        report["inference_synchronizations"] = _listed(synchronizations(run))
    return report


def memory(bench: Bench) -> Record:
    """Memory that inference on one image takes, beyond the model and its input."""
    # Transformers first, which the other one is compared with.
    wanted = {} if bench.theirs is None else {THEIRS: (prepare_theirs, bench.folder)}
    wanted[OURS] = (prepare_ours,)
    found = {}
    for name, (make, *arguments) in wanted.items():
        arguments = (bench.cfg, bench.size, *arguments)
        if bench.args.device == "cuda":
            found[name] = peak_gpu_memory(make(*arguments))
        else:
            found[name] = peak_memory(make, *arguments)
        bench.progress.update()
    records = [
        {
            "implementation": name,
            "extra_mb": measured[0] / MEGABYTE,
            "peak_mb": measured[1] / MEGABYTE,
            "ratio": measured[0] / found[THEIRS][0] if THEIRS in found else None,
        }
        for name, measured in found.items()
        if measured is not None
    ]
    return {"memory": records}


def scaling(bench: Bench) -> Record:
    """Durations for images of several sizes, and the exponent that time grows with in pixels."""
    height, width = bench.size
    sizes = [(side, round(side * width / height)) for side in bench.args.sides]
    images = {size: make_images(1, size)[0].to(bench.args.device) for size in sizes}
    times = bench.time(
        {f"{x}": lambda image=image: run_ours(bench.ours, [image]) for x, image in images.items()}
    )
    records = []
    for size in sizes:
        found = summary(times[f"{size}"])
        per_pixel = found["median_ms"] * 1e6 / (size[0] * size[1])
        records.append({"height": size[0], "width": size[1], **found, "ns_per_pixel": per_pixel})
    report: Record = {"scaling": records, "exponent": None}
    if len(records) > 1:
        pixels = np.log([x["height"] * x["width"] for x in records])
        medians = np.log([x["median_ms"] for x in records])
        report["exponent"] = float(np.polyfit(pixels, medians, 1)[0])
    return report


def training(bench: Bench) -> Record:
    """Durations of a training step, with and without mixed precision and channels last."""
    batch = bench.args.training_batch
    kinds = [(amp, last) for amp in (False, True) for last in (True, False)]
    steps = {f"{kind}": training_step(bench.cfg, batch, bench.size, *kind) for kind in kinds}
    times = bench.time(steps, warm_up=2)
    records = []
    for amp, last in kinds:
        found = summary(times[f"{amp, last}"])
        records.append(
            {
                "batch": batch,
                "amp": "yes" if amp else "no",
                "layout": "channels last" if last else "channels first",
                **found,
                "images_per_second": batch / found["median_ms"] * 1e3,
            }
        )
    usual = steps[f"{(False, True)}"]
    report: Record = {
        "training": records,
        "training_operators": operators(usual, bench.args.device),
    }
    if bench.args.device == "cuda":
        report["training_synchronizations"] = _listed(synchronizations(usual))
    return report


def _listed(places: Counter[str]) -> list[Record]:
    return [{"place": place, "times": times} for place, times in places.most_common()]


PARTS = {
    "inference": inference,
    "breakdown": breakdown,
    "memory": memory,
    "scaling": scaling,
    "training": training,
}
TABLES = {
    "inference": ("Inference", INFERENCE_COLUMNS),
    "breakdown": ("Parts of one inference", BREAKDOWN_COLUMNS),
    "operators": ("Longest operators of one inference", OPERATOR_COLUMNS),
    "inference_synchronizations": ("Waits for the GPU, inference", WAIT_COLUMNS),
    "memory": ("Memory of inference", MEMORY_COLUMNS),
    "scaling": ("Growth with the image", SCALING_COLUMNS),
    "training": ("Training step", TRAINING_COLUMNS),
    "training_operators": ("Longest operators of a training step", OPERATOR_COLUMNS),
    "training_synchronizations": ("Waits for the GPU, training step", WAIT_COLUMNS),
}


def other_model(cfg: CfgNode, ours: nn.Module, folder: str) -> nn.Module | None:
    """The same model in transformers; None if there is none or transformers is missing."""
    try:
        save_for_transformers(ours, cfg, folder)
        return make_theirs(folder, cfg.MODEL.DEVICE)
    except ImportError as error:
        note(f"transformers is left out: {error}; pip install transformers brings it.")
    except UserError as error:
        note(f"transformers is left out: {error}")
    return None


def number_of_turns(args: argparse.Namespace, models: int) -> int:
    turns = {
        "inference": args.repetitions * len(args.batch) * models,
        "breakdown": args.repetitions,
        "memory": models,
        "scaling": args.repetitions * len(args.sides),
        "training": args.repetitions * 4,
    }
    return sum(turns[part] for part in args.parts)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--config-file",
        default="configs/deformable_detr_refine.yaml",
        metavar="FILE",
        help="configuration file (default: %(default)s)",
    )
    add_options(parser)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"any of {', '.join(PARTS)} (default: all; the last on a GPU alone)",
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, metavar="N", help="inference (default: 1; on a GPU 1 4)"
    )
    parser.add_argument(
        "--training-batch", type=int, default=4, metavar="N", help="training (default: 4)"
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        type=int,
        default=(400, 566, 800, 1131, 1600),
        metavar="N",
        help="shortest sides for the growth with the image (default: 400 566 800 1131 1600)",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes to the configuration, last on the line",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    gpu = args.device == "cuda"
    args.parts = args.parts or [part for part in PARTS if gpu or part != "training"]
    args.batch = args.batch or ([1, 4] if gpu else [1])
    prepare(args, batch=args.batch, training_batch=[args.training_batch], sides=args.sides)
    cfg = setup_cfg(args.config_file, [*args.opts, "MODEL.DEVICE", args.device])
    node = cfg.MODEL.DEFORMABLE_DETR
    node.NUM_CLASSES = node.NUM_CLASSES or CLASSES

    report: Record = {"environment": environment(args.device), "image_size": args.image_size}
    ours, theirs = make_ours(cfg), None
    with tempfile.TemporaryDirectory() as folder:
        if {"inference", "memory"} & set(args.parts):
            theirs = other_model(cfg, ours, folder)
        ours = prepare_for_inference(ours)
        total = number_of_turns(args, 1 if theirs is None else 2)
        with tqdm(total=total, unit="turn", file=sys.stderr) as progress:
            bench = Bench(cfg, args, ours, theirs, folder, progress)
            for part in args.parts:
                progress.set_description(part)
                report |= PARTS[part](bench)

    print(describe(report["environment"]))
    if "difference" in report:
        print(f"The largest difference of the two models' detections is {report['difference']:.2g}")
    for key, (title, columns) in TABLES.items():
        if report.get(key):
            print(table(title, report[key], columns))
        elif key in report:
            print(f"\n{title}: none")
    if report.get("exponent") is not None:
        print(f"\nTime grows with the number of pixels to the power of {report['exponent']:.3f}")
    write_json(args.json, report)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
