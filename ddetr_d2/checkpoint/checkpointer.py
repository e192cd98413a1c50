"""Detectron2's checkpointer for weights of many formats, with class names and strict loading."""

import contextlib
import logging
import os
import re
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..class_names import listed, match_classes
from ..errors import UserError
from ..main_process import on_main_process
from .architecture import (
    CLASS_LOSS,
    DILATION,
    NUM_CLASSES,
    NUM_HEADS,
    as_arguments,
    built_options,
    differences,
    infer_options,
    num_classes,
    variant,
)
from .files import local_path
from .formats import COCO_NAMES, Weights, read_weights, to_contiguous
from .misfit import Misfit, compare
from .names import State
from .run_folder import LAST_CHECKPOINT, PERIODIC, has_checkpoint, newest_checkpoint
from .whole_files import save_whole, whole_file

# Parameters whose shape follows the number of classes.
_CLASS_HEAD = "class_embed"
_QUERIES = "transformer.queries.query_embed.weight"


class DetrCheckpointer(DetectionCheckpointer):
    """Load weights of any known format; save class names along; refuse weights that do not fit.

    A checkpoint appears under its name whole or not at all, and ``last_checkpoint`` names it
    after that. A run is resumed from the newest whole checkpoint.

    A file with weights of the backbone only (ImageNet) loads into the backbone. A file with a
    detector must hold every parameter of the model in its shape, and no others. Only the class
    heads may differ, in the number of classes or in the loss of the classes, and the number of
    learned queries, when training starts from another detector. Nothing is loaded from a file that
    does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        class_names: list[str] | None = None,
        strict: bool = False,
        keep: int = 0,
        config: str = "",
        **kwargs: Any,
    ):
        """
        Args:
            model: the detector.
            save_dir: folder of the checkpoints written.
            class_names: written into each checkpoint as ``class_names``.
            strict: every parameter must be in the file, as evaluation needs it.
            keep: how many periodic checkpoints of the run to keep, the newest ones; 0 for all.
            config: text of the configuration, written into each checkpoint.
            kwargs: see :class:`DetectionCheckpointer`: what to save beside the model, by name,
                each with ``state_dict()`` and ``load_state_dict()``. States hold tensors and plain
                values only; reading others back is refused.

        Attributes:
            resumed_from: path of the checkpoint that the run continues from, empty if it starts.
        """
        super().__init__(model, save_dir, **kwargs)
        self.class_names = class_names
        self.strict = strict
        self.keep = keep
        self.config = config
        self.resumed_from = ""
        self._periodic: list[str] = []  # checkpoints that this run has written
        self._source = ""
        self._resuming = False

    def save(self, name: str, *, newest: bool = True, **kwargs: Any) -> None:
        """Write ``name``.pth with the model, the checkpointables and ``kwargs``.

        Older periodic checkpoints of the run are removed then, as ``keep`` says.

        Args:
            name: without the ending; ``model_`` and seven digits for a periodic checkpoint.
            newest: name it in ``last_checkpoint``: the run is resumed from it.
            kwargs: further entries; ``iteration`` is the last one that was done.

        Raises:
            UserError: if it cannot be written; nothing else has changed then.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        file_name = f"{name}.pth"
        path = os.path.join(self.save_dir, file_name)
        periodic = [other for other in self._periodic if other != file_name]
        if PERIODIC.fullmatch(file_name):
            periodic.append(file_name)
        content = {"model": self.model.state_dict()}
        content |= {key: item.state_dict() for key, item in self.checkpointables.items()}
        content |= {"options": built_options(self.model), "periodic_checkpoints": periodic}
        if self.config:
            content["config"] = self.config
        if self.class_names:
            content["class_names"] = list(self.class_names)
        logging.getLogger(__name__).info(f"Saving checkpoint to {path}")
        try:
            save_whole(content | kwargs, path)
            if newest:
                self.tag_last_checkpoint(file_name)
        except UserError as error:
            if not self.has_checkpoint():
                raise
            raise UserError(
                f"{error} Older checkpoints are untouched; continue with --resume."
            ) from error
        self._periodic = periodic
        self._remove_old()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the newest checkpoint in ``last_checkpoint``."""
        with whole_file(os.path.join(self.save_dir, LAST_CHECKPOINT)) as file:
            file.write(last_filename_basename.encode())

    def _remove_old(self) -> None:
        """Remove periodic checkpoints of this run, and of no other, that are not to be kept."""
        if self.keep <= 0:
            return
        old, self._periodic = self._periodic[: -self.keep], self._periodic[-self.keep :]
        for name in old:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.save_dir, name))
            except OSError as error:
                logging.getLogger(__name__).warning(f"{name} cannot be removed: {error.strerror}")

    def has_checkpoint(self) -> bool:
        """Whether a run has left a checkpoint in the folder, or a trace of one."""
        return has_checkpoint(self.save_dir)

    def get_checkpoint_file(self) -> str:
        """The checkpoint to resume from: see :func:`ddetr_d2.checkpoint.newest_checkpoint`."""
        return newest_checkpoint(self.save_dir)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the newest whole checkpoint of the folder and all that goes with it.

        Without ``resume``, or where the folder has no checkpoint, load only the weights at
        ``path``. The main process chooses for all; all have to call this together.

        Raises:
            UserError: if there are checkpoints and none is whole, and as :meth:`load`.
        """
        self.resumed_from = on_main_process(self.get_checkpoint_file) if resume else ""
        if not self.resumed_from:
            return self.load(path, checkpointables=[])
        rest = self.load(self.resumed_from)
        names = rest.get("periodic_checkpoints", [])
        self._periodic = [name for name in names if PERIODIC.fullmatch(name)]
        return rest

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
        expected, built = self.model.state_dict(), built_options(self.model)
        classes = num_classes(expected, built)
        if weights.coco_ids and (self.class_names or classes == len(COCO_NAMES)):
            weights = to_contiguous(weights)
        state = weights.model
        if any(name.startswith("backbone.bottom_up.") for name in expected) and weights.is_backbone:
            state = {re.sub(r"^backbone\.", "backbone.bottom_up.", k): v for k, v in state.items()}
        settings = differences(weights.options, built)
        if CLASS_LOSS not in settings:
            state = self._match_classes(state, weights.class_names, expected, classes)
        if not (self.strict or self._resuming):
            state = self._match_queries(state, expected)
        misfit = compare(state, expected, weights.is_backbone and not self.strict)
        if not self.strict and all(_CLASS_HEAD in name for name in misfit.wrong):
            state = self._without_other_heads(state, misfit, CLASS_LOSS in settings)
        if misfit:
            raise UserError(self._message(misfit, weights, expected, built))
        self._compare_options(settings)
        return super()._load_model({"model": state})

    def _without_other_heads(self, state: State, misfit: Misfit, other_loss: bool) -> State:
        """Leave out class heads that start anew: of other sizes, or all trained by another loss."""
        heads = {name for name in state if _CLASS_HEAD in name} if other_loss else misfit.wrong
        if not heads:
            return state
        other = f"with another {CLASS_LOSS}" if other_loss else "on another number of classes"
        logging.getLogger(__name__).warning(
            f"{self._source} was trained {other}: the {len(heads)} tensors of the class heads "
            "start anew."
        )
        misfit.wrong = {}
        return {name: tensor for name, tensor in state.items() if name not in heads}

    def _match_classes(
        self, state: State, names: list[str] | None, expected: State, classes: int
    ) -> State:
        """Give each class of the model the head that the class of its name has in the file.

        Classes that the file does not have start anew. "No object" stays, the last output where
        there is one, and output 0 of the proposals, which says "object" whatever the class.
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
            if not proposals and len(fresh) > classes:
                fresh[-1] = tensor[-1]
            state[name] = fresh
        return state

    def _match_queries(self, state: State, expected: State) -> State:
        """Keep as many learned queries as the model has; what it has beyond them starts anew."""
        ours, theirs = expected.get(_QUERIES), state.get(_QUERIES)
        if ours is None or theirs is None or len(ours) == len(theirs):
            return state
        if ours.shape[1:] != theirs.shape[1:]:  # which is refused later
            return state
        kept = min(len(ours), len(theirs))
        queries = ours.detach().clone()
        queries[:kept] = theirs[:kept]
        logging.getLogger(__name__).warning(
            f"{self._source} has {len(theirs)} queries, this model {len(ours)}: the first {kept} "
            f"are kept, {len(ours) - kept} start anew."
        )
        return {**state, _QUERIES: queries}

    def _message(
        self, misfit: Misfit, weights: Weights, expected: State, built: dict[str, Any]
    ) -> str:
        # What the file does not tell is no reason to advise a change.
        told = {key: built[key] for key in (NUM_HEADS, DILATION) if key in built}
        needed = infer_options(weights.model, told | weights.options)
        given = infer_options(expected, built)
        settings = differences(needed, given)
        if not self.strict:  # training may start from other classes
            settings.pop(NUM_CLASSES, None)
        remedy = "Use the configuration that the weights were trained with, or other MODEL.WEIGHTS."
        if settings:
            name = variant(needed)
            remedy = ""
            if name != variant(given):
                remedy = f"The weights are of configs/{name}.yaml. "
            remedy += f"Settings that fit them: {as_arguments(settings)}"
        return (
            f"{self._source} does not fit this model: {misfit.summary()}.\n{misfit.table()}\n"
            f"{remedy}"
        )

    def _compare_options(self, settings: dict[str, Any]) -> None:
        """Say which ``settings`` of the file's model, that no shape shows, are not the model's."""
        if not settings:
            return
        message = (
            f"{self._source} is of a model with other settings than this one: "
            f"{as_arguments(settings)}"
        )
        if self.strict or (self._resuming and CLASS_LOSS in settings):
            raise UserError(message)
        logging.getLogger(__name__).warning(message)


def read_class_names(path: str) -> list[str] | None:
    """Names of the classes of the weights at ``path``; None where they do not tell.

    Raises:
        UserError: if the file is missing or damaged.
    """
    return read_weights(path).class_names
