#!/usr/bin/env python
"""Repeat, on its own, a training step whose numbers were not finite.

::

    python tools/replay_step.py output/not_finite_0001234.pth

A training that stops for such a step has written the file. The losses are printed, and where the
first bad value appears. A step of several processes is repeated by one, which takes the images of
all of them, part after part: the losses agree up to rounding.

Keys of the configuration can be changed after the file, for example ``SOLVER.AMP.ENABLED False`` to
see whether the step is finite without mixed precision.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence

from ddetr_d2.checkpoint.files import read_file
from ddetr_d2.engine.not_finite import (
    find_bad_module,
    images_of,
    read_batch,
    restore_random_states,
)
from ddetr_d2.engine.optimizer import build_clipping, build_optimizer
from ddetr_d2.engine.setup import setup_cfg
from ddetr_d2.engine.training_step import NotFiniteError, TrainingStep
from ddetr_d2.errors import UserError, exit_on_user_error

from detectron2.modeling import build_model
from tabulate import tabulate

ENTRIES = {"config", "model", "batch", "random_states", "iteration", "values"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 1 if the step is not finite again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", help="what the training has written")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args(argv)
    if not os.path.isfile(args.file):
        raise UserError(f"{args.file} does not exist.")
    content = read_file(args.file)
    missing = ENTRIES - set(content) if isinstance(content, dict) else ENTRIES
    if missing:
        raise UserError(
            f"{args.file} is no step of a training: it has no {', '.join(sorted(missing))}. Give "
            "a file not_finite_*.pth that train_net.py has written."
        )
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        config.write(content["config"])
        config.flush()
        cfg = setup_cfg(config.name, args.opts)
    model = build_model(cfg).train()
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise UserError(
            f"the model of {args.file} does not fit the configuration: "
            f"{' '.join(str(error).split())[:300]}. Change no keys of its sizes."
        ) from error
    step = TrainingStep(
        model,
        build_optimizer(cfg, model),
        build_clipping(cfg),
        mixed_precision=cfg.SOLVER.AMP.ENABLED,
    )
    micro_batches = read_batch(content)
    print(f"iteration {content['iteration']}, images {', '.join(images_of(micro_batches))}")
    restore_random_states(model, content)
    try:
        values, code = step(micro_batches), 0
    except NotFiniteError as error:
        values, code = error.values, 1
    then = content["values"]
    print(tabulate([(n, then.get(n), v) for n, v in values.items()], ("", "in training", "now")))
    if code:
        print(f"The first bad value: {find_bad_module(step, micro_batches).text}.")
    else:
        print("The step is finite now.")
    return code


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
