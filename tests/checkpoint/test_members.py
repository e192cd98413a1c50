"""Weights of one member of the family in another: told apart, named, and what is kept."""

import shlex

from ddetr_d2.checkpoint import DetrCheckpointer
from ddetr_d2.checkpoint.architecture import built_options, infer_options, variant
from ddetr_d2.checkpoint.transformers import to_transformers
from ddetr_d2.checkpoint.writing import to_reference, write_checkpoint
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError

import pytest
import torch
from detectron2.modeling import build_model

from ..conftest import ROOT, TINY
from ..programs import run_program

CLASS_LOSS = "MODEL.DEFORMABLE_DETR.CLASS_LOSS"
CONFIGS = [path.stem for path in ROOT.glob("configs/d*.yaml")]


def configure(name, *opts):
    classes = ("MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3")
    return setup_cfg(str(ROOT / "configs" / f"{name}.yaml"), [*TINY, *classes, *opts])


def build(name, *opts):
    return build_model(configure(name, *opts))


def save(model, folder, names=None, **changes):
    """A checkpoint; ``changes`` replace entries of it."""
    DetrCheckpointer(model, str(folder), class_names=names).save("a")
    path = folder / "a.pth"
    content = torch.load(path, weights_only=True) | changes
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_options_of_every_configuration(name):
    # Groups of the widths of TINY would be fractions.
    wide = [*("MODEL.RESNETS.WIDTH_PER_GROUP", "8"), *("MODEL.RESNETS.NUM_GROUPS", "1")]
    cfg = configure(name, *([] if "x101" in name else wide))
    model = build_model(cfg)
    options = infer_options(model.state_dict(), built_options(model))
    for key, value in options.items():
        node = cfg
        for part in key.split("."):
            node = node[part]
        if key != "MODEL.BACKBONE.NAME" and not key.endswith("DEFORM_MODULATED"):
            assert value == (list(node) if isinstance(value, list) else node), key
    # Weights do not tell which of timm's models they are of.
    assert variant(options) == name.removesuffix("_swin_t").removesuffix("_convnext_t")


WRONG = [
    # weights, model, configuration named
    ("detr", "deformable_detr", "detr"),
    ("detr_dc5", "deformable_detr_single_scale_dc5", "detr_dc5"),
    ("detr_dc5_plus", "deformable_detr_single_scale_dc5", "detr_dc5_plus"),
    ("deformable_detr", "detr", "deformable_detr"),
    ("deformable_detr_refine_two_stage", "detr", "deformable_detr_refine_two_stage"),
    ("deformable_detr_single_scale_dc5", "detr_dc5", "deformable_detr_single_scale_dc5"),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("in_file, in_model, named", WRONG)
def test_weights_of_another_member_name_its_configuration(
    in_file, in_model, named, strict, tmp_path
):
    source = build(in_file)
    path = save(source, tmp_path)
    with pytest.raises(UserError, match="does not fit this model") as caught:
        DetrCheckpointer(build(in_model), strict=strict).load(path)
    last = str(caught.value).splitlines()[-1]
    assert f"The weights are of configs/{named}.yaml. Settings that fit them: " in last
    settings = shlex.split(last.partition("fit them: ")[2])
    DetrCheckpointer(build(in_model, *settings), strict=True).load(path)
    DetrCheckpointer(build(named), strict=True).load(path)


def test_foreign_weights_of_another_member_name_its_configuration(tmp_path):
    detr, deformable = build("detr"), build("deformable_detr")
    files = {
        "reference": to_reference,
        "transformers": lambda state: to_transformers(
            state, configure("detr" if "projection.level_embed" not in state else "deformable_detr")
        )[0],
    }
    for convert in files.values():
        for source, model, name in (
            (detr, "deformable_detr", "detr"),
            (deformable, "detr", "deformable_detr"),
        ):
            path = str(tmp_path / "x.pth")
            write_checkpoint(path, convert(source.state_dict()))
            with pytest.raises(UserError, match=f"weights are of configs/{name}.yaml. Sett"):
                DetrCheckpointer(build(model), strict=True).load(path)


def class_head(model):
    return model.transformer.decoder.heads[0].class_embed


def test_heads_matched_by_name_keep_no_object(tmp_path, caplog):
    source, target = build("detr"), build("detr")
    path = save(source, tmp_path, ["cat", "dog", "cow"])
    fresh = class_head(target).weight.clone()
    DetrCheckpointer(target, class_names=["dog", "horse", "CAT"]).load(path, checkpointables=[])
    assert "2 keep their heads (dog, CAT), 1 start anew (horse)" in caplog.text
    given, taken = class_head(source), class_head(target)
    assert torch.equal(taken.weight[[0, 2, 3]], given.weight[[1, 0, 3]])
    assert torch.equal(taken.bias[[0, 2, 3]], given.bias[[1, 0, 3]])
    assert torch.equal(taken.weight[1], fresh[1])

    more = build("detr", "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "5")
    names = ["a", "cow", "b", "dog", "c"]
    DetrCheckpointer(more, class_names=names).load(path, checkpointables=[])
    assert torch.equal(class_head(more).weight[[1, 3, 5]], given.weight[[2, 1, 3]])
    # Without names there is no telling which class is which.
    DetrCheckpointer(more).load(save(source, tmp_path), checkpointables=[])
    assert (
        "on another number of classes: the 2 tensors of the class heads start anew" in caplog.text
    )


@pytest.mark.parametrize(
    "in_file, in_model, classes", [("focal", "cross_entropy", 3), ("cross_entropy", "focal", 4)]
)
def test_heads_of_another_loss_start_anew(in_file, in_model, classes, tmp_path, caplog):
    """Even where 3 classes and "no object" have as many outputs as 4 classes."""
    number = ("MODEL.DEFORMABLE_DETR.NUM_CLASSES",)
    source = build("detr", CLASS_LOSS, in_file, *number, str(7 - classes))
    target = build("detr", CLASS_LOSS, in_model, *number, str(classes))
    assert class_head(source).weight.shape == class_head(target).weight.shape
    path = save(source, tmp_path)
    with pytest.raises(UserError, match=f"other settings than this one: {CLASS_LOSS} {in_file}"):
        DetrCheckpointer(target, strict=True).load(path)
    fresh = class_head(target).weight.clone()
    DetrCheckpointer(target).load(path, checkpointables=[])
    assert torch.equal(class_head(target).weight, fresh)
    assert f"with another {CLASS_LOSS}: the 2 tensors of the class heads start anew" in caplog.text
    layers = [model.transformer.encoder.layers[0].ffn.linear1.weight for model in (source, target)]
    assert torch.equal(*layers)
    (tmp_path / "last_checkpoint").write_text("a.pth")
    with pytest.raises(UserError, match=f"other settings.*{in_file}"):
        DetrCheckpointer(target, str(tmp_path)).resume_or_load("", resume=True)


def test_class_loss_of_other_files(tmp_path):
    """In the names of the reference it is told beside the weights, and a softmax otherwise."""
    plus, plain = build("detr_dc5_plus"), build("detr_dc5")
    path = str(tmp_path / "x.pth")
    write_checkpoint(path, to_reference(plus.state_dict()), options=built_options(plus))
    DetrCheckpointer(plus, strict=True).load(path)
    with pytest.raises(UserError, match="weights are of configs/detr_dc5_plus.yaml"):
        DetrCheckpointer(plain, strict=True).load(path)
    write_checkpoint(path, to_reference(plain.state_dict()))
    DetrCheckpointer(plain, strict=True).load(path)
    with pytest.raises(UserError, match="weights are of configs/detr_dc5.yaml"):
        DetrCheckpointer(plus, strict=True).load(path)


@pytest.mark.parametrize("options", [{}, {CLASS_LOSS: "hinge"}, {CLASS_LOSS: ["focal"]}, 3])
def test_checkpoints_without_the_class_loss(options, tmp_path):
    """The number of names tells whether there is an output for "no object"."""
    for name, other in (("detr_dc5_plus", "detr_dc5"), ("detr_dc5", "detr_dc5_plus")):
        path = save(build(name), tmp_path, ["cat", "dog", "cow"], options=options)
        DetrCheckpointer(build(name), strict=True).load(path)
        with pytest.raises(UserError, match=f"weights are of configs/{name}.yaml"):
            DetrCheckpointer(build(other), strict=True).load(path)


def test_attention_to_separate_levels_is_told_from_fewer_points(tmp_path):
    """Both have a quarter of the weights in the encoder."""
    few = [f"MODEL.DEFORMABLE_DETR.{x}_POINTS" for x in ("ENC", "DEC")]
    separate = build("deformable_detr", "MODEL.DEFORMABLE_DETR.MULTI_SCALE_ATTENTION", "False")
    fewer = build("deformable_detr", few[0], "1")
    shapes = [
        {name: tensor.shape for name, tensor in model.state_dict().items()}
        for model in (separate, fewer)
    ]
    assert shapes[0] == shapes[1]
    path = save(separate, tmp_path)
    DetrCheckpointer(separate, strict=True).load(path)
    with pytest.raises(UserError, match="other settings than this one: .*SCALE_ATTENTION False"):
        DetrCheckpointer(fewer, strict=True).load(path)
    with pytest.raises(UserError, match="fit them: MODEL.DEFORMABLE_DETR.MULTI_SCALE_ATTENTION F"):
        DetrCheckpointer(build("deformable_detr"), strict=True).load(path)
    # Where nothing tells, encoder and decoder are taken to have as many points.
    key = "MODEL.DEFORMABLE_DETR.MULTI_SCALE_ATTENTION"
    assert infer_options(separate.state_dict())[key] is False
    one = build("deformable_detr", few[0], "1", few[1], "1")
    assert infer_options(one.state_dict())[key] is True


@pytest.mark.parametrize("program", ["train_net", "demo"])
@pytest.mark.parametrize(
    "in_file, in_model", [("detr", "deformable_detr"), ("deformable_detr", "detr")]
)
def test_programs_say_it_in_words(program, in_file, in_model, shapes, shapes_opts, tmp_path):
    path = save(build(in_file), tmp_path, ["circle", "square", "star"])
    config = ("--config-file", str(ROOT / "configs" / f"{in_model}.yaml"))
    opts = [*TINY, "MODEL.WEIGHTS", path, "OUTPUT_DIR", str(tmp_path / "out")]
    if program == "train_net":
        done = run_program(ROOT / "train_net.py", *config, "--eval-only", *opts, *shapes_opts)
    else:
        drawings = ("--input", str(shapes / "val"), "--output", str(tmp_path / "drawings"))
        done = run_program(ROOT / "demo" / "demo.py", *config, *drawings, "--opts", *opts)
    assert done.returncode == 2
    assert f"The weights are of configs/{in_file}.yaml." in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
