"""What DetrCheckpointer loads, and what it refuses."""

import pickle
from argparse import Namespace

from ddetr_d2.checkpoint import DetrCheckpointer, read_class_names
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError

import pytest
import torch
from detectron2.modeling import build_model

from ..conftest import ROOT, TINY


def build(*opts, variant="deformable_detr"):
    classes = ("MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3")
    return build_model(
        setup_cfg(str(ROOT / "configs" / f"{variant}.yaml"), [*TINY, *classes, *opts])
    )


def imagenet_file(folder, model):
    """The model's backbone as a file of Detectron2's model zoo."""
    weights = {
        name: tensor.numpy()
        for name, tensor in model.backbone.state_dict().items()
        if "num_batches_tracked" not in name
    }
    path = folder / "R-50.pkl"
    content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    return str(path)


def test_class_names_travel_with_the_weights(tmp_path):
    model = build()
    DetrCheckpointer(model, str(tmp_path), class_names=["a", "b", "c"]).save("named")
    assert read_class_names(str(tmp_path / "named.pth")) == ["a", "b", "c"]
    DetrCheckpointer(model, str(tmp_path)).save("nameless")
    assert read_class_names(str(tmp_path / "nameless.pth")) is None
    other = build()
    DetrCheckpointer(other, strict=True).load(str(tmp_path / "named.pth"))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def class_heads(model):
    """Weights and biases of the class heads, those of the decoder and those of the proposals."""
    state = model.state_dict()
    heads = {name: tensor for name, tensor in state.items() if "class_embed" in name}
    return (
        {name: x for name, x in heads.items() if ".decoder." in name},
        {name: x for name, x in heads.items() if ".queries." in name},
    )


def test_training_from_other_classes_keeps_the_heads_of_the_same_names(tmp_path, caplog):
    variant = "deformable_detr_refine_two_stage"
    source, target = build(variant=variant), build(variant=variant)
    torch.nn.init.normal_(source.transformer.queries.head.class_embed.bias)
    DetrCheckpointer(source, str(tmp_path), class_names=["cat", "dog", "cow"]).save("pets")
    fresh = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    checkpointer = DetrCheckpointer(target, class_names=["dog", "horse", "CAT"])
    checkpointer.load(str(tmp_path / "pets.pth"), checkpointables=[])
    assert "2 keep their heads (dog, CAT), 1 start anew (horse)" in caplog.text
    (given, given_proposals), (decoder, proposals) = class_heads(source), class_heads(target)
    for name, tensor in decoder.items():
        assert torch.equal(tensor[0], given[name][1]), name
        assert torch.equal(tensor[1], fresh[name][1]), name
        assert torch.equal(tensor[2], given[name][0]), name
    for name, tensor in proposals.items():  # output 0 says "object"
        assert torch.equal(tensor[0], given_proposals[name][0]), name
        assert torch.equal(tensor[1:], fresh[name][1:]), name
    names = [name for name in target.state_dict() if "class_embed" not in name]
    assert all(torch.equal(target.state_dict()[n], source.state_dict()[n]) for n in names)


def test_more_classes_than_the_weights_have(tmp_path):
    source, target = build(), build("MODEL.DEFORMABLE_DETR.NUM_CLASSES", "5")
    DetrCheckpointer(source, str(tmp_path), class_names=["cat", "dog", "cow"]).save("pets")
    names = ["a", "cow", "b", "dog", "c"]
    DetrCheckpointer(target, class_names=names).load(str(tmp_path / "pets.pth"), checkpointables=[])
    (given, _), (decoder, _) = class_heads(source), class_heads(target)
    for name, tensor in decoder.items():
        assert torch.equal(tensor[[1, 3]], given[name][[2, 1]]), name


@pytest.mark.parametrize("variant", ["deformable_detr", "detr"])
@pytest.mark.parametrize("queries", [5, 20])
def test_training_with_another_number_of_queries_keeps_those_that_fit(
    variant, queries, tmp_path, caplog
):
    key = "MODEL.DEFORMABLE_DETR.NUM_QUERIES"
    source = build(key, "12", variant=variant)
    target = build(key, str(queries), variant=variant)
    DetrCheckpointer(source, str(tmp_path)).save("twelve")
    fresh = target.transformer.queries.query_embed.weight.detach().clone()
    path = str(tmp_path / "twelve.pth")
    with pytest.raises(UserError, match=f"{key} 12"):
        DetrCheckpointer(target, strict=True).load(path)
    with pytest.raises(UserError, match=f"{key} 12"):
        DetrCheckpointer(target).load(path)  # of a run to be resumed
    DetrCheckpointer(target).load(path, checkpointables=[])
    kept = min(queries, 12)
    assert f"the first {kept} are kept, {queries - kept} start anew" in caplog.text
    got = target.transformer.queries.query_embed.weight
    assert torch.equal(got[:kept], source.transformer.queries.query_embed.weight[:kept])
    assert torch.equal(got[kept:], fresh[kept:])


def test_a_run_is_resumed_with_its_classes(tmp_path):
    DetrCheckpointer(build(), str(tmp_path), class_names=["cat", "dog", "cow"]).save("pets")
    for names in (["dog", "cat", "cow"], ["cat", "dog", "sheep"]):
        checkpointer = DetrCheckpointer(build(), str(tmp_path), class_names=names)
        with pytest.raises(UserError, match="was trained on the classes cat, dog, cow, but"):
            checkpointer.resume_or_load("", resume=True)
    DetrCheckpointer(build(), str(tmp_path), class_names=["cat", "dog", "cow"]).resume_or_load(
        "", resume=True
    )


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_imagenet_backbone(norm, tmp_path):
    source = build("MODEL.RESNETS.NORM", norm)
    target = build("MODEL.RESNETS.NORM", norm)
    path = imagenet_file(tmp_path, source)
    DetrCheckpointer(target).load(path)
    state = target.backbone.state_dict()
    for name, tensor in source.backbone.state_dict().items():
        assert torch.equal(state[name], tensor), name
    with pytest.raises(UserError, match="does not fit"):
        DetrCheckpointer(target, strict=True).load(path)


@pytest.mark.parametrize(
    "setting, other, words",
    [
        ("DEPTH", ("50", "101"), "255 parameters are missing, the first backbone.res4.6"),
        ("DEPTH", ("101", "50"), "255 are left over, the first backbone.res4.6"),
        ("WIDTH_PER_GROUP", ("8", "16"), "176 differ in shape, the first backbone.res2.0"),
    ],
)
def test_imagenet_backbone_of_another_depth_or_width(setting, other, words, tmp_path):
    key = f"MODEL.RESNETS.{setting}"
    in_file, in_model = other
    path = imagenet_file(tmp_path, build(key, in_file))
    with pytest.raises(UserError, match=f"does not fit this model: {words}") as caught:
        DetrCheckpointer(build(key, in_model)).load(path)
    assert str(caught.value).endswith(f"Settings that fit them: {key} {in_file}")


def test_imagenet_backbone_for_deformable_convolutions(tmp_path):
    path = imagenet_file(tmp_path, build())
    DetrCheckpointer(build("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]")).load(
        path
    )


def write(path, content):
    with open(path, "wb") as file:
        torch.save(content, file)


@pytest.mark.parametrize(
    "content", [3, [1, 2], torch.zeros(3), {"model": {}}, {"model": [1]}, Namespace(a=1)]
)
def test_files_without_weights(content, tmp_path):
    path = str(tmp_path / "x.pth")
    write(path, content)
    with pytest.raises(UserError, match="x.pth"):
        DetrCheckpointer(build()).load(path)


@pytest.mark.parametrize("name", ["x.pth", "x.pkl", "x.pyth", "x.txt"])
@pytest.mark.parametrize("content", [b"", b"abc", b"hello hello", pickle.dumps([1])])
def test_files_of_other_kinds(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as weights|holds no weights"):
        DetrCheckpointer(build()).load(str(path))
    if name == "x.pth":
        with pytest.raises(UserError, match="cannot be read as weights|holds no weights"):
            read_class_names(str(path))


@pytest.mark.parametrize("strict", [False, True])
def test_nothing_of_a_partial_file_is_loaded(strict, tmp_path):
    path = str(tmp_path / "partial.pth")
    state = build().state_dict()
    gone = [name for name in state if ".encoder.layers.0.ffn." in name]
    for name in gone:
        state[name.replace("ffn", "mlp")] = state.pop(name)
    state["transformer.queries.query_embed.weight"] = torch.zeros(7, 128)
    write(path, {"model": state})
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        DetrCheckpointer(model, strict=strict).load(path)
    lines = str(caught.value).splitlines()
    assert path in lines[0]
    assert "6 parameters are missing" in lines[0]
    assert "1 differ in shape" in lines[0]
    assert "6 are left over" in lines[0]
    assert [line.split() for line in lines[2:4]] == [
        ["missing", "2", "transformer.encoder.layers.*.ffn.linear1.*"],
        ["2", "transformer.encoder.layers.*.ffn.linear2.*"],
    ]
    assert lines[-1] == "Settings that fit them: MODEL.DEFORMABLE_DETR.NUM_QUERIES 7"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "in_file, in_model, setting",
    [
        ("deformable_detr_refine_two_stage", "deformable_detr_refine", "TWO_STAGE True"),
        ("deformable_detr_refine", "deformable_detr", "WITH_BOX_REFINE True"),
        ("deformable_detr", "deformable_detr_refine", "WITH_BOX_REFINE False"),
        ("deformable_detr_single_scale", "deformable_detr", "NUM_FEATURE_LEVELS 1"),
    ],
)
def test_weights_of_another_variant_name_it(in_file, in_model, setting, tmp_path):
    DetrCheckpointer(build(variant=in_file), str(tmp_path)).save("a")
    with pytest.raises(UserError) as caught:
        DetrCheckpointer(build(variant=in_model)).load(str(tmp_path / "a.pth"))
    last = str(caught.value).splitlines()[-1]
    assert f"weights are of configs/{in_file}.yaml. " in last
    assert f"MODEL.DEFORMABLE_DETR.{setting}" in last


def test_more_layers_than_the_model_has(tmp_path):
    layers = "MODEL.DEFORMABLE_DETR.ENC_LAYERS"
    DetrCheckpointer(build(layers, "2"), str(tmp_path)).save("a")
    with pytest.raises(UserError, match=f"left over.*\n(.*\n)*.*fit them: {layers} 2"):
        DetrCheckpointer(build()).load(str(tmp_path / "a.pth"))


def test_dilation_is_kept_with_the_weights(tmp_path):
    single, dilated = "deformable_detr_single_scale", "deformable_detr_single_scale_dc5"
    DetrCheckpointer(build(variant=dilated), str(tmp_path)).save("a")
    path = str(tmp_path / "a.pth")
    with pytest.raises(UserError, match="other settings than this one: MODEL.RESNETS.RES5_DILATIO"):
        DetrCheckpointer(build(variant=single), strict=True).load(path)
    DetrCheckpointer(build(variant=single)).load(path)  # training may go on without
    DetrCheckpointer(build(variant=dilated), strict=True).load(path)


def test_parallel_and_half_precision_weights(tmp_path):
    source = build().half()
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    write(tmp_path / "a.pth", {"model": state})
    target = build()
    DetrCheckpointer(target, strict=True).load(str(tmp_path / "a.pth"))
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())
