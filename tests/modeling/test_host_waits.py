"""How often a training step makes the host wait for a GPU, without a GPU: on tensors that are said
to be there and have no numbers. Whatever would need numbers on the host is an error there; what is
left to be counted are copies from one to the other."""

import contextlib

from ddetr_d2.modeling import matcher, set_detector

import pytest
import torch
from detectron2.structures import ImageList
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..conftest import TINY
from .test_deformable_detr import build, make_batch


class BlockingCopies(TorchDispatchMode):
    """Counts the copies between devices that the host waits for."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            source, waits = args[0], not kwargs.get("non_blocking")
        elif func is torch.ops.aten.copy_.default:
            source, waits = args[1], not (args[2:] and args[2])
        else:
            return out
        self.number += waits and source.device != out.device
        return out


class Images:
    """ImageList.from_tensors, which reads sizes from tensors."""

    @staticmethod
    def from_tensors(tensors, *_, **__):
        sizes = [tuple(tensor.shape[1:]) for tensor in tensors]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        return ImageList(tensors[0].new_zeros(len(tensors), 3, height, width), sizes)


def first_queries(costs, sizes):
    """Some assignment."""
    images = torch.cat([torch.full((n,), image) for image, n in enumerate(sizes)])
    return matcher.Matches(images, torch.arange(sum(sizes)), torch.arange(sum(sizes)))


@contextlib.contextmanager
def pretended_gpu(model):
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(
                        torch.empty_like(parameter, device="cuda"), parameter.requires_grad
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cuda")
        yield


@pytest.mark.parametrize(
    "variant", ["deformable_detr", "deformable_detr_refine", "deformable_detr_refine_two_stage"]
)
def test_host_waits_once_in_a_step_and_never_in_inference(monkeypatch, variant):
    monkeypatch.setattr(matcher, "_assign", first_queries)
    monkeypatch.setattr(set_detector, "ImageList", Images)
    model = build(variant, *TINY)
    with pretended_gpu(model):
        model.train()
        with BlockingCopies() as copies:
            losses = model(make_batch())
        assert all(loss.device.type == "cuda" for loss in losses.values())
        assert copies.number == 1
        model.eval()
        with torch.no_grad(), BlockingCopies() as copies:
            (detections, _) = model(make_batch())
        assert detections["instances"].scores.device.type == "cuda"
        assert copies.number == 0


def test_what_waits_is_noticed():
    with FakeTensorMode():
        there = torch.ones(3, device="cuda")
        with BlockingCopies() as copies:
            torch.tensor([1.0, 2.0], device="cuda")
            there.new_tensor([1.0])
            torch.ones(3).to("cuda")
            there.cpu()
            torch.ones(3).copy_(there)
            there.to("cpu", non_blocking=True)
        assert copies.number == 5
        for waits in (
            there.tolist,
            there.nonzero,
            lambda: there[there > 0],
            lambda: bool(there[0]),
        ):
            with pytest.raises(Exception, match="aten"):
                waits()
