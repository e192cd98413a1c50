"""One step of training, from a batch to changed weights."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..modeling import SetDetector
from ..modeling.classification import BatchCounts
from . import heartbeat

Batch = list[dict[str, Any]]


class NotFiniteError(Exception):
    """A loss or the norm of the gradients is NaN or infinite; the model has not been changed.

    Attributes:
        values: losses and norm by name.
    """

    def __init__(self, values: dict[str, float]):
        super().__init__(", ".join(f"{name} {value}" for name, value in values.items()))
        self.values = values


class TrainingStep:
    """Forward, backward and update for one batch, which comes in one or more micro-batches.

    The batch is spread over micro-batches and processes: losses are divided by the number of
    boxes, or images, in all of it, so that gradients do not depend on how it is cut.

    Attributes:
        model: gives a dict of losses for a list of mapped records and the counts that they are
            divided by; it has ``num_queries``.
        optimizer: of its parameters.
        ema: a moving average of the weights, or None.
    """

    def __init__(
        self,
        model: SetDetector | DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        clip: Callable[[Iterable[nn.Parameter]], Tensor],
        *,
        mixed_precision: bool = False,
        ema: AveragedModel | None = None,
    ):
        """
        Args:
            model: the detector, or a :class:`DistributedDataParallel` of it.
            optimizer: of its parameters.
            clip: clips their gradients and returns the norm they had.
            mixed_precision: compute in float16 with scaled losses on a GPU, in bfloat16 on a CPU.
            ema: updated after each step.
        """
        self.model = model
        self.optimizer = optimizer
        self.ema = ema
        self._clip = clip
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # A forward pass changes them, with whatever values it has.
        self._statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in module.buffers()
        ]
        self._device = self._parameters[0].device.type
        self._dtype = torch.float16 if self._device == "cuda" else torch.bfloat16
        self._mixed_precision = mixed_precision
        self._scaler = torch.amp.GradScaler(
            self._device, enabled=mixed_precision and self._dtype == torch.float16
        )

    def __call__(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Make the step.

        Returns:
            the losses, averaged over the processes, and ``gradient_norm``, by name.

        Raises:
            NotFiniteError: a loss or, but for those of scaled losses, a gradient is not finite.
                Then nothing has been updated.
        """
        counts = self._counts(micro_batches)
        statistics = [buffer.clone() for buffer in self._statistics]
        self.optimizer.zero_grad()
        names: list[str] = []
        losses = torch.zeros(())
        for number, batch in enumerate(micro_batches, start=1):
            with self._synchronised(number == len(micro_batches)), self._autocast():
                part = self.model(batch, counts)
            heartbeat.beat()
            self._scaler.scale(sum(part.values())).backward()
            heartbeat.beat()
            names = list(part)
            losses = losses.to(counts.boxes.device) + torch.stack([*part.values()]).detach()
        self._scaler.unscale_(self.optimizer)
        norm = self._clip(self._parameters)

        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(losses)
            losses = losses / comm.get_world_size()
        # The only time that the host waits for a GPU, after that for the matching.
        values = torch.cat([losses, norm.detach()[None].to(losses)]).cpu()
        result = dict(zip([*names, "gradient_norm"], values.tolist(), strict=True))
        if not values.isfinite().all() and not self._overflow(values):
            with torch.no_grad():
                for buffer, value in zip(self._statistics, statistics, strict=True):
                    buffer.copy_(value)
            self._scaler.update()
            raise NotFiniteError(result)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(unwrapped(self.model))
        return result

    def forward(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """The losses alone, of this process."""
        counts = self._counts(micro_batches)
        with self._autocast():
            parts = [unwrapped(self.model)(batch, counts) for batch in micro_batches]
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, scale of mixed precision and moving average."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": self._scaler.state_dict(),
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; parts that are absent stay as they are."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("grad_scaler"):
            self._scaler.load_state_dict(state["grad_scaler"])
        if self.ema is not None and "ema" in state:
            self.ema.load_state_dict(state["ema"])

    def _counts(self, micro_batches: Sequence[Batch]) -> BatchCounts:
        return average_counts(
            micro_batches, unwrapped(self.model).num_queries, self._parameters[0].device
        )

    def _overflow(self, values: Tensor) -> bool:
        """Whether it is the scale of the losses that makes ``values`` not finite.

        Then the scaler leaves the step out and takes a smaller scale.
        """
        return bool(values[:-1].isfinite().all()) and self._scaler.get_scale() > 1.0

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device, self._dtype, enabled=self._mixed_precision)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over the processes once, with the last micro-batch."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()


def average_counts(
    micro_batches: Sequence[Batch], num_queries: int, device: torch.device
) -> BatchCounts:
    """Numbers of the whole batch, of all processes together, over the number of processes."""
    numbers = [len(x["instances"]) for batch in micro_batches for x in batch]
    counts = torch.stack(BatchCounts.of(numbers, num_queries, device))
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(counts)
    return BatchCounts(*(counts / comm.get_world_size()).unbind())


def unwrapped(model: SetDetector | DistributedDataParallel) -> SetDetector:
    """The model itself, out of a :class:`DistributedDataParallel`."""
    return model.module if isinstance(model, DistributedDataParallel) else model
