"""Detectron2's checkpointer for weights of many formats, with class names and strict loading."""

import logging
import re
from dataclasses import dataclass
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from tabulate import tabulate
from torch import nn

from ..class_names import listed, match_classes
from ..errors import UserError
from .architecture import as_arguments, built_options, differences, infer_options, variant
from .files import local_path
from .formats import COCO_NAMES, Weights, num_classes, read_weights, to_contiguous
from .names import State

# Parameters whose shape follows the number of classes.
_CLASS_HEAD = "class_embed"
# Parts of a backbone that ImageNet weights do not have.
_BEYOND_IMAGENET = ("conv2_offset", "fpn_", "top_block")
# Lines of each kind in the table of what does not fit.
_MAX_LINES = 6


class DetrCheckpointer(DetectionCheckpointer):
    """Load weights of any known format; save class names along; refuse weights that do not fit.

    A file with weights of the backbone only (ImageNet) loads into the backbone. A file with a
    detector must hold every parameter of the model in its shape, and no others. Only the class
    heads may differ in the number of classes, when training starts from a detector of other
    classes. Nothing is loaded from a file that does not fit.
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
        self._resuming = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth; see :meth:`DetectionCheckpointer.save`."""
        kwargs["options"] = built_options(self.model)
        if self.class_names:
            kwargs["class_names"] = list(self.class_names)
        super().save(name, **kwargs)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load what is at ``path``: see :func:`ddetr_d2.checkpoint.formats.read_weights`.

        Raises:
            UserError: if it is missing, damaged or does not fit the model.
        """
        self._source = path
        # Detectron2 restores nothing but the weights where no run is resumed.
        self._resuming = not self.strict and not args and "checkpointables" not in kwargs
        try:
            return super().load(local_path(path) if path else path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None

    def load_weights(self, weights: Weights, name: str) -> None:
        """Load weights that are read already; ``name`` is what messages call them.

        Raises:
            UserError: if they do not fit the model.
        """
        self._source = name
        self._load_model({"model": weights})

    def _load_file(self, filename: str) -> dict[str, Any]:
        weights = read_weights(filename, shown=self._source)
        if weights.format != "ddetr_d2":
            logging.getLogger(__name__).info(f"{self._source}: {weights.format}")
        return {**weights.rest, "model": weights}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        weights: Weights = checkpoint.pop("model")
        expected = self.model.state_dict()
        if weights.coco_ids and (self.class_names or num_classes(expected) == len(COCO_NAMES)):
            weights = to_contiguous(weights)
        state = weights.model
        if any(name.startswith("backbone.bottom_up.") for name in expected) and weights.is_backbone:
            state = {re.sub(r"^backbone\.", "backbone.bottom_up.", k): v for k, v in state.items()}
        state = self._match_classes(state, weights.class_names, expected)
        misfit = _compare(state, expected, weights.is_backbone and not self.strict)
        if misfit.wrong and not self.strict and all(_CLASS_HEAD in name for name in misfit.wrong):
            logging.getLogger(__name__).warning(
                f"{self._source} was trained on another number of classes: the "
                f"{len(misfit.wrong)} tensors of the class heads start anew."
            )
            state = {name: tensor for name, tensor in state.items() if name not in misfit.wrong}
            misfit.wrong = {}
        if misfit:
            raise UserError(self._message(misfit, state, expected))
        self._compare_options(weights)
        return super()._load_model({"model": state})

    def _match_classes(self, state: State, names: list[str] | None, expected: State) -> State:
        """Give each class of the model the head that the class of its name has in the file.

        Classes that the file does not have start anew. Output 0 of the proposals says "object"
        whatever the class, and stays.
        """
        ours = self.class_names
        if not (names and ours) or list(names) == list(ours) or self.strict:
            return state
        if self._resuming:
            raise UserError(
                f"{self._source} was trained on the classes {listed(names)}, but the data sets "
                f"have {listed(ours)} now: a run is resumed with the classes it was started with. "
                "Start another one, in another OUTPUT_DIR, with MODEL.WEIGHTS"
            )
        matches = match_classes(ours, names)
        kept = [name for name, match in zip(ours, matches, strict=True) if match is not None]
        new = [name for name, match in zip(ours, matches, strict=True) if match is None]
        logging.getLogger(__name__).warning(
            f"{self._source} was trained on other classes, which are matched by name: "
            f"{len(kept)} keep their heads ({listed(kept) or 'none'}), {len(new)} start anew "
            f"({listed(new) or 'none'})."
        )
        state = dict(state)
        for name, tensor in state.items():
            fresh = expected.get(name)
            # Heads of another width do not fit for another reason, which is said later.
            if _CLASS_HEAD not in name or fresh is None or fresh.shape[1:] != tensor.shape[1:]:
                continue
            fresh = fresh.detach().clone()
            proposals = name.startswith("transformer.queries.")
            for row, match in enumerate([0] if proposals else matches):
                if match is not None and match < len(tensor):
                    fresh[row] = tensor[match]
            state[name] = fresh
        return state

    def _message(self, misfit: "_Misfit", state: State, expected: State) -> str:
        needed, built = infer_options(state), infer_options(expected)
        settings = differences(needed, built)
        if not self.strict:  # training may start from other classes
            settings.pop("MODEL.DEFORMABLE_DETR.NUM_CLASSES", None)
        remedy = "Use the configuration that the weights were trained with, or other MODEL.WEIGHTS."
        if settings:
            name = variant(needed)
            if name != variant(built):
                remedy = f"The weights are of configs/{name}.yaml. "
            else:
                remedy = ""
            remedy += f"Settings that fit them: {as_arguments(settings)}"
        return (
            f"{self._source} does not fit this model: {misfit.summary()}.\n{misfit.table()}\n"
            f"{remedy}"
        )

    def _compare_options(self, weights: Weights) -> None:
        """Compare what the file tells of its model and no shape shows."""
        settings = differences(weights.options, built_options(self.model))
        if not settings:
            return
        message = (
            f"{self._source} is of a model with other settings than this one: "
            f"{as_arguments(settings)}"
        )
        if self.strict:
            raise UserError(message)
        logging.getLogger(__name__).warning(message)


@dataclass
class _Misfit:
    """What does not fit: names, or names with the shapes in the file and in the model."""

    missing: list[str]
    left_over: list[str]
    wrong: dict[str, tuple[list[int], list[int]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.left_over or self.wrong)

    def summary(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} parameters are missing, the first {self.missing[0]}")
        if self.wrong:
            name, (in_file, in_model) = next(iter(self.wrong.items()))
            parts.append(
                f"{len(self.wrong)} differ in shape, the first {name}: {in_file} in the file, "
                f"{in_model} in the model"
            )
        if self.left_over:
            parts.append(f"{len(self.left_over)} are left over, the first {self.left_over[0]}")
        return "; ".join(parts)

    def table(self) -> str:
        """A line for each kind of name, counted."""
        rows = [("", "tensors", "name", "in the file", "in the model")]
        rows += _grouped("missing", {name: ("", "") for name in self.missing})
        rows += _grouped("other shape", self.wrong)
        rows += _grouped("left over", {name: ("", "") for name in self.left_over})
        return tabulate(rows, tablefmt="plain")


def _grouped(kind: str, entries: dict[str, tuple[Any, Any]]) -> list[tuple[Any, ...]]:
    """Count names that differ in numbers and in the last part only."""
    groups: dict[str, list[str]] = {}
    for name in entries:
        module = re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0]) or name
        groups.setdefault(module, []).append(name)
    rows = []
    for module, names in list(groups.items())[:_MAX_LINES]:
        if len(names) == 1:
            module = names[0]
        elif len({name.rpartition(".")[2] for name in names}) == 1:
            module += "." + names[0].rpartition(".")[2]
        else:
            module += ".*"
        rows.append((kind, len(names), module, *map(str, entries[names[0]])))
        kind = ""
    rest = sum(len(names) for names in list(groups.values())[_MAX_LINES:])
    if rest:
        rows.append(("", rest, "others", "", ""))
    return rows


def _compare(state: State, expected: State, backbone_only: bool) -> _Misfit:
    """Compare weights with what the model has, leaving out counters of training steps."""
    missing = [name for name in expected if name not in state and not _is_counter(name)]
    left_over = [name for name in state if name not in expected and not _is_counter(name)]
    if backbone_only:
        missing = [
            name
            for name in missing
            if name.startswith("backbone.") and not any(x in name for x in _BEYOND_IMAGENET)
        ]
        # Stages that the model does not have may stay behind, blocks of its stages may not.
        blocks = {_block(name) for name in expected}
        stages = {stage for stage, _ in blocks}
        left_over = [n for n in left_over if _block(n) not in blocks and _block(n)[0] in stages]
    wrong = {
        name: (list(state[name].shape), list(tensor.shape))
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    }
    return _Misfit(missing, left_over, wrong)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _block(name: str) -> tuple[str, str]:
    """``("res2", "0")`` of ``backbone.res2.0.conv1.weight``; nothing for other names."""
    match = re.match(r"backbone\.(?:bottom_up\.)?(res\d)\.(\d+)\.", name)
    return (match[1], match[2]) if match else ("", "")


def read_class_names(path: str) -> list[str] | None:
    """Names of the classes of the weights at ``path``; None where they do not tell.

    Raises:
        UserError: if the file is missing or damaged.
    """
    return read_weights(path).class_names
