#!/usr/bin/env python
"""Train one detector of a comparison: train_net.py with evaluations at chosen iterations.

``metrics.json`` has, beside what every run writes, ``cpu_time``, the processor seconds of a
training step with the loading of its images. Evaluated is the moving average of the weights.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import hooks
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for train_net

from ddetr_d2.data import DetrDatasetMapper, load_records
from ddetr_d2.engine import Trainer
from ddetr_d2.engine.launch import launch
from ddetr_d2.engine.layout import launch_argument_parser
from ddetr_d2.engine.output_folder import output_folder

import train_net


class ProcessorTime(hooks.HookBase):
    """Measures each step in processor seconds of all threads; other programs do not count."""

    def before_step(self) -> None:
        self._start = time.process_time()

    def after_step(self) -> None:
        self.trainer.storage.put_scalar("cpu_time", time.process_time() - self._start)


class EvaluateAt(hooks.EvalHook):
    """Evaluates after the given numbers of iterations."""

    def __init__(self, iterations: Collection[int], evaluate: Callable[[], dict[str, Any]]):
        super().__init__(0, evaluate, eval_after_train=False)
        self._iterations = frozenset(iterations)

    def after_step(self) -> None:
        if self.trainer.iter + 1 in self._iterations:
            self._do_eval()


class ComparisonTrainer(Trainer):
    """The trainer, with evaluations where curves are to be compared."""

    def __init__(self, cfg: CfgNode, evaluate_at: Collection[int]):
        self._evaluate_at = evaluate_at
        super().__init__(cfg)

    def build_hooks(self) -> list[hooks.HookBase | None]:
        replacements = {
            hooks.EvalHook: EvaluateAt(self._evaluate_at, self.evaluate),
            # Every evaluation is written; the next one would take its place.
            hooks.PeriodicWriter: hooks.PeriodicWriter(
                self.build_writers(), period=math.gcd(20, *self._evaluate_at)
            ),
        }
        built = super().build_hooks()
        return [ProcessorTime(), *(replacements.get(type(hook), hook) for hook in built)]

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Batches, which are faster; all images are of the same size, so nothing is padded."""
        return build_detection_test_loader(
            load_records(dataset_name),
            mapper=DetrDatasetMapper(cfg, is_train=False),
            batch_size=16,
        )

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = self.test(self.cfg, self._trainer.ema.module)
        return self._last_eval_results


def main(args: argparse.Namespace) -> None:
    cfg = train_net.configure(args)
    with output_folder(cfg.OUTPUT_DIR):
        train_net.complete(cfg, args)
        trainer = ComparisonTrainer(cfg, args.evaluate_at)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


if __name__ == "__main__":
    parser = launch_argument_parser()
    parser.add_argument("--evaluate-at", type=int, nargs="+", default=[], metavar="ITERATIONS")
    launch(main, parser.parse_args())
