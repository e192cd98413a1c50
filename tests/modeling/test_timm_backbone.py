"""Backbones of timm, from their weights to a detector's checkpoint. Nothing is downloaded."""

import shutil
import sys

from ddetr_d2 import Detector
from ddetr_d2.checkpoint import DetrCheckpointer
from ddetr_d2.checkpoint.formats import read_weights
from ddetr_d2.engine import setup_cfg
from ddetr_d2.engine.optimizer import build_optimizer
from ddetr_d2.errors import UserError
from ddetr_d2.modeling import prepare_for_inference
from ddetr_d2.modeling.backbone import build_detr_backbone
from ddetr_d2.modeling.timm_backbone import TimmBackbone

import pytest
import torch
from detectron2.modeling import build_model
from safetensors.torch import save_file
from torch import nn

from ..conftest import MEMBERS, ROOT, TINY
from ..hub import Hub
from .test_deformable_detr import make_batch, make_input

timm = pytest.importorskip("timm")

SMALL = "mobilenetv3_small_050"
LITE = "tf_efficientnet_lite0"
SWIN = "swin_tiny_patch4_window7_224"
THREE = ["res3", "res4", "res5"]


def options(name=SMALL, *opts):
    timm_backbone = ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", name)
    return [*TINY, *timm_backbone, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3", *opts]


def configuration(variant="deformable_detr", name=SMALL, *opts):
    return setup_cfg(str(ROOT / "configs" / f"{variant}.yaml"), options(name, *opts))


def randomized(model: nn.Module) -> nn.Module:
    """Weights and statistics that are all different, so that none may be left out."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) / 10)
    return model.eval()


@pytest.mark.parametrize("variant", MEMBERS)
def test_trains_and_detects_in_every_member(variant):
    model = build_model(configuration(variant, "regnety_002"))
    losses = model.train()(make_batch())
    sum(losses.values()).backward()
    missing = [
        n for n, p in model.backbone.named_parameters() if p.requires_grad and p.grad is None
    ]
    assert not missing
    stride = model.backbone.output_shape()["res5"].stride
    assert stride == (16 if "dc5" in variant else 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = model.eval()([make_input(61, 75, [])])[0]["instances"]
    assert result.scores.isfinite().all()


@pytest.mark.parametrize(
    "name, names", [(SWIN, ["res2", "res3"]), ("convnext_atto", ["res2", *THREE]), (LITE, THREE)]
)
def test_features_are_those_of_timm(name, names):
    backbone = randomized(TimmBackbone(name, names, freeze_batch_norm=False))
    state = backbone.features.model.state_dict()
    # Their way to feature maps, which renames modules and keeps Swin's channels last.
    indices = {SWIN: (0, 1), LITE: (2, 3, 4)}.get(name, (0, 1, 2, 3))
    theirs = timm.create_model(name, features_only=True, out_indices=indices).eval()
    theirs.load_state_dict(
        {k: state[k if k in state else k.replace("_", ".", 1)] for k in theirs.state_dict()}
    )
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        got = backbone(images)
        if backbone.scale is not None:
            images = images * backbone.scale + backbone.shift
        expected = theirs(images)
    for (feature, spec), wanted in zip(backbone.output_shape().items(), expected, strict=True):
        wanted = wanted.permute(0, 3, 1, 2) if name == SWIN else wanted
        side = 224 // spec.stride
        assert got[feature].shape == (1, spec.channels, side, side)
        torch.testing.assert_close(got[feature], wanted, atol=1e-4, rtol=1e-4)


def test_swin_takes_images_of_any_size():
    backbone = randomized(TimmBackbone(SWIN, ["res3"]))
    with torch.no_grad(), torch.jit.optimized_execution(False):
        traced = torch.jit.trace(backbone, torch.rand(1, 3, 64, 96), strict=False)
        for height, width in ((24, 40), (224, 224), (256, 320)):
            images = torch.rand(2, 3, height, width)
            features = backbone(images)["res3"]
            assert features.shape == (2, 192, height // 8, width // 8)
            torch.testing.assert_close(traced(images)["res3"], features)


def test_a_detector_with_swin_pads_images_and_masks_what_it_added():
    model = build_model(configuration(name=SWIN)).eval()
    inputs = [make_input(67, 131, []), make_input(101, 50, [])]
    images = model.preprocess_image(inputs)
    assert images.tensor.shape == (2, 3, 128, 160)
    mask = model._padding_mask(images)
    assert (~mask).sum((1, 2)).tolist() == [67 * 131, 101 * 50]
    with torch.no_grad():
        assert all(len(result["instances"]) for result in model(inputs))


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize("name", [SMALL, LITE])
def test_images_are_normalised_as_the_model_was_trained(name, image_format):
    model = build_model(configuration("deformable_detr", name, "INPUT.FORMAT", image_format)).eval()
    features = model.backbone.features
    data = timm.data.resolve_model_data_config(features)
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert (data["mean"] == (0.5, 0.5, 0.5)) == (name == LITE)
    rgb = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    given = rgb if image_format == "RGB" else rgb.flip(0)
    with torch.no_grad():
        wanted = features(((rgb / 255 - mean) / std)[None])
        got = model.backbone(model.preprocess_image([{"image": given}]).tensor)
    for ours, theirs in zip(got.values(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, freeze_at, last_frozen, first_trained",
    [
        ("resnet18", 1, "conv1.weight", "layer1.0.conv1.weight"),
        ("resnet18", 3, "layer2.1.conv2.weight", "layer3.0.conv1.weight"),
        (LITE, 1, "blocks.0.0.conv_pw.weight", "blocks.1.0.conv_pw.weight"),
        (LITE, 2, "blocks.1.1.conv_pwl.weight", "blocks.2.0.conv_pw.weight"),
        ("convnext_atto", 2, "stages.0.blocks.1.mlp.fc2.bias", "stages.1.downsample.0.weight"),
    ],
)
@pytest.mark.parametrize("freeze_batch_norm", [True, False])
def test_freezing(name, freeze_at, last_frozen, first_trained, freeze_batch_norm):
    backbone = TimmBackbone(
        name, THREE, freeze_at=freeze_at, freeze_batch_norm=freeze_batch_norm
    ).train()
    model = backbone.features.model
    parameters = dict(model.named_parameters())
    frozen = [key for key, parameter in parameters.items() if not parameter.requires_grad]
    assert frozen == list(parameters)[: len(frozen)]
    assert frozen[-1] == last_frozen
    assert list(parameters)[len(frozen)] == first_trained
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    backbone(torch.rand(2, 3, 64, 64))
    moved = [k for k, tensor in model.state_dict().items() if not torch.equal(tensor, before[k])]
    # Running statistics stay, but for those of the stages that are trained if they are to move.
    allowed = [] if freeze_batch_norm else list(before)[list(before).index(first_trained) :]
    assert set(moved) <= set(allowed)
    assert bool(moved) == (not freeze_batch_norm and name != "convnext_atto")


def test_what_has_no_effect_is_not_trained():
    """Distributed training would wait for its gradient."""
    backbone = TimmBackbone("hrnet_w18_small", THREE)
    features = backbone(torch.rand(1, 3, 64, 64))
    sum(feature.sum() for feature in features.values()).backward()
    trained = [p for p in backbone.parameters() if p.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)


def test_learning_rate_of_the_backbone():
    cfg = configuration("deformable_detr", SMALL, "SOLVER.BACKBONE_MULTIPLIER", "0.25")
    model = build_model(cfg)
    ours = {id(p) for p in model.backbone.parameters() if p.requires_grad}
    rates = {
        group["lr"] / cfg.SOLVER.BASE_LR
        for group in build_optimizer(cfg, model).param_groups
        for p in group["params"]
        if id(p) in ours
    }
    assert rates == {0.25}


@pytest.mark.parametrize("frozen", ["True", "False"])
@pytest.mark.parametrize(
    "name, left",
    [(SMALL, 0), ("resnet18", 0), ("resnetv2_18", 8), ("convnext_atto", 0), (LITE, 0)],
)
def test_prepared_for_inference(name, left, frozen):
    """``left`` batch norms come before a convolution and stay."""
    options = ["MODEL.TIMM.FREEZE_BATCH_NORM", frozen]
    model = randomized(build_model(configuration("deformable_detr", name, *options)))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prepared = prepare_for_inference(model)
    norms = [m for m in prepared.backbone.modules() if hasattr(m, "running_mean")]
    assert len(norms) == left
    batch = model.preprocess_image(make_batch())
    with torch.no_grad():
        features = model.backbone(batch.tensor)
        got = prepared.backbone(batch.tensor)
    for key, expected in features.items():
        assert (got[key] - expected).norm() <= 1e-5 * expected.norm()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


class ReadTwice(nn.Module):
    """A feature that reads what goes into its batch norm as well."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, images):
        output = self.convolution(images)
        return [self.norm(output) + output]


def test_prepared_for_inference_where_a_convolution_is_read_twice():
    backbone = TimmBackbone(SMALL, ["res3"])
    backbone.features = randomized(ReadTwice())
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = backbone(images)["res3"]
        torch.testing.assert_close(prepare_for_inference(backbone)(images)["res3"], expected)


def efficientnet_pytorch(model):
    """State of timm's EfficientNet-Lite under the names of efficientnet_pytorch."""
    state = {}

    def put(module, name):
        state.update({f"{name}.{key}": tensor for key, tensor in module.state_dict().items()})

    put(model.conv_stem, "_conv_stem"), put(model.bn1, "_bn0")
    blocks = [block for stage in model.blocks for block in stage]
    for number, block in enumerate(blocks):
        there = f"_blocks.{number}"
        put(block.conv_dw, f"{there}._depthwise_conv")
        if number:
            put(block.conv_pw, f"{there}._expand_conv"), put(block.bn1, f"{there}._bn0")
            put(block.bn2, f"{there}._bn1"), put(block.bn3, f"{there}._bn2")
            put(block.conv_pwl, f"{there}._project_conv")
        else:
            put(block.bn1, f"{there}._bn1"), put(block.bn2, f"{there}._bn2")
            put(block.conv_pw, f"{there}._project_conv")
    put(model.conv_head, "_conv_head"), put(model.bn2, "_bn1"), put(model.classifier, "_fc")
    return state


@pytest.mark.parametrize(
    "name, names_of",
    [
        (SMALL, nn.Module.state_dict),
        ("resnet18", nn.Module.state_dict),
        (LITE, efficientnet_pytorch),
    ],
)
def test_weights_of_a_file(name, names_of, tmp_path):
    whole = randomized(timm.create_model(name))
    torch.save(names_of(whole), tmp_path / "weights.pth")
    model = build_model(configuration(name=name))
    DetrCheckpointer(model).load(f"timm://{name}/{tmp_path}/weights.pth", checkpointables=[])
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        got = model.eval().backbone.features(images)
        expected = whole.forward_intermediates(images, intermediates_only=True)
    for ours, theirs in zip(got, expected[-3:], strict=True):
        torch.testing.assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max())


def test_weights_of_the_hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    name = f"{SMALL}.lamb_in1k"
    folder = tmp_path / "models" / "timm" / name
    folder.mkdir(parents=True)
    state = timm.create_model(SMALL).state_dict()
    save_file(state, folder / "model.safetensors")
    with Hub(tmp_path / "models") as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        weights = read_weights(f"timm://{name}").model
    stem = "backbone.features.model.conv_stem.weight"
    assert torch.equal(weights[stem], state["conv_stem.weight"])
    assert not any("classifier" in key for key in weights)


def test_a_run_its_resumption_and_its_checkpoint(train_net, shapes_opts, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model(SMALL).state_dict(), weights)
    run = [
        *("--config-file", str(ROOT / "configs" / "deformable_detr.yaml"), "--resume"),
        *options(SMALL, *shapes_opts, "OUTPUT_DIR", str(tmp_path / "run")),
        *("MODEL.DEFORMABLE_DETR.NUM_CLASSES", "0", "DATASETS.TEST", "()"),
        *("MODEL.WEIGHTS", f"timm://{SMALL}/{weights}", "SOLVER.AMP.ENABLED", "True"),
    ]
    first = train_net(*run, "SOLVER.MAX_ITER", "1")
    assert first.returncode == 0, first.stderr
    shutil.move(weights, tmp_path / "moved")  # nothing needs it any more
    second = train_net(*run, "SOLVER.MAX_ITER", "2")
    assert second.returncode == 0, second.stderr
    assert "Starting training from iteration 1" in second.stdout
    detector = Detector(tmp_path / "run" / "model_final.pth")
    assert detector.cfg.MODEL.TIMM.NAME == SMALL
    saved = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    name = "backbone.features.model.conv_stem.weight"
    state = DetrCheckpointer(build_model(detector.cfg)).model.state_dict()
    assert saved[name].shape == state[name].shape


@pytest.mark.parametrize(
    "weights, of, message",
    [
        ("resnet18", SMALL, "is not of mobilenetv3_small_050: .* left over"),
        ("mobilenetv3_small_075", SMALL, "differ in shape"),
    ],
)
def test_weights_of_another_model(weights, of, message, tmp_path):
    torch.save(timm.create_model(weights).state_dict(), tmp_path / "weights.pth")
    model = build_model(configuration(name=of))
    with pytest.raises(UserError, match=message):
        DetrCheckpointer(model).load(f"timm://{of}/{tmp_path}/weights.pth", checkpointables=[])


@pytest.mark.parametrize(
    "variant, name, message",
    [
        ("deformable_detr", "convnext_tin", "no model of timm; did you mean convnext_tiny?"),
        ("deformable_detr", "resnet18.nobody", "Invalid pretrained tag"),
        ("deformable_detr", "vit_tiny_patch16_224", r"names res3, res5, but .* res4 \(stride 16\)"),
        ("deformable_detr", "levit_128s", "IN_FEATURES names res3"),
        ("deformable_detr_single_scale_dc5", SWIN, "cannot dilate its last stage"),
        ("deformable_detr_single_scale", "coat_lite_tiny", "does not take images of any size"),
    ],
)
def test_what_a_model_lacks(variant, name, message):
    with pytest.raises(UserError, match=message):
        build_detr_backbone(configuration(variant, name))


def test_a_plain_vision_transformer_has_one_feature():
    features = ["MODEL.DEFORMABLE_DETR.IN_FEATURES", "['res4']"]
    model = build_model(configuration("deformable_detr", "vit_tiny_patch16_224", *features))
    losses = model.train()([make_input(60, 90, [[5, 5, 40, 30]])])
    assert all(loss.isfinite() for loss in losses.values())


def test_timm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build_detr_backbone(configuration())


@pytest.mark.parametrize(
    "variant, parameters", [("swin_t", 41_702_086), ("convnext_t", 42_002_860)]
)
def test_configurations_for_coco(variant, parameters):
    name = f"deformable_detr_refine_two_stage_{variant}"
    opts = ("MODEL.DEVICE", "cpu", "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "80")
    cfg = setup_cfg(str(ROOT / "configs" / f"{name}.yaml"), opts)
    model = build_model(cfg)  # fetches nothing
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    assert cfg.MODEL.WEIGHTS == f"timm://{cfg.MODEL.TIMM.NAME}"
