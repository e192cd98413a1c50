"""Weights of other implementations arrive in the right place, whatever file they come in."""

import argparse
import json
import pickle

from ddetr_d2.checkpoint import DetrCheckpointer, read_class_names
from ddetr_d2.checkpoint.architecture import built_options
from ddetr_d2.checkpoint.formats import COCO_IDS, COCO_NAMES, read_weights
from ddetr_d2.checkpoint.names import REFERENCE, rename, reverse, split_heads
from ddetr_d2.checkpoint.transformers import from_transformers, to_transformers
from ddetr_d2.checkpoint.writing import to_reference, write_checkpoint, write_transformers
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError

import numpy as np
import pytest
import timm
import torch
import torchvision
from detectron2.modeling import build_model
from safetensors.torch import load_file, save_file
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import AutoImageProcessor, DeformableDetrConfig, DeformableDetrForObjectDetection

from ..conftest import ROOT, TINY, VARIANTS
from .foreign import as_caffe2, as_detrex, as_reference

# timm has the dilated ResNet, in its usual widths alone.
USUAL_WIDTHS = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "256"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "64"),
]

DETREX_EPS = ("MODEL.DEFORMABLE_DETR.INVERSE_SIGMOID_EPS", "0.001")


def configure(variant, classes, *opts):
    opts = [*TINY, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", str(classes), *opts]
    if variant.endswith("dc5"):
        opts += USUAL_WIDTHS
    return setup_cfg(str(ROOT / "configs" / f"{variant}.yaml"), opts)


def build(variant="deformable_detr", classes=3, *opts):
    """A tiny model without two equal tensors of one shape."""
    model = build_model(configure(variant, classes, *opts))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "num_batches_tracked" not in name:
                tensor.add_(torch.rand_like(tensor))
    return model


def weights_of(model):
    return {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def assert_same(states, expected):
    assert states.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(states[name], tensor), name


def save_reference(path, state, **args):
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    content = {
        "model": as_reference(state, encoder=1, decoder=2),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 40).state_dict(),
        "epoch": 49,
        "args": argparse.Namespace(lr=2e-4, device="cuda", lr_drop_epochs=None, **args),
    }
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_with_91_outputs(variant, tmp_path):
    source = build(variant, 91)
    args = {"dilation": variant.endswith("dc5"), "nheads": 8}
    path = save_reference(tmp_path / "checkpoint.pth", source.state_dict(), **args)
    assert read_class_names(path) == COCO_NAMES

    by_id = build(variant, 91)
    DetrCheckpointer(by_id, strict=True).load(path)
    assert_same(weights_of(by_id), weights_of(source))

    contiguous = build(variant, 80)
    DetrCheckpointer(contiguous, strict=True).load(path)
    expected = weights_of(source)
    for name, tensor in expected.items():
        if "queries.head.class_embed" in name:
            expected[name] = tensor[:80]  # output 0 chooses the queries
        elif "class_embed" in name:
            expected[name] = tensor[[category for category in range(91) if category in COCO_IDS]]
    assert_same(weights_of(contiguous), expected)


def test_reference_names_of_the_backbone_are_those_of_torchvision():
    ours = as_reference(build("deformable_detr", 3, *USUAL_WIDTHS).state_dict(), 1, 2)
    norm = torchvision.ops.FrozenBatchNorm2d
    theirs = torchvision.models.resnet50(norm_layer=norm).state_dict()
    body = {k.removeprefix("backbone.0.body."): v for k, v in ours.items() if k.startswith("back")}
    assert {k: v.shape for k, v in body.items()} == {
        k: v.shape for k, v in theirs.items() if not k.startswith("fc.")
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_to_the_reference(variant, tmp_path):
    state = build(variant).state_dict()
    written = to_reference(state)
    assert_same(written, as_reference(state, encoder=1, decoder=2))
    write_checkpoint(str(tmp_path / "a.pth"), written)
    assert_same(
        read_weights(str(tmp_path / "a.pth")).model,
        {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    )


def test_dilation_of_the_reference_has_to_be_that_of_the_model(tmp_path):
    source = build("deformable_detr_single_scale", 3, *USUAL_WIDTHS)
    path = save_reference(tmp_path / "a.pth", source.state_dict(), dilation=True)
    with pytest.raises(UserError, match="other settings.*MODEL.RESNETS.RES5_DILATION 2"):
        DetrCheckpointer(source, strict=True).load(path)
    DetrCheckpointer(build("deformable_detr_single_scale_dc5"), strict=True).load(path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_detrex(variant, tmp_path):
    source = build(variant, 80)
    features = 1 if "single_scale" in variant else 3
    state = as_detrex(source.state_dict(), encoder=1, decoder=2, features=features)
    torch.save({"model": state, "iteration": 374999}, tmp_path / "a.pth")
    target = build(variant, 80, *DETREX_EPS)
    DetrCheckpointer(target, strict=True).load(str(tmp_path / "a.pth"))
    assert_same(weights_of(target), weights_of(source))
    assert read_class_names(str(tmp_path / "a.pth")) == COCO_NAMES


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "module."])
def test_prefixes_of_compiled_and_parallel_models(prefix, tmp_path):
    source = build("deformable_detr", 3)
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    target = build("deformable_detr", 3)
    DetrCheckpointer(target, strict=True).load(str(tmp_path / "a.pth"))
    assert_same(weights_of(target), weights_of(source))


def test_detrex_weights_need_its_limit_of_the_inverse_sigmoid(tmp_path, caplog):
    """It moves the boxes of refined models near the border and shows in no shape."""
    variant = "deformable_detr_refine"
    state = build(variant, 80).state_dict()
    torch.save(as_detrex(state, encoder=1, decoder=2, features=3), tmp_path / "theirs.pth")
    setting = "other settings than this one: MODEL.DEFORMABLE_DETR.INVERSE_SIGMOID_EPS "
    with pytest.raises(UserError, match=f"theirs.pth.*{setting}0.001$"):
        DetrCheckpointer(build(variant, 80), strict=True).load(str(tmp_path / "theirs.pth"))
    DetrCheckpointer(build(variant, 80)).load(str(tmp_path / "theirs.pth"))  # training may
    assert f"{setting}0.001" in caplog.text

    # It stays with the weights, whatever they are written as.
    model = build(variant, 80, *DETREX_EPS)
    DetrCheckpointer(model, str(tmp_path)).save("own")
    options = built_options(model)
    write_checkpoint(str(tmp_path / "reference.pth"), to_reference(state), options=options)
    caplog.clear()
    write_transformers(str(tmp_path), state, configure(variant, 80, *DETREX_EPS))
    assert "EPS is 0.001, but transformers always computes with 1e-05: boxes" in caplog.text
    for name in ("own.pth", "reference.pth", ""):
        DetrCheckpointer(model, strict=True).load(str(tmp_path / name))
        with pytest.raises(UserError, match=f"{setting}0.001$"):
            DetrCheckpointer(build(variant, 80), strict=True).load(str(tmp_path / name))

    # Others have the usual one, and checkpoints of this project without a word on it any.
    caplog.clear()
    write_checkpoint(str(tmp_path / "reference.pth"), to_reference(state))
    write_transformers(str(tmp_path), state, configure(variant, 80))
    assert not caplog.text
    assert "inverse_sigmoid_eps" not in (tmp_path / "config.json").read_text()
    for name in ("reference.pth", ""):
        DetrCheckpointer(build(variant, 80), strict=True).load(str(tmp_path / name))
        with pytest.raises(UserError, match=f"{setting}1e-05$"):
            DetrCheckpointer(model, strict=True).load(str(tmp_path / name))
    write_checkpoint(str(tmp_path / "old.pth"), state)
    DetrCheckpointer(model, strict=True).load(str(tmp_path / "old.pth"))


def test_heads_of_an_untrained_two_stage_model_stay_apart():
    # All of them start with the same box layers; those without refinement are one head.
    for variant in ("deformable_detr_refine_two_stage", "deformable_detr_refine"):
        state = build_model(configure(variant, 3)).state_dict()
        head = {k: v for k, v in state.items() if k.startswith("transformer.decoder.heads.0.")}
        for name in head:
            state[name.replace("heads.0.", "heads.1.")] = state[name]
        reference = as_reference(state, encoder=1, decoder=2)
        expected = {k for k in state if "num_batches" not in k}
        assert read_back(reference).keys() == expected
        if "two_stage" in variant:  # its heads are told apart without the copies as well
            single = {k: v for k, v in reference.items() if "decoder.bbox_embed" not in k}
            assert read_back(single).keys() == expected


def read_back(reference):
    return split_heads(rename(reference, reverse(REFERENCE)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_and_back(variant, tmp_path):
    cfg = configure(variant, 3)
    source = build(variant)
    write_transformers(str(tmp_path), source.state_dict(), cfg, ["cat", "dog", "N/A"])
    theirs, report = DeformableDetrForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "N/A"}
    assert theirs.config.label2id == {"cat": 0, "dog": 1, "N/A": 2}
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.size["shortest_edge"] == 96

    theirs.save_pretrained(tmp_path / "again")
    written = load_file(tmp_path / "model.safetensors")
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), written)
    assert_same(from_transformers(theirs.state_dict()), weights_of(source))

    for folder in (tmp_path, tmp_path / "again"):
        target = build(variant)
        DetrCheckpointer(target, strict=True).load(str(folder))
        assert_same(weights_of(target), weights_of(source))
        assert read_class_names(str(folder)) == ["cat", "dog", "N/A"]
    assert read_weights(str(folder)).options["MODEL.DEFORMABLE_DETR.NUM_QUERIES"] == 20


def test_class_head_that_transformers_shares_among_the_layers(tmp_path):
    variant = "deformable_detr_refine"
    write_transformers(str(tmp_path), build(variant).state_dict(), configure(variant, 3))
    # A new model, unlike one that is loaded, has one class head for all layers.
    config = DeformableDetrConfig.from_pretrained(tmp_path)
    DeformableDetrForObjectDetection(config).save_pretrained(tmp_path / "new")
    assert "class_embed.1.bias" not in load_file(tmp_path / "new" / "model.safetensors")
    target = build(variant)
    DetrCheckpointer(target, strict=True).load(str(tmp_path / "new"))
    first, second = (head.class_embed for head in target.transformer.decoder.heads)
    assert torch.equal(first.weight, second.weight)
    first, second = (head.bbox_embed[0] for head in target.transformer.decoder.heads)
    assert not torch.equal(first.weight, second.weight)


def test_image_format_bgr_becomes_rgb_in_transformers():
    cfg = configure("deformable_detr", 3, "INPUT.FORMAT", "BGR")
    model = build()
    written, _ = to_transformers(model.state_dict(), cfg)
    stem = "model.backbone.conv_encoder.model.embedder.embedder.convolution.weight"
    assert torch.equal(written[stem], model.backbone.stem.conv1.weight.flip(1))


def test_backbones_that_transformers_does_not_have():
    cfg = configure("deformable_detr_refine_two_stage_x101_dcn", 3, *USUAL_WIDTHS)
    with pytest.raises(UserError, match="no backbone like this one"):
        to_transformers({}, cfg)


def coco_labels():
    labels = {str(number): "N/A" for number in range(91)}
    return labels | {str(i): name for i, name in zip(COCO_IDS, COCO_NAMES, strict=True)}


def timm_folder(folder, **changes):
    """A folder as the published ones: a backbone of timm, 91 labels."""
    labels = changes.pop("labels", coco_labels())
    config = DeformableDetrConfig(
        d_model=64, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
        num_queries=20, id2label={int(k): v for k, v in labels.items()},
        label2id={v: int(k) for k, v in labels.items()}, **changes,
    )  # fmt: skip
    model = DeformableDetrForObjectDetection(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.rand_like(tensor))
    model.save_pretrained(folder, max_shard_size="40MB")
    return model


def test_sharded_folder_with_91_labels(tmp_path):
    theirs = timm_folder(tmp_path, with_box_refine=True, two_stage=True)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert read_class_names(str(tmp_path)) == COCO_NAMES
    model = build("deformable_detr_refine_two_stage", 80, *USUAL_WIDTHS)
    DetrCheckpointer(model, strict=True).load(str(tmp_path))
    heads = theirs.model.decoder.class_embed
    ours = model.transformer.decoder.heads
    assert torch.equal(ours[0].class_embed.weight, heads[0].weight[COCO_IDS])
    assert torch.equal(ours[1].class_embed.bias, heads[1].bias[COCO_IDS])
    assert torch.equal(model.transformer.queries.head.class_embed.weight, heads[2].weight[:80])
    stem = theirs.model.backbone.model.conv1.weight
    assert torch.equal(model.backbone.stem.conv1.weight, stem)

    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors do not exist"):
        read_weights(str(tmp_path))


def test_91_classes_of_another_data_set_stay(tmp_path):
    cfg = configure("deformable_detr", 91)
    source = build(classes=91)
    names = [f"thing {number}" for number in range(91)]
    write_transformers(str(tmp_path), source.state_dict(), cfg, names)
    assert read_class_names(str(tmp_path)) == names
    DetrCheckpointer(source, strict=True).load(str(tmp_path))
    with pytest.raises(UserError, match="91, 64.* in the file, .80, 64. in the model"):
        DetrCheckpointer(build(classes=80), strict=True).load(str(tmp_path))


def test_safetensors_without_a_folder(tmp_path):
    source = build("deformable_detr_refine")
    written, _ = to_transformers(source.state_dict(), configure("deformable_detr_refine", 3))
    save_file(written, tmp_path / "somewhere.bin")
    target = build("deformable_detr_refine")
    DetrCheckpointer(target, strict=True).load(str(tmp_path / "somewhere.bin"))
    assert_same(weights_of(target), weights_of(source))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "detr"}, "of a 'detr' model"),
        ({"position_embedding_type": "learned"}, "'learned'; only 'sine'"),
        ({"activation_function": "gelu"}, "'gelu'; only 'relu'"),
        (None, "no configuration"),
    ],
)
def test_folders_of_other_models(change, words, tmp_path):
    write_transformers(str(tmp_path), build().state_dict(), configure("deformable_detr", 3))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change) if change else "[]")
    with pytest.raises(UserError, match=f"config.json.*{words}"):
        read_weights(str(tmp_path))


def save_arrays(state, path):
    path.write_bytes(pickle.dumps({k: v.numpy() for k, v in state.items()}, protocol=2))


@pytest.mark.parametrize(
    "library, name, save",
    [
        (torchvision.models, "resnet50", torch.save),
        (torchvision.models, "resnext50_32x4d", save_arrays),
        (timm.models, "resnet50", save_file),
    ],
)
def test_backbones_give_the_same_features(library, name, save, tmp_path):
    theirs = getattr(library, name)().eval()
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.dtype == torch.float32 and tensor.dim() == 1:
                tensor.add_(0.1 * torch.rand_like(tensor))
    save(theirs.state_dict(), tmp_path / "file")
    theirs = theirs.double()
    image = torch.rand(1, 3, 64, 64, dtype=torch.double)
    if library is timm.models:
        expected = theirs.forward_intermediates(image, intermediates_only=True)[2:]
    else:
        extract = create_feature_extractor(theirs, ["layer2", "layer3", "layer4"])
        expected = list(extract(image).values())
    opts = [*USUAL_WIDTHS, *("MODEL.RESNETS.NORM", "FrozenBN")]
    if name.startswith("resnext"):
        opts += ["MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"]
    model = build_model(configure("deformable_detr", 3, *opts)).eval()
    DetrCheckpointer(model).load(str(tmp_path / "file"))
    features = model.double().backbone(image)
    for level, feature in zip(("res3", "res4", "res5"), expected, strict=True):
        torch.testing.assert_close(features[level], feature, rtol=1e-9, atol=1e-9)


def test_caffe2_backbone(tmp_path):
    opts = ["MODEL.RESNETS.NORM", "FrozenBN"]
    source, target = build("deformable_detr", 3, *opts), build("deformable_detr", 3, *opts)
    blobs = {k: v.numpy() for k, v in as_caffe2(source.backbone.state_dict()).items()}
    blobs |= {"conv1_b": np.zeros(16, "f"), "pred_w": np.zeros((9, 9), "f"), "lr": np.float32(1)}
    (tmp_path / "X.pkl").write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    DetrCheckpointer(target).load(str(tmp_path / "X.pkl"))
    ours = target.backbone.state_dict()
    for name, tensor in source.backbone.state_dict().items():
        if name.endswith("running_mean"):
            tensor = torch.zeros_like(tensor)
        elif name.endswith("running_var"):
            tensor = torch.ones_like(tensor)
        assert torch.equal(ours[name], tensor), name


def test_unknown_names(tmp_path):
    torch.save({"model": {"encoder.weight": torch.zeros(2)}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="unknown model .encoder.weight"):
        read_weights(str(tmp_path / "a.pth"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder without model.safetensors"):
        read_weights(str(tmp_path / "folder"))
