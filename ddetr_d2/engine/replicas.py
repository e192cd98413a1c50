"""Copies of a model that trains: those of other processes, and the average of its weights."""

import torch
from detectron2.config import CfgNode
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..modeling import SetDetector


def distributed(model: SetDetector) -> SetDetector | DistributedDataParallel:
    """The model in data parallelism, if there are several processes."""
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    device = next(model.parameters()).device
    return create_ddp_model(
        model,
        broadcast_buffers=batch_norm,
        device_ids=None if device.type == "cpu" else [torch.cuda.current_device()],
    )


def same_everywhere(model: nn.Module) -> nn.Module:
    """Give all processes the statistics of batch normalisation that the main process has."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
    return model


def moving_average(cfg: CfgNode, model: nn.Module) -> AveragedModel | None:
    """An exponential moving average of the weights, if SOLVER.EMA says so."""
    if not cfg.SOLVER.EMA.ENABLED:
        return None
    update = get_ema_multi_avg_fn(cfg.SOLVER.EMA.DECAY)
    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
