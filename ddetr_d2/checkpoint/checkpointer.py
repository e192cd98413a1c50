"""Detectron2's checkpointer with class names inside and with strict loading."""

import logging
import os
import pickle
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from ..errors import UserError

# Parameters whose shape follows the number of classes.
_CLASS_HEAD = "class_embed"
# Parts of a backbone that ImageNet weights do not have.
_BEYOND_IMAGENET = ("conv2_offset", "fpn_", "top_block", "num_batches_tracked")
# What reading a damaged or foreign file raises.
_DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    pickle.UnpicklingError,
)


class DetrCheckpointer(DetectionCheckpointer):
    """Save class names along with the weights; refuse weights that do not fit.

    A file with weights of the backbone only (ImageNet) loads into the backbone. A file with a
    detector must hold every parameter of the model in its shape. Only the class heads may differ
    in the number of classes, when training starts from a detector of other classes.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: list[str] | None = None,
        strict: bool = False,
        **kwargs: Any,
    ):
        """
        Args:
            model: the detector.
            save_dir: folder of the checkpoints written.
            class_names: written into each checkpoint as ``class_names``.
            strict: every parameter must be in the file, as evaluation needs it.
            kwargs: see :class:`DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **kwargs)
        self.class_names = class_names
        self.strict = strict
        self._source = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth; see :meth:`DetectionCheckpointer.save`."""
        if self.class_names:
            kwargs["class_names"] = list(self.class_names)
        super().save(name, **kwargs)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load the file at ``path``.

        Raises:
            UserError: if the file is missing, damaged or does not fit the model.
        """
        self._source = path
        if path:
            _local_path(path)
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            loaded = super()._load_file(filename)
        except _DAMAGED as error:
            raise _damaged(self._source, error) from error
        weights = loaded.get("model")
        if not isinstance(weights, dict) or not any(hasattr(x, "shape") for x in weights.values()):
            raise UserError(
                f"{self._source} holds no weights; name a checkpoint (.pth) or a Detectron2 "
                "backbone (.pkl)."
            )
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        names_in_file = set(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        missing = list(incompatible.missing_keys)
        wrong = {name: shapes for name, *shapes in incompatible.incorrect_shapes}
        missing = [name for name in missing if name not in wrong]
        if self.strict or any(name.startswith("transformer.") for name in names_in_file):
            parameters = {name for name, _ in self.model.named_parameters()}
            missing = [name for name in missing if name in parameters]
        else:
            missing = [
                name
                for name in missing
                if name.startswith("backbone.") and not any(x in name for x in _BEYOND_IMAGENET)
            ]
        if not self.strict:
            classes = [name for name in wrong if _CLASS_HEAD in name]
            if classes and len(classes) == len(wrong):
                logging.getLogger(__name__).warning(
                    f"{self._source} was trained on another number of classes: the "
                    f"{len(classes)} tensors of the class heads start anew."
                )
                wrong = {}
        if missing or wrong:
            raise UserError(self._misfit(missing, wrong))
        return incompatible

    def _misfit(self, missing: list[str], wrong: dict[str, list[tuple[int, ...]]]) -> str:
        parts = []
        if missing:
            parts.append(f"{len(missing)} parameters are missing, the first {missing[0]}")
        if wrong:
            name, (in_file, in_model) = next(iter(wrong.items()))
            parts.append(
                f"{len(wrong)} differ in shape, the first {name}: {list(in_file)} in the file, "
                f"{list(in_model)} in the model"
            )
        return (
            f"{self._source} does not fit this model: {'; '.join(parts)}. Use the configuration "
            "that the weights were trained with, or other MODEL.WEIGHTS."
        )


def _damaged(path: str, error: Exception) -> UserError:
    if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
        reason = "it holds other Python objects than tensors and plain values"
    else:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UserError(
        f"{path} cannot be read as weights ({reason}); the file is damaged or of another kind. "
        "Copy or download it again."
    )


def _local_path(path: str) -> str:
    """Path of the file on this machine, after a download where it is a URL."""
    path = path.partition("?")[0]  # Detectron2 takes options such as ?matching_heuristics=True
    try:
        local = PathManager.get_local_path(path)
    except Exception as error:  # downloads fail in as many ways as there are URLs
        raise UserError(f"weights {path} cannot be fetched: {error}") from error
    if not os.path.isfile(local):
        raise UserError(f"weights {path} do not exist; check MODEL.WEIGHTS.")
    return local


def read_class_names(path: str) -> list[str] | None:
    """Class names stored in the checkpoint at ``path``; None where it has none.

    Raises:
        UserError: if the file is missing or damaged.
    """
    local = _local_path(path)
    if not local.endswith(".pth"):
        return None
    try:
        checkpoint = torch.load(local, map_location="cpu", weights_only=True)
        return checkpoint.get("class_names")
    except _DAMAGED as error:
        raise _damaged(path, error) from error
