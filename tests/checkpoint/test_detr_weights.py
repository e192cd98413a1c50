"""Weights of DETR: other implementations' names, classes with "no object", the right member."""

import argparse
import dataclasses
import json

from ddetr_d2.checkpoint import DetrCheckpointer, read_class_names
from ddetr_d2.checkpoint.formats import COCO_IDS, COCO_NAMES, read_weights
from ddetr_d2.checkpoint.transformers import from_transformers, to_transformers
from ddetr_d2.checkpoint.writing import to_reference, write_checkpoint, write_transformers
from ddetr_d2.errors import UserError

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, DetrConfig, DetrForObjectDetection

from .foreign import as_reference_detr
from .test_formats import (
    USUAL_WIDTHS,
    assert_same,
    build,
    coco_labels,
    configure,
    weights_of,
)

CLASS_LOSS = "MODEL.DEFORMABLE_DETR.CLASS_LOSS"


def save_reference(path, state, **args):
    content = {"model": as_reference_detr(state, encoder=1, decoder=2), "epoch": 299}
    if args:
        content["args"] = argparse.Namespace(lr=1e-4, position_embedding="sine", **args)
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("dilation", [1, 2])
def test_reference_with_92_outputs(dilation, tmp_path):
    options = ("MODEL.RESNETS.RES5_DILATION", str(dilation))
    source = build("detr", 91, *options)
    args = {"dilation": dilation == 2, "nheads": 8, "num_queries": 20}
    path = save_reference(tmp_path / "a.pth", source.state_dict(), **args)
    assert read_weights(path).format == "reference implementation"
    assert read_class_names(path) == COCO_NAMES

    by_id = build("detr", 91, *options)
    DetrCheckpointer(by_id, strict=True).load(path)
    assert_same(weights_of(by_id), weights_of(source))

    contiguous = build("detr", 80, *options)
    DetrCheckpointer(contiguous, strict=True).load(path)
    expected = weights_of(source)
    for name, tensor in expected.items():
        if "class_embed" in name:
            assert len(tensor) == 92
            expected[name] = torch.cat((tensor[COCO_IDS], tensor[-1:]))  # "no object"
    assert_same(weights_of(contiguous), expected)


@pytest.mark.parametrize("variant", ["detr", "detr_dc5_plus"])
def test_to_the_reference_and_back(variant, tmp_path):
    source = build(variant)
    written = to_reference(source.state_dict())
    assert_same(written, as_reference_detr(source.state_dict(), encoder=1, decoder=2))
    write_checkpoint(str(tmp_path / "a.pth"), written)
    assert_same(read_weights(str(tmp_path / "a.pth")).model, weights_of(source))


def test_layers_of_the_reference_are_those_of_pytorch():
    """Whose code it is made of: where each norm belongs shows in what a layer computes."""
    model = build("detr", 3, "MODEL.DEFORMABLE_DETR.DROPOUT", "0.0").double()
    state = to_reference(model.state_dict())
    options = {"d_model": 64, "nhead": 8, "dim_feedforward": 128, "dropout": 0.0}
    theirs = {
        "encoder": torch.nn.TransformerEncoderLayer(**options, batch_first=True),
        "decoder": torch.nn.TransformerDecoderLayer(**options, batch_first=True),
    }
    for kind, layer in theirs.items():
        start = f"transformer.{kind}.layers.0."
        weights = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        layer.double().load_state_dict(weights)
    levels = model.projection([torch.randn(2, 256, 3, 4).double()], None)
    # PyTorch's layers know no positions.
    levels = dataclasses.replace(levels, position=torch.zeros_like(levels.position))
    memory = model.transformer.encoder.layers[0](levels.tokens, levels)
    torch.testing.assert_close(memory, theirs["encoder"](levels.tokens))
    content = torch.randn(2, 5, 64).double()
    ours = model.transformer.decoder.layers[0](
        content, torch.zeros_like(content), None, memory, levels
    )
    torch.testing.assert_close(ours, theirs["decoder"](content, memory))


@pytest.mark.parametrize("variant", ["detr", "detr_dc5"])
def test_transformers_and_back(variant, tmp_path):
    source = build(variant)
    write_transformers(
        str(tmp_path), source.state_dict(), configure(variant, 3), ["cat", "dog", "N/A"]
    )
    theirs, report = DetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "N/A"}
    assert theirs.config.eos_coefficient == 0.1
    assert type(AutoImageProcessor.from_pretrained(tmp_path)).__name__.startswith("DetrImage")

    theirs.save_pretrained(tmp_path / "again")
    written = load_file(tmp_path / "model.safetensors")
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), written)
    assert_same(from_transformers(theirs.state_dict()), weights_of(source))
    for folder in (tmp_path, tmp_path / "again"):
        target = build(variant)
        DetrCheckpointer(target, strict=True).load(str(folder))
        assert_same(weights_of(target), weights_of(source))
        assert read_class_names(str(folder)) == ["cat", "dog", "N/A"]

    save_file(written, tmp_path / "somewhere.bin")  # without its configuration
    (tmp_path / "alone").mkdir()
    (tmp_path / "somewhere.bin").rename(tmp_path / "alone" / "x.bin")
    assert_same(read_weights(str(tmp_path / "alone" / "x.bin")).model, weights_of(source))


def test_transformers_folder_as_published(tmp_path):
    """A backbone of timm, 91 labels and 92 outputs."""
    labels = coco_labels()
    config = DetrConfig(
        d_model=64, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
        num_queries=20, id2label={int(k): v for k, v in labels.items()},
        label2id={v: int(k) for k, v in labels.items()}, dilation=True,
    )  # fmt: skip
    theirs = DetrForObjectDetection(config)
    theirs.save_pretrained(tmp_path)
    assert read_class_names(str(tmp_path)) == COCO_NAMES
    model = build("detr_dc5", 80)
    DetrCheckpointer(model, strict=True).load(str(tmp_path))
    head = model.transformer.decoder.heads[0]
    given = theirs.class_labels_classifier
    assert torch.equal(head.class_embed.weight, given.weight[[*COCO_IDS, 91]])
    assert torch.equal(head.class_embed.bias, given.bias[[*COCO_IDS, 91]])
    assert torch.equal(model.backbone.stem.conv1.weight, theirs.model.backbone.model.conv1.weight)
    with pytest.raises(UserError, match="other settings.*RES5_DILATION 2$"):
        DetrCheckpointer(build("detr", 80, *USUAL_WIDTHS), strict=True).load(str(tmp_path))


@pytest.mark.parametrize("kind", ["deformable_detr", "table-transformer"])
def test_configuration_of_another_model(kind, tmp_path):
    write_transformers(str(tmp_path), build("detr").state_dict(), configure("detr", 3))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(UserError, match=f"config.json is of a '{kind}' model; a 'detr' is needed"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize(
    "variant, setting, words",
    [
        ("detr_dc5_plus", (), "CLASS_LOSS is focal"),
        ("deformable_detr", (CLASS_LOSS, "cross_entropy"), "CLASS_LOSS is cross_entropy"),
        (
            "deformable_detr",
            ("MODEL.DEFORMABLE_DETR.MULTI_SCALE_ATTENTION", "False"),
            "MULTI_SCALE_ATTENTION is False",
        ),
    ],
)
def test_models_that_transformers_does_not_have(variant, setting, words):
    with pytest.raises(UserError, match=f"transformers has .* only .*{words}"):
        to_transformers({}, configure(variant, 3, *setting))
