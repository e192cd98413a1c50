#!/usr/bin/env python
"""Train or evaluate Deformable DETR, with Detectron2's usual arguments.

Exit code: 0; 2 for a mistake that the user can mend; 75 for a training that was told to stop and
wants to be resumed.
"""

import argparse
import contextlib
import logging

from ddetr_d2.checkpoint import newest_checkpoint, read_class_names
from ddetr_d2.data import coco_set, infer_num_classes, register_datasets
from ddetr_d2.data.report import short_report
from ddetr_d2.detector import configure as detector_of
from ddetr_d2.engine import Trainer, setup_cfg
from ddetr_d2.engine.launch import launch
from ddetr_d2.engine.layout import launch_argument_parser
from ddetr_d2.engine.output_folder import make_folder, output_folder
from ddetr_d2.errors import UserError
from ddetr_d2.main_process import on_main_process
from ddetr_d2.modeling import inference_dtype, prepare_for_inference, test_time_augmentation

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger


def configure(args: argparse.Namespace) -> CfgNode:
    """The configuration, before the data sets are looked at."""
    if args.config_file:
        cfg = setup_cfg(args.config_file, args.opts)
    elif args.eval_only:
        cfg = detector_of(opts=args.opts).cfg
    else:
        raise UserError("--config-file is missing; give one, such as configs/deformable_detr.yaml.")
    if args.num_processes and cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError("--num-processes is for CPUs: set MODEL.DEVICE cpu, or give --num-gpus.")
    inference_dtype(cfg.TEST.DTYPE)
    if cfg.TEST.AUG.ENABLED:
        test_time_augmentation.check(cfg)
    if args.eval_only:
        cfg.DATASETS.TRAIN = ()  # evaluation needs none of its files
    elif not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a data set, or give --eval-only.")
    return cfg


def complete(cfg: CfgNode, args: argparse.Namespace, weights: str = "") -> None:
    """Set up logging, read the data sets and put into ``cfg`` what they tell.

    ``weights`` are those whose classes the data sets are matched with, if they name them.
    """
    rank = comm.get_rank()
    # Before the data sets are read, so that what was noticed stands in the log.
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="ddetr_d2")
    classes = register_datasets(cfg, read_class_names(weights) if weights else None)
    cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES = infer_num_classes(cfg, classes)
    if cfg.SEED < 0 and not args.resume:  # a run that is resumed goes on with its own
        cfg.SEED = comm.shared_random_seed() % 2**31
    cfg.freeze()
    default_setup(cfg, args)
    logger.info(
        f"Running on {cfg.MODEL.DEVICE}, {torch.get_num_threads()} threads; {len(classes)} classes."
    )


def train(cfg: CfgNode, args: argparse.Namespace) -> None:
    with contextlib.ExitStack() as stack:
        on_main_process(lambda: stack.enter_context(output_folder(cfg.OUTPUT_DIR)))
        complete(cfg, args)
        on_main_process(lambda: log_data(cfg))
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


def log_data(cfg: CfgNode) -> None:
    """Log what is in the data sets, in short; ``tools/inspect_dataset.py`` says more."""
    logger = logging.getLogger("ddetr_d2.data.report")
    training, test = (
        [found.annotations for name in names if (found := coco_set(name))]
        for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    )
    for line in short_report(training, test):
        start, found, rest = line.partition("warning: ")
        logger.log(logging.WARNING if found and not start else logging.INFO, rest or line)


def evaluate(cfg: CfgNode, args: argparse.Namespace) -> None:
    on_main_process(lambda: make_folder(cfg.OUTPUT_DIR))
    weights = on_main_process(lambda: newest_checkpoint(cfg.OUTPUT_DIR)) if args.resume else ""
    weights = weights or cfg.MODEL.WEIGHTS
    if not weights:
        raise UserError("nothing to evaluate: MODEL.WEIGHTS is empty; give a checkpoint.")
    complete(cfg, args, weights)
    model = Trainer.build_model(cfg)
    Trainer.build_checkpointer(cfg, model, strict=True).load(weights, checkpointables=[])
    model = prepare_for_inference(model, inference_dtype(cfg.TEST.DTYPE))
    Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        Trainer.test_with_TTA(cfg, model)


def main(args: argparse.Namespace) -> None:
    cfg = configure(args)
    if args.eval_only:
        evaluate(cfg, args)
    else:
        train(cfg, args)


if __name__ == "__main__":
    launch(main, launch_argument_parser().parse_args())
