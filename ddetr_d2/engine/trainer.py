"""Detectron2's DefaultTrainer with the recipe of Deformable DETR (paper, appendix A.4)."""

import logging
import os
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.engine import DefaultTrainer
from detectron2.engine.hooks import HookBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from ..checkpoint import DetrCheckpointer
from ..data import DetrDatasetMapper, coco_set, load_records
from ..errors import UserError
from ..evaluation import CocoBoxEvaluator

CLIP_TYPES = ("full_model", "norm", "value")
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}


class Trainer(DefaultTrainer):
    """Trains and evaluates :class:`ddetr_d2.modeling.DeformableDETR`."""

    def __init__(self, cfg: CfgNode):
        # Detectron2's AMP scales losses on a GPU; on a CPU bfloat16 needs autocast alone.
        self._cpu_amp = cfg.SOLVER.AMP.ENABLED and torch.device(cfg.MODEL.DEVICE).type == "cpu"
        if self._cpu_amp:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.AMP.ENABLED = False
            cfg.freeze()
        super().__init__(cfg)
        write_metrics = self._trainer._write_metrics

        def write_after_one_copy(losses: dict[str, torch.Tensor], *args, **kwargs) -> None:
            # Detectron2 reads loss by loss, and each time waits for the GPU.
            values = torch.stack([*losses.values()]).detach().cpu()
            write_metrics(dict(zip(losses, values, strict=True)), *args, **kwargs)

        self._trainer._write_metrics = write_after_one_copy

    def build_hooks(self) -> list[HookBase]:
        # The hooks keep the checkpointer they are given, so ours has to be in place first.
        self.checkpointer = self.build_checkpointer(
            self.cfg, self._trainer.model, trainer=weakref.proxy(self)
        )
        return super().build_hooks()

    @staticmethod
    def build_checkpointer(cfg: CfgNode, model: nn.Module, **kwargs) -> DetrCheckpointer:
        """Checkpointer in OUTPUT_DIR that writes the names of the model's classes."""
        classes = None
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)[:1]:
            found = coco_set(name)
            known = MetadataCatalog.get(name).get("thing_classes")
            classes = found.class_names if found else known
        return DetrCheckpointer(model, cfg.OUTPUT_DIR, class_names=classes, **kwargs)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW with three learning rates: backbone, sampling offsets and reference points, rest.

        With SOLVER.CLIP_GRADIENTS.CLIP_TYPE ``full_model`` the norm of all gradients together is
        clipped; Detectron2's own types work as well.
        """
        solver = cfg.SOLVER
        if solver.OPTIMIZER not in OPTIMIZERS:
            raise UserError(
                f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; expected one of "
                + ", ".join(OPTIMIZERS)
            )

        def lr_factor(name: str) -> float:
            if name.startswith("backbone."):
                return solver.BACKBONE_MULTIPLIER
            if "sampling_offsets" in name or "reference_points" in name:
                return solver.SAMPLING_MULTIPLIER
            return 1.0

        parameters = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            lr_factor_func=lr_factor,
        )
        clip = solver.CLIP_GRADIENTS
        if clip.ENABLED and clip.CLIP_TYPE not in CLIP_TYPES:
            raise UserError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; expected one of "
                + ", ".join(CLIP_TYPES)
            )
        clips_each = clip.ENABLED and clip.CLIP_TYPE != "full_model"
        kwargs = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
        # A fused step removes the scale of mixed precision by itself, without a word to the host,
        # but Detectron2's clipping would come before.
        kwargs["fused"] = not (solver.AMP.ENABLED and clips_each)
        if solver.OPTIMIZER == "SGD":
            kwargs |= {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
        optimizer = OPTIMIZERS[solver.OPTIMIZER](parameters, **kwargs)
        if clips_each or not clip.ENABLED:
            return maybe_add_gradient_clipping(cfg, optimizer)

        def clip_total_norm(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in parameters if p.grad is not None], clip.NORM_TYPE
            )
            scale = getattr(optimizer, "grad_scale", None)  # by which the fused step will divide
            norm = norm if scale is None else norm / scale
            torch.nn.utils.clip_grads_with_norm_(parameters, clip.CLIP_VALUE, norm)

        optimizer.register_step_pre_hook(clip_total_norm)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        records = [record for name in cfg.DATASETS.TRAIN for record in load_records(name)]
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            records = filter_images_with_only_crowd_annotations(records)
        mapper = DetrDatasetMapper(cfg, is_train=True)
        return build_detection_train_loader(cfg, mapper=mapper, dataset=records)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_detection_test_loader(
            load_records(dataset_name),
            mapper=DetrDatasetMapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """COCO's AP of boxes, with ``TEST.DETECTIONS_PER_IMAGE`` detections an image."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        found = coco_set(dataset_name)
        if found is None:
            return COCOEvaluator(dataset_name, tasks=("bbox",), output_dir=folder)
        return CocoBoxEvaluator(
            dataset_name,
            found.annotations.as_coco(),
            found.category_ids,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            output_dir=folder,
        )

    def run_step(self) -> None:
        self._step_is_done = False
        with torch.autocast("cpu", torch.bfloat16, enabled=self._cpu_amp):
            super().run_step()
        self._step_is_done = True

    def train(self):
        """Train; a run that a user's mistake or Ctrl-C ends keeps its work in a checkpoint."""
        self._step_is_done = False
        # Detectron2 logs every exception with its traceback; a user's mistake needs none.
        logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)
        try:
            return super().train()
        except (UserError, KeyboardInterrupt):
            done = self.iter if self._step_is_done else self.iter - 1
            if done >= self.start_iter:
                self.iter = done
                self.checkpointer.save(f"model_{done:07d}", iteration=done)
                logging.getLogger(__name__).info("Stopped; continue with --resume.")
            raise


def _is_no_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))
