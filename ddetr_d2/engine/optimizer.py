"""The optimiser of the recipe, and the clipping of its gradients."""

from collections.abc import Callable, Iterable

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import Tensor, nn

from ..errors import UserError

CLIP_TYPES = ("full_model", "norm", "value")
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with three learning rates: backbone, sampling offsets and reference points, rest.

    With SOLVER.CLIP_GRADIENTS.CLIP_TYPE ``norm`` or ``value`` the optimiser clips the gradient of
    each parameter by itself, as Detectron2's do; ``full_model`` is :func:`build_clipping`'s.

    Raises:
        UserError: the optimiser or the kind of clipping is unknown.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        raise UserError(
            f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; expected one of " + ", ".join(OPTIMIZERS)
        )

    def lr_factor(name: str) -> float:
        if name.startswith("backbone."):
            return solver.BACKBONE_MULTIPLIER
        if "sampling_offsets" in name or "reference_points" in name:
            return solver.SAMPLING_MULTIPLIER
        return 1.0

    parameters = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        lr_factor_func=lr_factor,
    )
    kwargs = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "fused": True}
    if solver.OPTIMIZER == "SGD":
        kwargs |= {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    optimizer = OPTIMIZERS[solver.OPTIMIZER](parameters, **kwargs)
    return optimizer if _clips_whole_model(cfg) else maybe_add_gradient_clipping(cfg, optimizer)


def build_clipping(cfg: CfgNode) -> Callable[[Iterable[nn.Parameter]], Tensor]:
    """A function that clips the norm of all gradients together, if the configuration says so.

    Returns:
        a function from parameters to the norm that their gradients had, a scalar.
    """
    node = cfg.SOLVER.CLIP_GRADIENTS
    limit = node.CLIP_VALUE if _clips_whole_model(cfg) else float("inf")

    def clip(parameters: Iterable[nn.Parameter]) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, limit, node.NORM_TYPE)

    return clip


def _clips_whole_model(cfg: CfgNode) -> bool:
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE not in CLIP_TYPES:
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; expected one of "
            + ", ".join(CLIP_TYPES)
        )
    return clip.ENABLED and clip.CLIP_TYPE == "full_model"
