"""Time this project beside others, side by side in one run.

::

    python -m benchmarks --repeats 3                      everything, on two cores in 20 minutes
    python -m benchmarks model --sizes 800x1066 --json model.json

What is measured, and what each column means, stands in docs/benchmarks.md.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence

from ddetr_d2.config import config_file
from ddetr_d2.errors import UserError, exit_on_user_error

import torch
from tqdm import tqdm

from . import export, models, operator, training
from .cases import COLUMNS, Case
from .report import Record, describe, environment, table, write_json

PARTS = {
    "operator": "Multi-scale deformable attention",
    "model": "Inference",
    "training": "Training step",
    "export": "Exported models",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES, TRAINING_SIZES, QUICK_SIZES = ["800x1066"], ["480x640", "800x1066"], ["64x96"]
# A model that is read, run and exported in seconds.
QUICK_MODEL = {
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "32",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "8",
    "MODEL.DEFORMABLE_DETR.HIDDEN_DIM": "64",
    "MODEL.DEFORMABLE_DETR.DIM_FEEDFORWARD": "128",
    "MODEL.DEFORMABLE_DETR.ENC_LAYERS": "1",
    "MODEL.DEFORMABLE_DETR.DEC_LAYERS": "2",
    "MODEL.DEFORMABLE_DETR.NUM_QUERIES": "20",
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=usual, help=f"({usual})")
    parser.add_argument("--threads", type=int, metavar="N", help="threads on the CPU")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each (5)")
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="HxW",
        help=f"images ({' '.join(SIZES)}; in training {' '.join(TRAINING_SIZES)})",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        metavar="TYPE",
        help=f"any of {', '.join(DTYPES)} (float32 bfloat16; on a GPU all)",
    )
    parser.add_argument("--json", metavar="FILE", help="write figures and all times to this file")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, one turn, no memory: does it all run?"
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="of the model (configs/deformable_detr_refine.yaml; with --weights, theirs)",
    )
    parser.add_argument("--weights", default="", help="as MODEL.WEIGHTS (random ones)")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="last on the line"
    )
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked and completed.

    Raises:
        UserError: one of them is wrong, or the device is not here.
    """
    args = get_parser().parse_args(arguments)
    wrong = set(args.parts) - set(PARTS)
    if wrong:
        raise UserError(f"there is no part {wrong.pop()!r}; there are {', '.join(PARTS)}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no usable GPU is here; take --device cpu.")
    for option, value in (("threads", args.threads), ("repeats", args.repeats)):
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; it must be at least 1.")
    args.parts = args.parts or list(PARTS)
    usual = QUICK_SIZES if args.quick else SIZES
    args.training_sizes = _sizes(args.sizes or (QUICK_SIZES if args.quick else TRAINING_SIZES))
    args.sizes = _sizes(args.sizes or usual)
    dtypes = args.dtype or [x for x in DTYPES if args.device == "cuda" or x != "float16"]
    args.dtypes = [DTYPES[name] for name in dtypes]
    if args.quick:
        args.repeats, args.no_memory = 1, True
        args.opts = [word for item in QUICK_MODEL.items() for word in item] + args.opts
    return args


def _sizes(texts: Sequence[str]) -> list[tuple[int, int]]:
    found = []
    for text in texts:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise UserError(f"--sizes {text}: give HEIGHTxWIDTH in pixels, as in 800x1066.")
        found.append((int(match[1]), int(match[2])))
    return found


def all_cases(args: argparse.Namespace, folder: str) -> dict[str, list[Case]]:
    """The cases of each part that is wanted; weights of models are written into the folder."""
    cases: dict[str, Iterable[Case]] = {}
    if "operator" in args.parts:
        cases["operator"] = operator.cases(args.device, args.sizes, args.dtypes)
    if set(args.parts) != {"operator"}:
        usual = "" if args.weights else config_file("deformable_detr_refine")
        models.write_weights(folder, args.config_file or usual, args.weights, args.opts)
    if "model" in args.parts:
        cases["model"] = models.cases(folder, args.device, args.sizes, args.dtypes)
    if "training" in args.parts:
        demo = f"{folder}/demo"
        models.write_weights(demo, config_file("synthetic_demo"), "", [])
        cases["training"] = training.cases(
            folder, demo, args.device, args.training_sizes, args.dtypes, args.quick
        )
    if "export" in args.parts and args.device == "cpu":
        cases["export"] = export.cases(folder, args.sizes, args.quick)
    return {part: [x for x in found if args.only in x.name] for part, found in cases.items()}


def run(args: argparse.Namespace, report: Record) -> None:
    """Measure all cases, and add their records to the report.

    Raises:
        UserError: no case is left.
    """
    with tempfile.TemporaryDirectory() as folder:
        cases = all_cases(args, folder)
        settings = (args.repeats, not args.no_memory)
        total = sum(case.weight(*settings) for found in cases.values() for case in found)
        if not total:
            raise UserError(f"--only {args.only!r}: no case has that in its name.")
        bar = "{percentage:3.0f}% |{bar}| {elapsed}, {remaining} left, {desc}"
        with tqdm(total=total, file=sys.stderr, bar_format=bar) as progress:
            for part, found in cases.items():
                for case in found:
                    records = case.measure(*settings, args.device, progress)
                    report[part] = report.get(part, []) + records
                    write_json(args.json, report)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    report: Record = {"environment": environment(args.device)}
    try:
        run(args, report)
    finally:  # an interrupted run shows what it has
        show(report)
    if args.json:
        print(f"\nwrote {args.json}")


def show(report: Record) -> None:
    """Print the head of the report and the tables of its parts, if it has any."""
    parts = [part for part in PARTS if report.get(part)]
    if parts:
        print(describe(report["environment"]))
    for part in parts:
        print(table(PARTS[part], report[part], COLUMNS))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
