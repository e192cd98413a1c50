"""A step whose numbers are not finite: where they go wrong, and a file that repeats the step.

Of a run of several processes the whole step is written, all processes' micro-batches one after the
other, so that a single process can repeat it.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checkpoint.whole_files import save_whole
from ..errors import UserError
from ..main_process import on_main_process
from . import heartbeat
from .run_state import restore_torch_random_state
from .training_step import Batch, NotFiniteError, TrainingStep, unwrapped

NOWHERE = 4


class BadPlace(NamedTuple):
    """Where in a step of one process the first bad value appears; the smaller comes earlier.

    Attributes:
        stage: weights, forward pass, losses, backward pass, or :data:`NOWHERE`.
        number: parameters, modules or losses of the stage that were passed before.
        text: the same in words.
    """

    stage: int
    number: int
    text: str


def explain(
    error: NotFiniteError,
    cfg: CfgNode,
    step: TrainingStep,
    micro_batches: Sequence[Batch],
    random_state: dict[str, Any],
    iteration: int,
) -> UserError:
    """Find where the numbers go wrong, and write a file from which to repeat the step.

    All processes of a run call this together, and get the same message. The model and the random
    generators are left as they were before the step.

    Args:
        error: what the step has raised.
        cfg: the configuration; the file is written to its OUTPUT_DIR.
        step: has the model.
        micro_batches: of this process.
        random_state: of PyTorch's generators in this process, before the step.
        iteration: number of the step.

    Returns:
        the error to raise.

    Raises:
        UserError: the file cannot be written.
    """
    restore_torch_random_state(random_state)
    place = find_bad_module(step, micro_batches)
    restore_torch_random_state(random_state)
    heartbeat.beat()
    part = {
        "place": place,
        "batch": [[_plain(record) for record in batch] for batch in micro_batches],
        "random_state": random_state,
    }
    parts = comm.gather(part)

    def write() -> str:
        first = min(range(len(parts)), key=lambda rank: parts[rank]["place"])
        where = parts[first]["place"].text
        if len(parts) > 1 and parts[first]["place"].stage != NOWHERE:
            where += f" of rank {first}"
        batch = [micro_batch for part in parts for micro_batch in part["batch"]]
        path = os.path.join(cfg.OUTPUT_DIR, f"not_finite_{iteration:07d}.pth")
        content = {
            "config": cfg.dump(),
            "model": {name: x.cpu() for name, x in unwrapped(step.model).state_dict().items()},
            "batch": batch,
            "random_states": [part["random_state"] for part in parts],
            "iteration": iteration,
            "values": error.values,
        }
        with heartbeat.writing():
            save_whole(content, path)
        return (
            f"training has diverged: iteration {iteration} gives numbers that are not finite, "
            f"first in {where}, for the images {', '.join(images_of(batch))}. Lower "
            "SOLVER.BASE_LR, clip gradients more (SOLVER.CLIP_GRADIENTS), turn SOLVER.AMP.ENABLED "
            "off, or leave such steps out (SOLVER.MAX_SKIPPED_STEPS). The step is repeated by "
            f"tools/replay_step.py {path}"
        )

    return UserError(on_main_process(write))


def find_bad_module(step: TrainingStep, micro_batches: Sequence[Batch]) -> BadPlace:
    """Repeat a step of this process and tell where the first bad value appears.

    The generators have to be in the state that they had before the step, so that dropout is the
    same. The model does not change, but for its gradients.
    """
    model = unwrapped(step.model)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if not _is_finite(parameter):
            return BadPlace(0, number, f"the weights of {name}")
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    bad: list[tuple[int, str]] = []
    passed = itertools.count()

    def check(name: str, tensors: Callable[..., Iterator[Tensor]]) -> Callable[..., None]:
        """A hook that notes the name if it is the first with a bad tensor."""

        def hook(*arguments: Any) -> None:
            number = next(passed)
            if not bad and not all(map(_is_finite, tensors(*arguments))):
                bad.append((number, name))

        return hook

    handles = [
        module.register_forward_hook(check(name, lambda module, inputs, output: _tensors(output)))
        for name, module in model.named_modules()
        if name
    ]
    # Called in the order of the backward pass.
    handles += [
        parameter.register_post_accumulate_grad_hook(
            check(name, lambda parameter: _tensors(parameter.grad))
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        losses = step.forward(micro_batches)
        if bad:
            number, name = bad[0]
            return BadPlace(1, number, f"the output of {name}")
        for number, (name, loss) in enumerate(losses.items()):
            if not _is_finite(loss):
                return BadPlace(2, number, f"the loss {name}")
        model.zero_grad()
        torch.stack([*losses.values()]).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    if bad:
        number, name = bad[0]
        return BadPlace(3, number, f"the gradient of {name}")
    return BadPlace(NOWHERE, 0, "an unknown place (the step is finite when it is repeated)")


def images_of(micro_batches: Sequence[Batch]) -> list[str]:
    """The files of a batch's images."""
    return [str(x.get("file_name", x.get("image_id"))) for batch in micro_batches for x in batch]


def read_batch(content: dict[str, Any]) -> list[Batch]:
    """The micro-batches of a file that :func:`explain` wrote, those of rank 0 first."""
    return [[_mapped(record) for record in batch] for batch in content["batch"]]


def restore_random_states(model: nn.Module, content: dict[str, Any]) -> RemovableHandle:
    """Let each forward pass of a step begin with the random numbers that it had.

    The passes are those of :func:`read_batch`, in this order and as often as liked. Each process
    had generators of its own; they are restored before the first of its micro-batches.

    Args:
        model: of the step.
        content: of the file.

    Returns:
        a handle whose ``remove()`` ends it.
    """
    states = content["random_states"]
    each = len(content["batch"]) // len(states)
    passes = itertools.cycle(range(len(content["batch"])))

    def hook(module: nn.Module, inputs: Any) -> None:
        number = next(passes)
        if number % each == 0:
            restore_torch_random_state(states[number // each])

    return model.register_forward_pre_hook(hook)


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """A mapped record without objects that a file would need code for."""
    instances = record["instances"]
    return {
        "image": record["image"],
        "file_name": str(record.get("file_name", "")),
        "image_size": list(instances.image_size),
        "gt_boxes": instances.gt_boxes.tensor,
        "gt_classes": instances.gt_classes,
    }


def _mapped(record: dict[str, Any]) -> dict[str, Any]:
    instances = Instances(tuple(record["image_size"]))
    instances.gt_boxes = Boxes(record["gt_boxes"])
    instances.gt_classes = record["gt_classes"]
    return {"image": record["image"], "file_name": record["file_name"], "instances": instances}


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
