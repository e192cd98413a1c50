"""tools/convert_weights.py as a user runs it."""

import importlib.util
import json
import pickle
import re
import subprocess
import sys

from ddetr_d2.checkpoint import DetrCheckpointer
from ddetr_d2.checkpoint.formats import COCO_NAMES
from ddetr_d2.data.synthetic import make_synthetic
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from ..checkpoint.foreign import as_reference, as_reference_detr
from ..checkpoint.test_files import Evil, Harmless
from ..conftest import ROOT, TINY, VARIANTS

TOOL = ROOT / "tools" / "convert_weights.py"
SPEC = importlib.util.spec_from_file_location("convert_weights", TOOL)
convert_weights = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(convert_weights)


def config(variant):
    return str(ROOT / "configs" / f"{variant}.yaml")


@pytest.fixture
def convert(capsys):
    """Run the program; returns what it prints."""

    def convert(*arguments):
        convert_weights.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return convert


def tiny(variant="deformable_detr", classes=3, *opts):
    opts = [*TINY, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", str(classes), *opts]
    model = build_model(setup_cfg(config(variant), opts))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    return model


def state_in(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same(a, b):
    """Equal but for counters of training steps, which only some formats have."""
    assert {k for k in a if "num_batches" not in k} == {k for k in b if "num_batches" not in k}
    for name in a.keys() & b.keys():
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("variant", [*VARIANTS, "detr", "detr_dc5"])
def test_there_and_back(variant, convert, tmp_path):
    wide = []
    if variant.endswith("dc5"):  # transformers has it in the usual widths only
        wide = [
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", "64"),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", "256"),
            *("MODEL.RESNETS.WIDTH_PER_GROUP", "64"),
        ]
    model = tiny(variant, 3, *wide)
    DetrCheckpointer(model, str(tmp_path), class_names=["a", "b", "c"]).save("own")
    for there in ("transformers", "reference"):
        said = convert(tmp_path / "own.pth", tmp_path / there, "--to", there)
        assert f"configs/{variant}.yaml" in said
        assert "3 classes: a, b, c" in said
        back = tmp_path / f"{there}.pth"
        said = convert(tmp_path / there, back)
        assert f"configs/{variant}.yaml" in said
        written = torch.load(back, weights_only=True)
        assert written["class_names"] == ["a", "b", "c"]
        assert_same(written["model"], model.state_dict())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A detector that has learned its four images a little, and the options to evaluate on them."""
    folder = tmp_path_factory.mktemp("trained")
    make_synthetic(folder, train=4, val=0, min_size=96, max_size=96)
    declared = [["four", str(folder / "train.json"), str(folder / "train")]]
    options = [
        *TINY,
        *("DATASETS.COCO_FORMAT", repr(declared)),
        *("DATASETS.TRAIN", "('four',)"),
        *("DATASETS.TEST", "('four',)"),
    ]
    subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"),
         "--config-file", config("deformable_detr_refine_two_stage"), *options,
         "SOLVER.MAX_ITER", "120", "SOLVER.BASE_LR", "0.001", "INPUT.RANDOM_FLIP", "none",
         "SEED", "0", "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", str(folder)],
        check=True, capture_output=True, cwd=ROOT,
    )  # fmt: skip
    return folder, options


def test_a_checkpoint_keeps_its_configuration(trained, convert, tmp_path):
    original = trained[0] / "model_final.pth"
    output = convert(original, tmp_path / "own.pth")
    assert f"    MODEL.WEIGHTS {tmp_path / 'own.pth'}" in output
    contents = [torch.load(path) for path in (original, tmp_path / "own.pth")]
    assert contents[0]["config"] == contents[1]["config"]


def test_same_ap_in_every_format(trained, train_net, convert, tmp_path):
    folder, options = trained
    original = folder / "model_final.pth"
    convert(original, tmp_path / "hf", "--to", "transformers")
    convert(tmp_path / "hf", tmp_path / "reference.pth", "--to", "reference")
    tables, detections = [], []
    for weights in (original, tmp_path / "hf", tmp_path / "reference.pth"):
        output = tmp_path / f"evaluation_of_{weights.name}"
        evaluated = train_net(
            "--config-file", config("deformable_detr_refine_two_stage"), "--eval-only", *options,
            "MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(output),
        )  # fmt: skip
        assert evaluated.returncode == 0, evaluated.stderr
        tables.append(re.findall(r"copypaste: (\d.+)", evaluated.stdout)[-1])
        (results,) = output.rglob("coco_instances_results.json")
        detections.append(json.loads(results.read_text()))
    assert float(tables[0].split(",")[0]) > 5
    assert tables[0] == tables[1] == tables[2]
    assert detections[0] == detections[1] == detections[2]


def test_coco_model_of_the_reference(convert, tmp_path):
    model = tiny("deformable_detr_refine", 91)
    source = tmp_path / "checkpoint.pth"
    torch.save({"model": as_reference(model.state_dict(), encoder=1, decoder=2)}, source)
    said = convert(source, tmp_path / "coco.pth")
    assert "reference implementation" in said
    assert "91 classes by COCO category id -> the 80 classes of COCO" in said
    assert "assumed: MODEL.DEFORMABLE_DETR.NUM_HEADS 8;" in said
    written = torch.load(tmp_path / "coco.pth", weights_only=True)
    assert written["class_names"] == COCO_NAMES
    assert written["model"]["transformer.decoder.heads.1.class_embed.bias"].shape == (80,)

    convert(source, tmp_path / "all.pth", "--keep-outputs")
    written = torch.load(tmp_path / "all.pth", weights_only=True)
    assert "class_names" not in written
    assert_same(written["model"], model.state_dict())

    convert(source, tmp_path / "hf", "--to", "transformers")
    labels = json.loads((tmp_path / "hf" / "config.json").read_text())["id2label"]
    assert [labels[str(number)] for number in range(80)] == COCO_NAMES


def test_coco_model_of_the_reference_of_detr(convert, tmp_path):
    model = tiny("detr", 91)
    source = tmp_path / "detr-r50.pth"
    torch.save({"model": as_reference_detr(model.state_dict(), encoder=1, decoder=2)}, source)
    said = convert(source, tmp_path / "coco.pth")
    assert "91 classes by COCO category id -> the 80 classes of COCO" in said
    untold = "MODEL.DEFORMABLE_DETR.NUM_HEADS 8 MODEL.RESNETS.RES5_DILATION 1;"
    assert f"assumed: {untold}" in said
    assert "--config-file configs/detr.yaml" in said
    written = torch.load(tmp_path / "coco.pth", weights_only=True)
    assert written["class_names"] == COCO_NAMES
    assert written["options"]["MODEL.DEFORMABLE_DETR.CLASS_LOSS"] == "cross_entropy"
    assert written["model"]["transformer.decoder.heads.0.class_embed.bias"].shape == (81,)

    convert(source, tmp_path / "all.pth", "--keep-outputs")
    assert_same(state_in(tmp_path / "all.pth"), model.state_dict())
    dilated = tmp_path / "dc5.yaml"  # what nothing in the file tells
    dilated.write_text(
        f"_BASE_: {config('detr_dc5')}\nMODEL:\n  RESNETS: {{STEM_OUT_CHANNELS: 16, "
        "RES2_OUT_CHANNELS: 32, WIDTH_PER_GROUP: 8}\n  DEFORMABLE_DETR: {HIDDEN_DIM: 64, "
        "DIM_FEEDFORWARD: 128, ENC_LAYERS: 1, DEC_LAYERS: 2, NUM_QUERIES: 20}\n"
    )
    said = convert(source, tmp_path / "dc5.pth", "--config-file", dilated)
    assert "assumed" not in said
    options = torch.load(tmp_path / "dc5.pth", weights_only=True)["options"]
    assert options["MODEL.RESNETS.RES5_DILATION"] == 2


def test_dc5_plus_stays_what_it_is(convert, tmp_path):
    """Its classes are sigmoids, which only this project has for a DETR."""
    model = tiny("detr_dc5_plus")
    DetrCheckpointer(model, str(tmp_path), class_names=["a", "b", "c"]).save("own")
    convert(tmp_path / "own.pth", tmp_path / "reference.pth", "--to", "reference")
    said = convert(tmp_path / "reference.pth", tmp_path / "back.pth")
    assert "3 classes: a, b, c" in said
    assert "configs/detr_dc5_plus.yaml" in said and "CLASS_LOSS" not in said
    assert_same(state_in(tmp_path / "back.pth"), model.state_dict())
    with pytest.raises(UserError, match="CLASS_LOSS is focal"):
        convert(tmp_path / "own.pth", tmp_path / "hf", "--to", "transformers")
    assert not (tmp_path / "hf").exists()


def test_configuration_for_what_weights_do_not_tell(convert, tmp_path):
    DetrCheckpointer(tiny(), str(tmp_path)).save("own")
    (tmp_path / "c.yaml").write_text(
        f"_BASE_: {config('deformable_detr')}\nMODEL:\n  RESNETS: {{STEM_OUT_CHANNELS: 16, "
        "RES2_OUT_CHANNELS: 32, WIDTH_PER_GROUP: 8}\n  DEFORMABLE_DETR: {HIDDEN_DIM: 64, "
        "DIM_FEEDFORWARD: 128, ENC_LAYERS: 1, DEC_LAYERS: 2, NUM_QUERIES: 20, DROPOUT: 0.3}\n"
    )
    arguments = (tmp_path / "own.pth", tmp_path / "hf", "--to", "transformers")
    convert(*arguments, "--config-file", tmp_path / "c.yaml")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dropout"] == 0.3
    with pytest.raises(UserError, match="own.pth does not fit this model"):
        convert(*arguments, "--overwrite", "--config-file", config("deformable_detr_refine"))


def test_backbone_alone(convert, tmp_path):
    weights = {
        f"stem.{k}" if k.startswith("conv1") else k: v.numpy()
        for k, v in tiny().backbone.state_dict().items()
        if "num_batches_tracked" not in k
    }
    content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    assert "a backbone alone" in convert(tmp_path / "R-50.pkl", tmp_path / "backbone.pth")
    model = tiny()
    DetrCheckpointer(model).load(str(tmp_path / "backbone.pth"))
    for name, tensor in model.backbone.state_dict().items():
        if name in weights:
            np.testing.assert_array_equal(tensor.numpy(), weights[name])
    with pytest.raises(UserError, match="needs a detector"):
        convert(tmp_path / "R-50.pkl", tmp_path / "hf", "--to", "transformers")


def test_outputs_are_whole_and_replace_nothing(convert, tmp_path):
    DetrCheckpointer(tiny(), str(tmp_path)).save("own")
    (tmp_path / "last_checkpoint").unlink()
    source = tmp_path / "own.pth"
    before = source.read_bytes()
    with pytest.raises(UserError, match="would replace the input"):
        convert(source, source, "--overwrite")
    (tmp_path / "taken.pth").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        convert(source, tmp_path / "taken.pth")
    assert (tmp_path / "taken.pth").read_text() == "mine"
    convert(source, tmp_path / "taken.pth", "--overwrite")
    assert_same(state_in(tmp_path / "taken.pth"), state_in(source))
    (tmp_path / "taken.pth").unlink()

    # Deformable convolutions, which transformers does not have.
    state = torch.load(source, weights_only=True)
    for name in [n for n in state["model"] if re.match(r"backbone\.res5\.\d\.conv2\.weight", n)]:
        shape = (27, state["model"][name].shape[1], 3, 3)
        state["model"][name.replace("conv2", "conv2_offset")] = torch.zeros(shape)
        state["model"][name.replace("conv2.weight", "conv2_offset.bias")] = torch.zeros(27)
    torch.save(state, source)
    with pytest.raises(UserError, match="no backbone like this one"):
        convert(source, tmp_path / "hf", "--to", "transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["own.pth"]
    assert before != source.read_bytes()


def test_pickles_need_a_flag(convert, tmp_path):
    content = {"model": tiny().state_dict(), "trap": Evil(tmp_path / "mark")}
    torch.save(content, tmp_path / "evil.pth")
    failed = subprocess.run(
        [sys.executable, TOOL, tmp_path / "evil.pth", tmp_path / "new.pth"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert failed.returncode == 2
    assert failed.stderr.count("error: ") == 1
    assert "--allow-pickle" in failed.stderr and "Traceback" not in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth"]

    content["trap"] = Harmless()
    torch.save(content, tmp_path / "odd.pth")
    convert(tmp_path / "odd.pth", tmp_path / "new.pth", "--allow-pickle")
    assert_same(state_in(tmp_path / "new.pth"), content["model"])
