"""What a training does after a step, beyond Detectron2's own hooks."""

import logging
import math
from typing import Any

from detectron2.engine.hooks import HookBase

from ..checkpoint import DetrCheckpointer
from . import heartbeat


class PeriodicSaving(HookBase):
    """Writes ``model_0000099.pth`` and so on every ``period`` steps, and ``model_final.pth``."""

    def __init__(self, period: int):
        self._period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0:
            self.trainer.save(f"model_{done - 1:07d}", pending=True)
        if done == self.trainer.max_iter:
            self.trainer.save("model_final", pending=True)


class BestCheckpointer(HookBase):
    """Write ``model_best.pth`` whenever a metric is higher than ever before in the run.

    Unlike Detectron2's hook of this name it is part of the checkpoint: a resumed run knows its
    best. It comes after the hook that evaluates, and needs no period: it acts in the iterations
    in which the metric is computed. ``last_checkpoint`` does not name the best.
    """

    NAME = "model_best"

    def __init__(self, checkpointer: DetrCheckpointer, metric: str = "bbox/AP"):
        """
        Args:
            checkpointer: what writes the checkpoint.
            metric: name of the figure, as in ``metrics.json``.
        """
        self.checkpointer = checkpointer
        self.metric = metric
        self.best: float | None = None
        self.iteration: int | None = None

    def after_step(self) -> None:
        self._save_if_best(self.trainer.iter)

    def after_train(self) -> None:
        # Detectron2 evaluates once more after the last step, when its counter is one further.
        if self.trainer.iter >= self.trainer.max_iter:
            self._save_if_best(self.trainer.iter - 1)
            if self.best is None:
                logging.getLogger(__name__).warning(
                    f"{self.metric} was never computed or never finite; no best checkpoint."
                )

    def _save_if_best(self, done: int) -> None:
        value, iteration = self.trainer.storage.latest().get(self.metric, (math.nan, -1))
        if iteration != self.trainer.iter or not math.isfinite(value):
            return
        if self.best is not None and value <= self.best:
            return
        # First, so that the checkpoint knows it is the best.
        self.best, self.iteration = value, done
        counter, self.trainer.iter = self.trainer.iter, done  # goes into the checkpoint
        try:
            with heartbeat.writing():
                self.checkpointer.save(self.NAME, newest=False, iteration=done)
        finally:
            self.trainer.iter = counter
        logging.getLogger(__name__).info(
            f"{self.metric} {value:.4f} is the best so far, kept as {self.NAME}.pth."
        )

    def state_dict(self) -> dict[str, Any]:
        if self.best is None:
            return {}
        return {"metric": self.metric, "best": self.best, "iteration": self.iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["metric"] == self.metric:  # else it was changed, and the best starts anew
            self.best, self.iteration = state_dict["best"], state_dict["iteration"]
