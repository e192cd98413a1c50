"""The hooks: the best checkpoint of a run."""

import math

from ddetr_d2.engine.hooks import BestCheckpointer

from detectron2.engine.hooks import HookBase
from detectron2.engine.train_loop import TrainerBase


class Evaluation(HookBase):
    """Puts a figure every two iterations, and one after the end, as Detectron2's hook does."""

    def __init__(self, figures):
        self.figures = figures

    def after_step(self):
        if self.trainer.iter % 2 == 1 and self.trainer.iter + 1 < self.trainer.max_iter:
            self.trainer.storage.put_scalar("bbox/AP", self.figures[self.trainer.iter])

    def after_train(self):
        if self.trainer.iter >= self.trainer.max_iter:
            self.trainer.storage.put_scalar("bbox/AP", self.figures[-1])


class Run(TrainerBase):
    """Remembers what is saved, with the state at that time."""

    def __init__(self, figures, metric="bbox/AP"):
        super().__init__()
        self.figures = figures
        self.saved = []
        self.register_hooks([Evaluation(figures), BestCheckpointer(self, metric)])

    def run_step(self):
        pass

    def save(self, name, newest, iteration):
        assert name == "model_best" and not newest
        self.saved.append((iteration, self.state_dict()))


FIGURES = [0, 10.0, 0, 5.0, 0, 10.0, 0, math.nan, 0, 20.0, 15.0]


def test_saved_whenever_it_is_better_than_before():
    for last, expected in ((15.0, [1, 9]), (20.0, [1, 9]), (21.0, [1, 9, 11])):
        run = Run([*FIGURES[:-1], last])
        run.train(0, 12)
        assert [iteration for iteration, _ in run.saved] == expected
        assert [state["iteration"] for _, state in run.saved] == expected
        assert run.iter == 12


def test_a_resumed_run_knows_its_best():
    run = Run(FIGURES)
    run.train(0, 12)
    (_, first), (_, second) = run.saved
    for state, expected in ((first, [9]), (second, [])):
        run = Run(FIGURES)
        run.load_state_dict(state)
        run.train(2, 12)
        assert [iteration for iteration, _ in run.saved] == expected
    run = Run(FIGURES, "bbox/AP50")  # another metric starts anew
    run.load_state_dict(second)
    assert "hooks" not in run.state_dict()


def test_a_figure_of_an_earlier_iteration_is_not_of_these_weights():
    class Restored(HookBase):
        def before_train(self):
            self.trainer.storage.put_scalar("bbox/AP", 99.0, cur_iter=1)

    run = Run(FIGURES)
    run.register_hooks([Restored()])
    run.train(2, 12)
    assert [iteration for iteration, _ in run.saved] == [3, 5, 9]


def test_a_metric_that_never_comes(caplog):
    run = Run(FIGURES, "segm/AP")
    run.train(0, 4)
    assert not run.saved
    assert "segm/AP was never computed" in caplog.text
