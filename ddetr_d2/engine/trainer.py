"""Detectron2's DefaultTrainer with the recipe of Deformable DETR (paper, appendix A.4)."""

import contextlib
import logging
import os
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, verify_results
from detectron2.utils import comm
from torch import nn

from ..checkpoint import DetrCheckpointer
from ..data import DetrDatasetMapper, coco_set, load_records
from ..data.loader import TrainLoader, build_train_loader
from ..errors import UserError
from ..evaluation import CocoBoxEvaluator
from ..main_process import on_main_process
from ..modeling import test_time_augmentation as tta
from . import heartbeat
from .hooks import BestCheckpointer, PeriodicSaving
from .not_finite import explain
from .optimizer import build_clipping, build_optimizer
from .output_folder import check_disk_space, checkpoint_bytes
from .replicas import distributed, moving_average, same_everywhere
from .run_state import (
    RunStorage,
    random_state,
    restore_random_state,
    restore_storage,
    storage_state,
    torch_random_state,
)
from .stopping import RunStopped, StopRequest
from .training_step import Batch, NotFiniteError, TrainingStep, unwrapped

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains and evaluates a :class:`ddetr_d2.modeling.SetDetector`.

    :meth:`train` is the loop, :class:`TrainingStep` what happens in each of its steps. A run that
    was interrupted and resumed is the same run as one that was not: see :meth:`save`.
    """

    def __init__(self, cfg: CfgNode):
        if cfg.TEST.AUG.ENABLED:
            tta.check(cfg)
        TrainerBase.__init__(self)  # DefaultTrainer's parts are built here, in its order
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._loader = self.build_train_loader(cfg)
        self._trainer = TrainingStep(
            distributed(model),
            optimizer,
            build_clipping(cfg),
            mixed_precision=cfg.SOLVER.AMP.ENABLED,
            ema=moving_average(cfg, model),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = self.build_checkpointer(cfg, model, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._resumed: dict[str, Any] = {}  # what save() adds to a checkpoint
        self._skipped = 0  # steps left out in a row
        self._last_eval_results: dict[str, Any] | None = None
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[hooks.HookBase | None]:
        """Detectron2's hooks. A checkpoint comes before the evaluation, which might fail."""
        cfg = self.cfg
        main = comm.is_main_process()
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            PeriodicSaving(cfg.SOLVER.CHECKPOINT_PERIOD),
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self.evaluate),
            BestCheckpointer(self.checkpointer) if main and cfg.SOLVER.KEEP_BEST else None,
            hooks.PeriodicWriter(self.build_writers()) if main else None,
        ]

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue from the last checkpoint in OUTPUT_DIR, or load MODEL.WEIGHTS."""
        content = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed_from:
            self.start_iter = self.iter + 1
            self._resumed = content.get("run", {})
        on_main_process(self._check_disk_space)

    def _check_disk_space(self) -> None:
        solver = self.cfg.SOLVER
        size = checkpoint_bytes(
            unwrapped(self.model), self.optimizer, copies=int(solver.EMA.ENABLED)
        )
        check_disk_space(
            self.cfg.OUTPUT_DIR,
            size,
            iterations=range(self.start_iter, self.max_iter),
            period=solver.CHECKPOINT_PERIOD,
            keep=solver.CHECKPOINTS_KEPT,
            best=solver.KEEP_BEST,
        )

    def train(self) -> dict[str, Any] | None:
        """Train up to ``max_iter``.

        Returns:
            the results of the last evaluation.

        Raises:
            RunStopped: a signal or the time limit asked for it; a checkpoint has been written.
            UserError: something the user can mend.
        """
        logger.info("Starting training from iteration %d", self.start_iter)
        self.iter = self.start_iter
        self._trainer.model.train()
        with (
            RunStorage(self.start_iter) as self.storage,
            StopRequest(self.cfg.SOLVER.MAX_HOURS) as stop,
        ):
            self.before_train()
            try:
                self._continue_run()
                # The workers end with the iteration, also when a step fails.
                with contextlib.closing(iter(self._loader)) as batches:
                    for iteration in range(self.start_iter, self.max_iter):
                        self.iter = iteration
                        self.before_step()
                        with heartbeat.step():
                            self._run_step(batches)
                        self.after_step()
                        if stop.requested():
                            self.save(f"model_{self.iter:07d}")
                            logger.info("Stopped by %s; continue with --resume.", stop.reason)
                            raise RunStopped
                self.iter = self.max_iter
                self.after_train()
            except BaseException:
                for hook in self._hooks:
                    if isinstance(hook, hooks.PeriodicWriter):
                        hook.after_train()
                raise
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def _run_step(self, batches: Iterator[list[Batch]]) -> None:
        start = time.perf_counter()
        together = comm.get_world_size() == 1  # else the others know nothing of the error
        try:
            micro_batches = next(batches)
            heartbeat.beat()
            together = True
            self._loader.unreadable.agree(comm.all_gather)
        except UserError:
            if together:
                self._save_before()
            raise
        data_time = time.perf_counter() - start
        before = torch_random_state()
        try:
            values = self._trainer(micro_batches)
        except NotFiniteError as error:
            self._skipped += 1
            if self._skipped > self.cfg.SOLVER.MAX_SKIPPED_STEPS:
                explained = explain(
                    error, self.cfg, self._trainer, micro_batches, before, self.iter
                )
                self._save_before()
                raise explained from error
            logger.warning(
                "Iteration %d is left out, its numbers are not finite: %s", self.iter, error
            )
            return
        self._skipped = 0
        if comm.is_main_process():
            self.storage.put_scalar("data_time", data_time)
            self.storage.put_scalar("gradient_norm", values.pop("gradient_norm"))
            self.storage.put_scalars(total_loss=sum(values.values()), **values)

    def _save_before(self) -> None:
        """Keep what was done until the step that failed."""
        if self.iter > self.start_iter:
            self.iter -= 1
            self.save(f"model_{self.iter:07d}")
            logger.info("Stopped; continue with --resume.")

    def save(self, name: str, pending: bool = False) -> None:
        """Write a checkpoint with everything that the run is; all processes call this together.

        Weights, optimiser and schedule are Detectron2's part. Added are the place in the stream of
        images, the random generators of every process and the figures not written yet. Resumed
        from it, a run makes the same steps that it would have made.

        Args:
            name: of the file, without its ending.
            pending: the hooks after :class:`PeriodicSaving` have not been called for this step.

        Raises:
            UserError: it cannot be written.
        """
        random_states = comm.gather(random_state())

        def write() -> None:
            run = {
                "random_states": random_states,
                "threads": torch.get_num_threads(),
                "loader": self._loader.state_dict(self.iter + 1),
                "storage": storage_state(self.storage, self._metrics_file),
                "pending": pending,
                "skipped": self._skipped,
            }
            with heartbeat.writing():
                self.checkpointer.save(name, iteration=self.iter, run=run)
                if self._trainer.ema is not None and name == "model_final":
                    averaged = self.build_checkpointer(self.cfg, self._trainer.ema.module)
                    averaged.save("model_final_ema", newest=False, iteration=self.iter)

        on_main_process(write)

    def _continue_run(self) -> None:
        """Restore what :meth:`save` has added to the checkpoint that is resumed."""
        run = self._resumed
        if not run:
            self._loader.start_from(self.start_iter)
            logger.info("The seed of the run is %d.", self._loader.seed)
            return
        self._loader.load_state_dict(run["loader"])
        self._skipped = run["skipped"]
        logger.info("The run goes on with its seed, %d.", self._loader.seed)
        if comm.is_main_process():
            restore_storage(run["storage"], self.storage, self._metrics_file)
        processes, threads = len(run["random_states"]), run["threads"]
        if processes == comm.get_world_size():
            restore_random_state(run["random_states"][comm.get_rank()])
        else:
            logger.warning(
                "The run was started with %d processes and goes on with %d: its images are the "
                "same, its dropout and the rounding of its sums are not.",
                processes,
                comm.get_world_size(),
            )
        if threads != torch.get_num_threads() and not self.cfg.MODEL.DEVICE.startswith("cuda"):
            logger.warning(
                "The run was started with %d threads and goes on with %d: sums are rounded "
                "otherwise (OMP_NUM_THREADS).",
                threads,
                torch.get_num_threads(),
            )
        if run["pending"]:
            self.iter = self.storage.iter = self.start_iter - 1
            saving = [type(hook) for hook in self._hooks].index(PeriodicSaving)
            for hook in self._hooks[saving + 1 :]:
                hook.after_step()

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the model, and the moving average of its weights if there is one.

        With ``TEST.AUG.ENABLED`` that is done once more with test-time augmentation after the
        last step.

        Random generators are left as they were: what an evaluation draws from them depends on the
        number of data workers.

        Raises:
            UserError: a test image cannot be read; the training until then is in a checkpoint.
        """
        before = random_state()
        try:
            return self._evaluate()
        except UserError as error:
            kept = "What was trained is in a checkpoint: mend"
            if self.iter < self.max_iter and comm.get_world_size() == 1:
                self.save(f"model_{self.iter:07d}", pending=True)
            elif self.iter < self.max_iter:  # the other processes know nothing of the error
                kept = "Mend"
            raise UserError(
                f"the evaluation failed: {error}. {kept} the test set and continue with --resume"
            ) from error
        finally:
            restore_random_state(before)

    def _evaluate(self) -> dict[str, Any]:
        augmented = self.cfg.TEST.AUG.ENABLED and self.iter >= self.max_iter
        model = same_everywhere(unwrapped(self.model))
        results = dict(self.test(self.cfg, model))
        if augmented:
            results |= self.test_with_TTA(self.cfg, model)
        if self._trainer.ema is not None:
            logger.info("Evaluation of the moving average of the weights:")
            averaged = same_everywhere(self._trainer.ema.module)
            evaluators = [
                self.build_evaluator(self.cfg, name, "inference_ema")
                for name in self.cfg.DATASETS.TEST
            ]
            results["ema"] = dict(self.test(self.cfg, averaged, evaluators))
            if augmented:
                results["ema"] |= self.test_with_TTA(self.cfg, averaged, "inference_ema_TTA")
        self._last_eval_results = results
        return results

    @classmethod
    def test_with_TTA(
        cls, cfg: CfgNode, model: nn.Module, folder: str = "inference_TTA"
    ) -> dict[str, Any]:
        """Evaluate with test-time augmentation (TEST.AUG).

        Returns:
            what :meth:`test` returns, with ``_TTA`` added to the keys.
        """
        logger.info("Evaluation with test-time augmentation:")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        model = tta.SetDetectorWithTTA(cfg, model)
        results = cls.test(tta.keep_original_size(cfg), model, evaluators)
        return {f"{key}_TTA": value for key, value in results.items()}

    @property
    def _metrics_file(self) -> str:
        return os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")

    @staticmethod
    def build_checkpointer(cfg: CfgNode, model: nn.Module, **kwargs: Any) -> DetrCheckpointer:
        """Checkpointer in OUTPUT_DIR that writes the names of the model's classes and ``cfg``."""
        classes = None
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)[:1]:
            found = coco_set(name)
            known = MetadataCatalog.get(name).get("thing_classes")
            classes = found.class_names if found else known
        return DetrCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            class_names=classes,
            keep=cfg.SOLVER.CHECKPOINTS_KEPT,
            config=cfg.dump(),
            **kwargs,
        )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`ddetr_d2.engine.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """The images of the steps, this process's part of them."""
        records = [record for name in cfg.DATASETS.TRAIN for record in load_records(name)]
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            records = filter_images_with_only_crowd_annotations(records)
        return build_train_loader(
            cfg,
            records,
            DetrDatasetMapper(cfg, is_train=True),
            seed=comm.shared_random_seed() if cfg.SEED < 0 else cfg.SEED,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> heartbeat.EvaluatedBatches:
        """This process's part of the images of an evaluation, one a batch."""
        loader = build_detection_test_loader(
            load_records(dataset_name),
            mapper=DetrDatasetMapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        return heartbeat.EvaluatedBatches(loader)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, folder: str = "inference"
    ) -> DatasetEvaluator:
        """COCO's AP of boxes, with ``TEST.DETECTIONS_PER_IMAGE`` detections an image.

        Detections are written to ``folder`` in OUTPUT_DIR.
        """
        folder = os.path.join(cfg.OUTPUT_DIR, folder, dataset_name)
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
