#!/usr/bin/env python
"""Train or evaluate Deformable DETR, with Detectron2's usual arguments."""

import argparse
import sys

import torch
from detectron2.checkpoint import Checkpointer
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.multiprocessing import ProcessExitedException

from ddetr_d2.checkpoint import read_class_names
from ddetr_d2.data import infer_num_classes, register_datasets
from ddetr_d2.engine import Trainer, setup_cfg
from ddetr_d2.errors import UserError, exit_on_user_error
from ddetr_d2.modeling import prepare_for_inference


def setup(args: argparse.Namespace) -> CfgNode:
    """Configuration, data sets and logging of this run."""
    if not args.config_file:
        raise UserError("--config-file is missing; give one, such as configs/deformable_detr.yaml.")
    cfg = setup_cfg(args.config_file, args.opts)
    if args.eval_only:
        cfg.DATASETS.TRAIN = ()  # evaluation needs none of its files
    elif not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a data set, or give --eval-only.")
    # Before the data sets are read, so that what was noticed stands in the log.
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="ddetr_d2")
    classes = register_datasets(cfg, evaluated_classes(cfg, args) if args.eval_only else None)
    cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES = infer_num_classes(cfg, classes)
    cfg.freeze()
    default_setup(cfg, args)
    logger.info(
        f"Running on {cfg.MODEL.DEVICE}, {torch.get_num_threads()} threads; "
        f"{cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES} classes."
    )
    return cfg


def evaluated_classes(cfg: CfgNode, args: argparse.Namespace) -> list[str] | None:
    """Class names of the weights that are going to be evaluated; None if they do not tell."""
    checkpointer = Checkpointer(nn.Module(), cfg.OUTPUT_DIR)
    if args.resume and checkpointer.has_checkpoint():
        return read_class_names(checkpointer.get_checkpoint_file())
    return read_class_names(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else None


def main(args: argparse.Namespace) -> None:
    with exit_on_user_error():
        cfg = setup(args)
        if args.eval_only:
            model = Trainer.build_model(cfg)
            checkpointer = Trainer.build_checkpointer(cfg, model, strict=True)
            if not cfg.MODEL.WEIGHTS and not (args.resume and checkpointer.has_checkpoint()):
                raise UserError("nothing to evaluate: MODEL.WEIGHTS is empty; give a checkpoint.")
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
            Trainer.test(cfg, prepare_for_inference(model))
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
            trainer.train()


def check_devices(args: argparse.Namespace) -> None:
    """Refuse more processes than there are GPUs before any of them starts."""
    present = torch.cuda.device_count()
    if args.num_gpus > max(present, 1):
        raise UserError(
            f"--num-gpus {args.num_gpus}, but this machine has {present} usable GPUs; "
            f"give --num-gpus {max(present, 1)}."
        )
    if args.num_machines > 1 and not present:
        raise UserError(f"--num-machines {args.num_machines} needs GPUs, but none is usable here.")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("--dist-url auto is for one machine; give tcp://HOST:PORT of the first.")


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    with exit_on_user_error():
        check_devices(args)
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as error:  # the worker has said why
        sys.exit(error.exit_code)
