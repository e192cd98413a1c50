"""Write weights in the formats of other implementations, whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from .names import (
    REFERENCE,
    REFERENCE_DETR,
    State,
    is_detr,
    is_two_stage,
    join_heads,
    rename,
    without_counters,
)
from .transformers import to_transformers
from .transformers_config import preprocessor_config
from .whole_files import save_whole


def to_reference(state: Mapping[str, Tensor]) -> State:
    """Weights under the names of the reference implementation, its copies of heads included.

    Args:
        state: ``state_dict()`` of a :class:`ddetr_d2.modeling.SetDetector`.
    """
    if is_detr(state):
        return rename(without_counters(state), REFERENCE_DETR)
    rest, heads = join_heads(without_counters(state))
    converted = rename(rest, REFERENCE)
    two_stage = is_two_stage(state)
    refined = len(heads) > 1 + two_stage
    if not refined:
        layers = {name.split(".")[3] for name in state if name.startswith("transformer.decoder.la")}
        heads = heads[:1] * len(layers) + heads[1:]
    for number, head in enumerate(heads):
        for name, tensor in head.items():
            kind, _, within = name.partition(".")
            converted[f"{kind}.{number}.{within}"] = tensor
            if two_stage or (refined and kind == "bbox_embed"):
                converted[f"transformer.decoder.{kind}.{number}.{within}"] = tensor
    return converted


def write_checkpoint(path: str, state: Mapping[str, Tensor], **entries: Any) -> None:
    """Write ``state`` as the entry ``model`` of a file of torch.save, beside other ``entries``.

    Raises:
        UserError: if it cannot be written.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}  # shared tensors stay shared

    def copied(tensor: Tensor) -> Tensor:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if key not in copies:
            copies[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return copies[key]

    save_whole({"model": {name: copied(x) for name, x in state.items()}, **entries}, path)


def write_transformers(
    folder: str, state: Mapping[str, Tensor], cfg: CfgNode, class_names: Sequence[str] | None = None
) -> None:
    """Write a folder that ``from_pretrained`` of Hugging Face transformers reads.

    Args:
        folder: an existing folder.
        state: ``state_dict()`` of a :class:`ddetr_d2.modeling.SetDetector`.
        cfg: the configuration that the model was built with.
        class_names: name of each class; numbered where absent.

    Raises:
        UserError: if transformers has no such model.
    """
    weights, config = to_transformers(state, cfg, class_names)
    weights_file = os.path.join(folder, "model.safetensors")
    save_file(weights, weights_file, metadata={"format": "pt"})
    for name, content in (
        ("config.json", config),
        ("preprocessor_config.json", preprocessor_config(cfg)),
    ):
        with open(os.path.join(folder, name), "w") as file:
            json.dump(content, file, indent=2)
    shutil.copymode(file.name, weights_file)  # safetensors makes it readable for its owner alone


class Output:
    """A file or folder that appears at ``path`` complete or not at all.

    Used as a context manager: write to what it gives; it is moved to ``path`` at the end, unless
    there was an exception.
    """

    def __init__(self, path: str, is_folder: bool, overwrite: bool):
        """
        Args:
            path: where it is to be.
            is_folder: the output is a folder.
            overwrite: replace a file, or the files of the same names in a folder.

        Raises:
            UserError: if something is there already.
        """
        self.path = os.path.abspath(path)
        self.is_folder = is_folder
        if os.path.exists(path) and os.path.isdir(path) != is_folder:
            kind = "folder" if is_folder else "file"
            raise UserError(f"{path} is there already and no {kind}; give another name.")
        taken = os.path.exists(path) and not (is_folder and not os.listdir(path))
        if taken and not overwrite:
            raise UserError(f"{path} is there already; give another name, or --overwrite.")

    def __enter__(self) -> str:
        parent = os.path.dirname(self.path)
        try:
            os.makedirs(parent, exist_ok=True)
            self._work = tempfile.mkdtemp(prefix=".convert_", dir=parent)
        except OSError as error:
            raise UserError(f"cannot write to {parent}: {error.strerror}") from error
        return self._work if self.is_folder else os.path.join(self._work, "weights")

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None and self.is_folder:
                os.makedirs(self.path, exist_ok=True)
                for name in os.listdir(self._work):
                    os.replace(os.path.join(self._work, name), os.path.join(self.path, name))
            elif kind is None:
                os.replace(os.path.join(self._work, "weights"), self.path)
        finally:
            shutil.rmtree(self._work, ignore_errors=True)
