#!/usr/bin/env python
"""Count parameters, FLOPs and activations of a model, in the manner of Detectron2's tool.

::

    python tools/analyze_model.py --config-file configs/deformable_detr.yaml \\
        --tasks parameter flop activation --size 800 1066 MODEL.DEFORMABLE_DETR.NUM_CLASSES 91

What is counted, and how, stands in docs/flops.md. Weights are not needed and not loaded: no count
depends on them.
"""

import argparse
import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from ddetr_d2.data import data_set_classes, register_datasets
from ddetr_d2.detector import configure
from ddetr_d2.engine import Trainer, setup_cfg
from ddetr_d2.errors import UserError, exit_on_user_error
from ddetr_d2.layers import MSDeformAttn, ms_deform_attn
from ddetr_d2.layers.flops import add_activation_handles, add_flop_handles

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count
from fvcore.nn import ActivationCountAnalysis
from fvcore.nn.jit_analysis import JitModelAnalysis
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

TASKS = ("parameter", "flop", "activation", "structure")
DEFAULT_SIZE = (800, 1066)
PARTS = {
    "backbone": ("backbone",),
    "projection": ("projection",),
    "encoder": ("transformer.encoder",),
    "queries": ("transformer.queries",),
    "decoder": ("transformer.decoder.layers", "transformer.decoder.norm"),  # DETR's has a norm
    "heads": ("transformer.decoder.heads",),
}

# How often each (height, width) in pixels occurs among the images.
Sizes = Counter[tuple[int, int]]
# Counts of each part of the model, by operator.
Counts = dict[str, Counter[str]]


def count_parameters(model: nn.Module) -> Counts:
    """``all`` parameters of each part, and those that are ``trained``."""
    trained = Counter()
    for name, parameter in model.named_parameters():
        trained[name] = parameter.numel() * parameter.requires_grad
    counts = parameter_count(model)
    result = {}
    for part, modules in {**PARTS, "total": ("",)}.items():
        prefixes = tuple(f"{module}." if module else "" for module in modules)
        result[part] = Counter(
            all=sum(counts[module] for module in modules),
            trained=sum(n for name, n in trained.items() if name.startswith(prefixes)),
        )
    return result


def count_flops(model: nn.Module, size: tuple[int, int]) -> tuple[Counts, Counter[str]]:
    """Multiply-adds for one image, and the operators that were met without a formula.

    All predictions of the model are counted, those of the earlier decoder layers and of the
    encoder's proposals included.

    Args:
        model: a :class:`ddetr_d2.modeling.SetDetector`.
        size: height and width of the image in pixels.
    """
    inputs = [{"image": torch.zeros(3, *size, dtype=torch.uint8)}]
    analysis = FlopCountAnalysis(model, inputs)
    add_flop_handles(analysis)
    counts = _by_part(model, analysis)
    return counts, analysis.unsupported_ops()


def count_activations(model: nn.Module, size: tuple[int, int]) -> Counts:
    """Elements in the outputs of convolutions, linear layers and attention, for one image.

    Takes what :func:`count_flops` takes.
    """
    inputs = [{"image": torch.zeros(3, *size, dtype=torch.uint8)}]
    adapter = TracingAdapter(model, inputs, allow_non_tensor=True)
    analysis = ActivationCountAnalysis(adapter, adapter.flattened_inputs)
    add_activation_handles(analysis)
    return _by_part(model, analysis)


def _by_part(model: nn.Module, analysis: JitModelAnalysis) -> Counts:
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    training = model.training
    model.eval()
    with _traceable(model):
        counts = analysis.by_module_and_operator()
    model.train(training)
    parts = {
        part: sum((counts.get(f"model.{module}", Counter()) for module in modules), Counter())
        for part, modules in PARTS.items()
    }
    total = counts[""]
    rest = total - sum(parts.values(), Counter())
    return {**parts, **({"rest": rest} if rest else {}), "total": total}


@contextlib.contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Let ``model`` be traced with its compiled operator and with all of its predictions.

    A trace drops what the result does not need, such as scores of the earlier decoder layers.
    """
    predictions = []
    hooks = [
        model.transformer.register_forward_hook(lambda _, args, out: predictions.append(out)),
        model.register_forward_hook(lambda _, args, out: (out, predictions)),
    ]
    attentions = [module for module in model.modules() if isinstance(module, MSDeformAttn)]
    operators = [module.operator for module in attentions]
    for module in attentions:
        module.operator = _with_plain_sizes
    try:
        yield
    finally:
        for module, operator in zip(attentions, operators, strict=True):
            module.operator = operator
        for hook in hooks:
            hook.remove()


def _with_plain_sizes(value, spatial_shapes, level_start_index, locations, weights):
    """The operator where a trace has made tensors of the level sizes."""
    shapes = [(int(height), int(width)) for height, width in spatial_shapes]
    starts = [int(start) for start in level_start_index]
    return ms_deform_attn(value, shapes, starts, locations, weights)


def mean_counts(counts: dict[tuple[int, int], Counts], sizes: Sizes) -> Counts:
    """Mean of the counts over all images."""
    result: Counts = {}
    for size, number in sizes.items():
        for part, operators in counts[size].items():
            total = result.setdefault(part, Counter())
            for operator, count in operators.items():
                total[operator] += count * number / sizes.total()
    return result


def _other(operators: Counter[str], shown: Sequence[str]) -> float:
    return sum(count for name, count in operators.items() if name not in shown)


def table(counts: Counts, what: str) -> str:
    """A Markdown table: a row for each part, a column for each operator, and their sum.

    Operators with less than a ten-thousandth of the total share the column ``other``.
    """
    whole = counts["total"]
    shown = [name for name, count in whole.most_common() if count >= whole.total() / 1e4]
    unit, prefix = (1e9, "G") if whole.total() >= 1e9 else (1e6, "M")
    rows = [
        [part, *(own[name] / unit for name in shown), _other(own, shown) / unit, own.total() / unit]
        for part, own in counts.items()
    ]
    headers = [f"{prefix} {what}", *shown, "other", "total"]
    return tabulate(rows, headers, tablefmt="github", floatfmt=".2f")


def image_sizes(cfg: CfgNode, number: int) -> Sizes:
    """Sizes of the first ``number`` images of the first test set, as the model gets them."""
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a data set for --num-inputs, or use --size.")
    cfg.DATASETS.TRAIN = ()  # counting needs none of its files
    register_datasets(cfg)
    loader = Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    batches = itertools.islice(loader, number)
    return Counter(
        tuple(inputs["image"].shape[-2:])
        for batch in tqdm(batches, "reading", min(number, len(loader)))
        for inputs in batch
    )


def set_num_classes(cfg: CfgNode) -> None:
    """Take the number of classes from the data sets where the configuration leaves it open."""
    node = cfg.MODEL.DEFORMABLE_DETR
    if node.NUM_CLASSES > 0:
        return
    names = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    if not names:
        raise UserError(
            "MODEL.DEFORMABLE_DETR.NUM_CLASSES is 0 and no data set is named to take it from; "
            "give MODEL.DEFORMABLE_DETR.NUM_CLASSES."
        )
    # Detectron2 knows the classes of its own data sets without their files.
    known = MetadataCatalog.get(names[0]).get("thing_classes")
    try:
        node.NUM_CLASSES = len(known or data_set_classes(cfg) or ())
    except UserError as error:
        raise UserError(
            f"{error} (To count without data sets, give MODEL.DEFORMABLE_DETR.NUM_CLASSES.)"
        ) from error
    print(
        f"{node.NUM_CLASSES} classes, those of {names[0]}; "
        "MODEL.DEFORMABLE_DETR.NUM_CLASSES N counts for another number."
    )


def report_parameters(model: nn.Module) -> None:
    rows = [
        [part, f"{counts['all']:,}", f"{counts['trained']:,}"]
        for part, counts in count_parameters(model).items()
    ]
    print("\nParameters\n")
    align = ("left", "right", "right")
    print(tabulate(rows, ["part", "all", "trained"], tablefmt="github", colalign=align))


def report_flops(model: nn.Module, sizes: Sizes) -> None:
    counts, unsupported = {}, Counter()
    for size in tqdm(sizes, "FLOPs", disable=len(sizes) == 1):
        counts[size], unsupported = count_flops(model, size)
    print(f"\nFLOPs (1 is one multiply-add), {_described(sizes)}\n")
    print(table(mean_counts(counts, sizes), "FLOPs"))
    totals = np.array([counts[size]["total"].total() / 1e9 for size in sizes.elements()])
    print(f"\nTotal GFLOPs: {totals.mean():.4g}" + (f" ± {totals.std():.2g}" * (len(totals) > 1)))
    if unsupported:
        listed = ", ".join(f"{name} ({times} times)" for name, times in unsupported.items())
        print(f"Not counted, for want of a formula: {listed}")


def report_activations(model: nn.Module, sizes: Sizes) -> None:
    counts = {
        size: count_activations(model, size)
        for size in tqdm(sizes, "activations", disable=len(sizes) == 1)
    }
    print(f"\nActivations, {_described(sizes)}\n")
    print(table(mean_counts(counts, sizes), "activations"))


def _described(sizes: Sizes) -> str:
    if sizes.total() > 1:
        return f"mean over {sizes.total()} images"
    ((height, width),) = sizes
    return f"one image of {height} x {width} pixels"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="configuration file (default: what the weights tell of theirs)",
    )
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help=f"any of {', '.join(TASKS)}"
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=DEFAULT_SIZE,
        metavar=("HEIGHT", "WIDTH"),
        help="count for one image that the model gets in this size, in pixels (default: 800 1066)",
    )
    images.add_argument(
        "-n",
        "--num-inputs",
        type=int,
        metavar="N",
        help="count for the first N images of the test set instead, and give the mean",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="changes to the configuration, as in: MODEL.DEFORMABLE_DETR.NUM_CLASSES 91",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    # KEY VALUE pairs right behind the tasks look like more of them.
    tasks = list(itertools.takewhile(TASKS.__contains__, args.tasks))
    opts = [*args.tasks[len(tasks) :], *args.opts]
    if not tasks:
        raise UserError(f"--tasks {opts[0]}: expected any of {', '.join(TASKS)}.")
    if min(args.size) < 1:
        raise UserError(f"--size {args.size[0]} {args.size[1]}: both must be at least 1.")
    if args.num_inputs is not None and args.num_inputs < 1:
        raise UserError(f"--num-inputs is {args.num_inputs}; it must be at least 1.")
    if args.config_file:
        cfg = setup_cfg(args.config_file, opts)
        set_num_classes(cfg)
    else:
        cfg = configure(opts=opts).cfg
    sizes: Sizes = Counter([tuple(args.size)])
    if args.num_inputs is not None and {"flop", "activation"} & set(tasks):
        sizes = image_sizes(cfg, args.num_inputs)
    model = build_model(cfg)
    for task in tasks:
        if task == "parameter":
            report_parameters(model)
        elif task == "flop":
            report_flops(model, sizes)
        elif task == "activation":
            report_activations(model, sizes)
        else:
            print(f"\n{model}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
