"""Weights of timm's models: ``timm://NAME[/FILE]``.

``timm://NAME`` are those that timm has for the model, from the Hugging Face hub; ``timm://NAME/FILE``
those in a file, which may be a URL or ``hf://ORG/NAME/FILE`` as well. Importing this module makes
Detectron2's ``PathManager`` know such paths.
"""

import sys
from collections.abc import Mapping
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from torch import Tensor

from ..errors import UserError
from ..modeling.timm_backbone import STATE_PREFIX, check_name, import_timm
from . import hub
from .names import State, efficientnet

PREFIX = "timm://"


class TimmHandler(PathHandler):
    """Finds the file of a model's weights."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        """Path of the file, or of a folder with it.

        Raises:
            UserError: there is no such model, timm has no weights of it, or they cannot be fetched.
        """
        name, _, file = path.removeprefix(PREFIX).partition("/")
        if not file:
            timm = import_timm()
            check_name(timm, name)
            known = timm.get_pretrained_cfg(name)
            if known is None or not (known.hf_hub_id or known.url):
                raise UserError(f"{path}: timm has no weights of {name}; give {path}/FILE.")
            file = known.url
            if known.hf_hub_id:
                file = f"{hub.PREFIX}{known.hf_hub_id}"
                file += f"/{known.hf_hub_filename}" if known.hf_hub_filename else ""
        return PathManager.get_local_path(file, force=force)


PathManager.register_handler(TimmHandler(), allow_override=True)


def is_efficientnet(state: Mapping[str, Tensor]) -> bool:
    """Whether a state has the names of efficientnet_pytorch."""
    return "_blocks.0._depthwise_conv.weight" in state


def from_timm(state: Mapping[str, Tensor], path: str) -> State:
    """Weights of a whole model under the names of :class:`ddetr_d2.modeling.TimmBackbone`.

    Args:
        state: as in a file of timm, of whatever timm itself converts (such as the files of the
            models' authors), or of efficientnet_pytorch.
        path: ``timm://NAME[/FILE]``.

    Raises:
        UserError: they are not of this model.
    """
    timm = import_timm()
    name = path.removeprefix(PREFIX).partition("/")[0]
    check_name(timm, name)
    model = timm.create_model(name)
    if is_efficientnet(state):
        state = efficientnet(state)
    # What timm itself does with files, by the name that most of its modules give it.
    module = sys.modules[timm.model_entrypoint(name).__module__]
    if convert := getattr(module, "checkpoint_filter_fn", None):
        state = convert(dict(state), model)
    expected = model.state_dict()
    left_over = [name for name in state if name not in expected]
    if left_over or not state:
        raise UserError(
            f"{path} is not of {name}: {len(left_over)} of its {len(state)} tensors are left over, "
            f"the first {left_over[0] if left_over else 'none'}."
        )
    classifier = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {
        STATE_PREFIX + name: tensor
        for name, tensor in state.items()
        if name.rpartition(".")[0] not in classifiers
    }
