"""A program for tests: something done by two processes, which are forked to spare the imports.

::

    two_processes.py train ARGUMENTS OF train_net.py
    two_processes.py nan_image ARGUMENTS OF train_net.py
    two_processes.py nan_gradient ARGUMENTS OF train_net.py
    two_processes.py hanging_evaluation ARGUMENTS OF train_net.py
    two_processes.py steps FOLDER

It is to be started by tests.programs: computing in a process that was forked from one that has
computed can wait for ever.
"""

import importlib.util
import itertools
import sys
import time
from pathlib import Path

from ddetr_d2.engine.launch import launch
from ddetr_d2.engine.layout import launch_argument_parser
from ddetr_d2.engine.replicas import distributed
from ddetr_d2.engine.trainer import Trainer

import torch
from detectron2.utils import comm

from tests.conftest import MEMBERS, ROOT
from tests.engine.steps import build, build_step, gradients, images

# Numbers of boxes in the images of two steps; in the second, those of process 1 have none.
BATCHES = ((2, 0, 3, 1), (1, 2, 0, 0))


def two_steps(variant: str, micro_batches: int = 1) -> list[tuple[dict, dict]]:
    """Losses and gradients of two steps, by this process with its part of the batches."""
    # Float64: rounding must not decide between two equally good matches.
    cfg, model = build(variant, "SOLVER.CLIP_GRADIENTS.ENABLED", "False", "SOLVER.BASE_LR", "0.0")
    step = build_step(cfg, distributed(model.double()))
    share = 4 // comm.get_world_size()
    size = share // micro_batches
    results = []
    for boxes in BATCHES:
        batch = images(*boxes)[comm.get_rank() * share :][:share]
        values = step([batch[i : i + size] for i in range(0, share, size)])
        results.append((values, gradients(step.model)))
    return results


def steps(args) -> None:
    """Write the results of all variants, and with two micro-batches of one, to a folder."""
    results = {variant: two_steps(variant) for variant in MEMBERS}
    results["accumulated"] = two_steps(MEMBERS[0], micro_batches=2)
    torch.save(results, Path(args.opts[0], f"{comm.get_rank()}.pth"))


class NanImage(Trainer):
    """The first image of rank 1's second micro-batch in iteration 1 has no finite pixel."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        passes = itertools.count()

        def spoil(module, inputs):
            if next(passes) == 3:
                record = inputs[0][0]
                record["image"] = torch.full_like(record["image"], torch.nan, dtype=torch.float32)

        if comm.get_rank() == 1:
            model.register_forward_pre_hook(spoil)
        return model


class NanGradient(Trainer):
    """The losses are finite, and one gradient of rank 1 is not."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        if comm.get_rank() == 1:
            parameter = model.transformer.encoder.layers[0].ffn.linear2.bias
            parameter.register_hook(lambda gradient: gradient * torch.nan)
        return model


class HangingEvaluation(Trainer):
    """Rank 1 never finishes an image of an evaluation."""

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)

        def hang(module, inputs):
            if not module.training:
                time.sleep(600)

        if comm.get_rank() == 1:
            model.register_forward_pre_hook(hang)
        return model


TRAINERS = {
    "train": Trainer,
    "nan_image": NanImage,
    "nan_gradient": NanGradient,
    "hanging_evaluation": HangingEvaluation,
}


def main() -> None:
    what, *arguments = sys.argv[1:]
    args = launch_argument_parser().parse_args(["--num-processes", "2", *arguments])
    if what in TRAINERS:
        spec = importlib.util.spec_from_file_location("train_net", ROOT / "train_net.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.Trainer = TRAINERS[what]
        launch(module.main, args, start_method="fork")
    else:
        launch(steps, args, start_method="fork")


if __name__ == "__main__":
    main()
