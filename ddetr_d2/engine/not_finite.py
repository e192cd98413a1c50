"""Where NaN and infinity come from, and a file from which the step is repeated on its own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..checkpoint.whole_files import save_whole
from .training_step import Batch, TrainingStep, unwrapped


def find_bad_module(step: TrainingStep, micro_batches: Sequence[Batch]) -> str:
    """Repeat a step of this process and tell, in words, where the first bad value appears.

    The generators have to be in the state that they had before the step, so that dropout is the
    same. The model does not change, but for its gradients.
    """
    model = unwrapped(step.model)
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            return f"the weights of {name}"
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    bad: list[str] = []

    def check(name: str, tensors: Callable[..., Iterator[Tensor]]) -> Callable[..., None]:
        """A hook that notes the name if it is the first with a bad tensor."""

        def hook(*arguments: Any) -> None:
            if not bad and not all(map(_is_finite, tensors(*arguments))):
                bad.append(name)

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
            return f"the output of {bad[0]}"
        names = [name for name, loss in losses.items() if not _is_finite(loss)]
        if names:
            return f"the loss {names[0]}"
        model.zero_grad()
        sum(losses.values()).backward()
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    if bad:
        return f"the gradient of {bad[0]}"
    return "nothing that can be found again: the step is finite when it is repeated"


def images_of(micro_batches: Sequence[Batch]) -> list[str]:
    """The files of a batch's images."""
    return [str(x.get("file_name", x.get("image_id"))) for batch in micro_batches for x in batch]


def write_step(
    path: str,
    cfg: CfgNode,
    step: TrainingStep,
    micro_batches: Sequence[Batch],
    random_state: dict[str, Any],
    **entries: Any,
) -> None:
    """Write what a step needs to be repeated: configuration, weights, batch and generators.

    Args:
        path: the file; ``tools/replay_step.py`` reads it.
        cfg: the configuration.
        step: its model has the weights.
        micro_batches: of this process.
        random_state: of PyTorch's generators before the step.
        entries: what else is to be kept.

    Raises:
        UserError: the file cannot be written.
    """
    content = {
        "config": cfg.dump(),
        "model": {name: x.cpu() for name, x in unwrapped(step.model).state_dict().items()},
        "batch": [[_plain(record) for record in batch] for batch in micro_batches],
        "random_state": random_state,
        **entries,
    }
    save_whole(content, path)


def read_batch(content: dict[str, Any]) -> list[Batch]:
    """The batch of a file that :func:`write_step` wrote."""
    return [[_mapped(record) for record in batch] for batch in content["batch"]]


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
