#!/usr/bin/env python
"""Convert weights from and to other implementations of DETR and Deformable DETR.

::

    python tools/convert_weights.py r50_deformable_detr-checkpoint.pth coco.pth
    python tools/convert_weights.py output/model_final.pth folder --to transformers

The input is a file, a URL or a folder of Hugging Face transformers; its format is recognised by
its contents: the reference implementations, transformers, detrex, this project, and backbones of
Detectron2, torchvision and timm. What is written is read again before it gets its name.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from ddetr_d2.checkpoint import DetrCheckpointer
from ddetr_d2.checkpoint.architecture import (
    CLASS_LOSS,
    DILATION,
    NUM_CLASSES,
    NUM_HEADS,
    as_arguments,
    built_options,
    num_classes,
)
from ddetr_d2.checkpoint.files import local_path
from ddetr_d2.checkpoint.formats import Weights, read_weights, to_contiguous
from ddetr_d2.checkpoint.writing import Output, to_reference, write_checkpoint, write_transformers
from ddetr_d2.detector import nearest_configuration
from ddetr_d2.engine import setup_cfg
from ddetr_d2.engine.setup import saved_cfg, value_of
from ddetr_d2.errors import UserError, exit_on_user_error

from detectron2.config import CfgNode
from detectron2.modeling import build_model


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="weights: a file, a URL, or a folder of transformers")
    parser.add_argument("output", help="file to write; a folder with --to transformers")
    parser.add_argument(
        "--to",
        choices=("ddetr_d2", "transformers", "reference"),
        default="ddetr_d2",
        help="format of the output (default: %(default)s)",
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="configuration that the model was trained with; needed only for what its weights do "
        "not tell: other than 8 attention heads, DC5, queries of a two-stage model if not 300",
    )
    parser.add_argument(
        "--keep-outputs",
        action="store_true",
        help="leave the classes of 91 category ids as they are, instead of COCO's 80 among them",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read Python objects of all kinds, which can run any program: trusted files only",
    )
    return parser


def configure(weights: Weights, source: str, config_file: str | None) -> tuple[CfgNode, str]:
    """Configuration of the model that the weights are of, and how to get it from a file.

    Returns:
        the configuration; arguments of train_net.py and demo.py that give the same, none where
        the weights carry it.
    """
    saved = weights.rest.get("config")
    if isinstance(saved, str) and not config_file:
        return saved_cfg(saved, source, ["MODEL.DEVICE", "cpu"]), ""
    path, changed = nearest_configuration(weights, config_file or "")
    cfg = setup_cfg(path, ["MODEL.DEVICE", "cpu", *map(str, sum(changed.items(), ()))])
    changed.pop(NUM_CLASSES, None)  # comes with the class names
    shown = config_file or os.path.join("configs", os.path.basename(path))
    return cfg, f"--config-file {shown} {as_arguments(changed)}".rstrip()


def convert(args: argparse.Namespace) -> None:
    """Do what the arguments say."""
    to_folder = args.to == "transformers"
    output = Output(args.output, to_folder, args.overwrite)
    source = os.path.realpath(local_path(args.input))
    written = os.path.realpath(args.output)
    if source == written or (to_folder and os.path.dirname(source) == written):
        raise UserError(f"{args.output} would replace the input; give another name.")
    weights = read_weights(args.input, args.allow_pickle)
    print(f"{args.input}: {weights.format}, {len(weights.model)} tensors")
    if weights.is_backbone:
        if args.to != "ddetr_d2":
            raise UserError(f"{args.input} is a backbone alone; --to {args.to} needs a detector.")
        with output as path:
            write_checkpoint(path, weights.model)
        print(f"wrote {args.output}; a backbone alone: train with MODEL.WEIGHTS {args.output}")
        return

    classes = num_classes(weights.model, weights.options)
    if weights.coco_ids and args.keep_outputs:
        weights.class_names = None
    elif weights.coco_ids:
        weights = to_contiguous(weights)
        print(f"{classes} classes by COCO category id -> the 80 classes of COCO")
        classes = num_classes(weights.model, weights.options)
    names = weights.class_names
    if not names or len(names) != classes:
        names = None
    print(f"{classes} classes: {', '.join(names[:5]) + ', ...' if names else 'without names'}")
    cfg, arguments = configure(weights, args.input, args.config_file)
    # Published models with more than one scale have no dilation.
    single_scale = cfg.MODEL.DEFORMABLE_DETR.NUM_FEATURE_LEVELS == 1
    deciding = [NUM_HEADS, CLASS_LOSS, *([DILATION] if single_scale else [])]
    untold = [key for key in deciding if key not in weights.options]
    if untold and not args.config_file:
        assumed = {key: value_of(cfg, key) for key in untold}
        print(f"assumed: {as_arguments(assumed)}; if not so, give --config-file")

    checkpointer = DetrCheckpointer(build_model(cfg), strict=True)
    checkpointer.load_weights(weights, args.input)
    entries: dict[str, Any] = {"options": built_options(checkpointer.model)}
    if names:
        entries["class_names"] = names
    if not arguments:
        entries["config"] = weights.rest["config"]
    with output as path:
        if to_folder:
            write_transformers(path, weights.model, cfg, names)
        elif args.to == "reference":
            write_checkpoint(path, to_reference(weights.model), **entries)
        else:
            write_checkpoint(path, weights.model, **entries)
        checkpointer.load(path)
    print(f"wrote {args.output} ({args.to}); use it with")
    print(f"    {f'{arguments} MODEL.WEIGHTS {args.output}'.lstrip()}")


def main(arguments: Sequence[str] | None = None) -> None:
    convert(get_parser().parse_args(arguments))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
