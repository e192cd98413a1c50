"""Backbones of timm: any of its models that gives feature maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from types import ModuleType
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ..errors import UserError, nearest

# What stands before timm's own names in the state of a detector.
STATE_PREFIX = "backbone.features.model."
# What makes models for images of one size take images of any size, by their family.
_ANY_SIZE: tuple[dict[str, bool], ...] = (
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
)


@dataclass(frozen=True)
class Stage:
    """A feature map that a model gives.

    Attributes:
        name: ``res`` and the rounded binary logarithm of the stride: ``res2`` to ``res5`` are the
            strides 4 to 32, as in Detectron2's ResNets.
        index: its number among the model's feature maps.
        module: name of the module that makes it.
        channels: its channels.
        stride: pixels of the image to one of its own, along each axis.
    """

    name: str
    index: int
    module: str
    channels: int
    stride: int


class TimmBackbone(Backbone):
    """A model of timm, cut off after the last feature map that is used.

    Images are padded to a multiple of the coarsest stride: some models cut off or refuse what
    remains.
    """

    def __init__(
        self,
        name: str,
        out_features: Sequence[str],
        *,
        freeze_at: int = 0,
        freeze_batch_norm: bool = True,
        dilated: bool = False,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        bgr: bool = False,
    ):
        """
        Args:
            name: of the model, with or without the tag of its weights; nothing is fetched.
            out_features: names of the feature maps, see :class:`Stage`.
            freeze_at: stages that are not trained, as for Detectron2's ResNets: 0 none, 1 the
                stem, 2 that and all up to ``res2``, and so on.
            freeze_batch_norm: make all batch normalisation affine and fixed.
            dilated: the last stage is dilated instead of strided (DC5).
            pixel_mean: mean that was subtracted from the images, 0 to 255.
            pixel_std: standard deviation that they were divided by.
            bgr: whether the images are BGR; timm's models take RGB.

        Raises:
            UserError: timm is missing or has no such model, or the model cannot be used so.
        """
        super().__init__()
        timm = import_timm()
        options = {"output_stride": 16} if dilated else {}
        stages, options = _plan(timm, name, options)
        chosen = _choose(name, stages, out_features)
        features = _create(timm, name, out_indices=[stage.index for stage in chosen], **options)
        if freeze_batch_norm:
            features = timm.layers.freeze_batch_norm_2d(features)
        self.features = features
        self._freeze(timm, stages, freeze_at)
        self._out_features = [stage.name for stage in chosen]
        self._out_feature_channels = {stage.name: stage.channels for stage in chosen}
        self._out_feature_strides = {stage.name: stage.stride for stage in chosen}
        self._bgr = bgr
        data = timm.data.resolve_data_config({}, pretrained_cfg=features.pretrained_cfg)
        mean, std, old_mean, old_std = (
            torch.tensor(x, dtype=torch.float64).view(-1, 1, 1)
            for x in (data["mean"], data["std"], pixel_mean, pixel_std)
        )
        if bgr:
            old_mean, old_std = old_mean.flip(0), old_std.flip(0)
        scale, shift = old_std / (255 * std), (old_mean - 255 * mean) / (255 * std)
        same = torch.allclose(scale, torch.ones_like(scale)) and torch.allclose(
            shift, torch.zeros_like(shift), atol=1e-6
        )
        self.register_buffer("scale", None if same else scale.float(), persistent=False)
        self.register_buffer("shift", None if same else shift.float(), persistent=False)
        self._try(name)

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride, in pixels."""
        return max(self._out_feature_strides.values())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """
        Args:
            images: (N, 3, H, W), normalised by ``pixel_mean`` and ``pixel_std``; H and W are
                multiples of :attr:`size_divisibility`.

        Returns:
            (N, C, H / stride, W / stride) features by name.
        """
        if self._bgr:
            images = images.flip(1)
        if self.scale is not None:
            images = images * self.scale + self.shift
        return dict(zip(self._out_features, self.features(images), strict=True))

    def _freeze(self, timm: ModuleType, stages: Sequence[Stage], freeze_at: int) -> None:
        """Leave the first stages as they are; modules are registered in the order of their use."""
        if freeze_at < 1:
            return
        model = self.features.get_submodule("model")
        names = [name for name, _ in model.named_modules()]
        if stages[0].module not in names:
            raise UserError(
                "this model of timm does not tell which modules its stages are; set "
                "MODEL.BACKBONE.FREEZE_AT 0 and, to train none of it, SOLVER.BACKBONE_MULTIPLIER 0."
            )
        end = names.index(stages[0].module)
        for stage in stages:
            if int(stage.name.removeprefix("res")) <= freeze_at and stage.module in names:
                below = f"{stage.module}."
                end = 1 + max(i for i, name in enumerate(names) if f"{name}.".startswith(below))
        for name in names[:end]:
            module = model.get_submodule(name)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if isinstance(module, nn.BatchNorm2d):
                model.set_submodule(name, timm.layers.freeze_batch_norm_2d(module))

    def _try(self, name: str) -> None:
        """Refuse a model that takes images of one size only; do not train what has no effect.

        Distributed training would wait for the gradients of such parameters.
        """
        training = self.training
        height, width = 4 * self.size_divisibility, 5 * self.size_divisibility
        try:
            features = self.eval()(torch.zeros(1, 3, height, width))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"MODEL.TIMM.NAME {name} does not take images of any size "
                f"({_first_line(error)}); choose another model."
            ) from error
        finally:
            self.train(training)
        for feature, stride in zip(
            features.values(), self._out_feature_strides.values(), strict=True
        ):
            if feature.shape[2:] != (height // stride, width // stride):
                raise UserError(
                    f"MODEL.TIMM.NAME {name} does not keep to its strides: of {height} x {width} "
                    f"pixels it makes {feature.shape[2]} x {feature.shape[3]} features at stride "
                    f"{stride}; choose another model."
                )
        parameters = [p for p in self.parameters() if p.requires_grad]
        if parameters:
            total = sum(feature.sum() for feature in features.values())
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.requires_grad_(gradient is not None)


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The model that ``MODEL.TIMM.NAME`` names, with ``MODEL.DEFORMABLE_DETR.IN_FEATURES``.

    Raises:
        UserError: timm is missing or has no such model, or the model lacks what is asked for.
    """
    return TimmBackbone(
        cfg.MODEL.TIMM.NAME,
        cfg.MODEL.DEFORMABLE_DETR.IN_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        freeze_batch_norm=cfg.MODEL.TIMM.FREEZE_BATCH_NORM,
        dilated=cfg.MODEL.RESNETS.RES5_DILATION == 2,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        bgr=cfg.INPUT.FORMAT == "BGR",
    )


def import_timm() -> ModuleType:
    """The package timm, which is optional.

    Raises:
        UserError: it is not installed.
    """
    try:
        import timm
        import timm.layers
    except ImportError:
        raise UserError("backbones of timm need timm: pip install timm.") from None
    return timm


def check_name(timm: ModuleType, name: str) -> None:
    """Refuse a name that is no model of timm.

    Raises:
        UserError: there is no such model; the nearest one is suggested.
    """
    if not timm.is_model(name):
        hint = nearest(name.partition(".")[0], timm.list_models())
        raise UserError(f"MODEL.TIMM.NAME {name!r} is no model of timm{hint or '.'}")


def _plan(
    timm: ModuleType, name: str, options: dict[str, Any]
) -> tuple[list[Stage], dict[str, Any]]:
    """The stages of a model, and the options that it is to be created with."""
    check_name(timm, name)
    for any_size in _ANY_SIZE:
        try:
            with torch.device("meta"):
                features = _create(timm, name, **options, **any_size)
            break
        except _UnknownOption as error:
            if any_size:
                continue
            if options:
                raise UserError(
                    f"MODEL.TIMM.NAME {name} cannot dilate its last stage; choose a configuration "
                    "without DC5 (MODEL.RESNETS.RES5_DILATION 1), or another model."
                ) from error
            raise UserError(f"MODEL.TIMM.NAME {name} gives no feature maps ({error}).") from error
    model: Any = features.get_submodule("model")
    info = model.feature_info
    info = info.info if hasattr(info, "info") else info
    stages: list[Stage] = []
    for index, entry in enumerate(info):
        stride = int(entry["reduction"])
        level = round(log2(stride))
        if options and stages and index == len(info) - 1:  # what would be the next without dilation
            level = int(stages[-1].name.removeprefix("res")) + 1
        stages.append(Stage(f"res{level}", index, entry["module"], entry["num_chs"], stride))
    return stages, options | any_size


def _choose(name: str, stages: Sequence[Stage], wanted: Sequence[str]) -> list[Stage]:
    """The last stage of each wanted name, fine to coarse."""
    by_name = {stage.name: stage for stage in stages}
    absent = [feature for feature in wanted if feature not in by_name]
    if absent:
        there = ", ".join(f"{stage.name} (stride {stage.stride})" for stage in by_name.values())
        raise UserError(
            f"MODEL.DEFORMABLE_DETR.IN_FEATURES names {', '.join(absent)}, but {name} gives "
            f"{there}; choose of these, or another MODEL.TIMM.NAME."
        )
    return sorted((by_name[feature] for feature in wanted), key=lambda stage: stage.index)


class _UnknownOption(Exception):
    """A model does not take an option."""


def _create(timm: ModuleType, name: str, **options: Any) -> nn.Module:
    try:
        return timm.create_model(
            name, features_only=True, feature_cls="getter", num_classes=0, **options
        )
    except (TypeError, NotImplementedError, AssertionError) as error:
        raise _UnknownOption(_first_line(error)) from error
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"MODEL.TIMM.NAME {name} cannot be used here: {_first_line(error)}."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
