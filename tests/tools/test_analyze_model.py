"""tools/analyze_model.py: published figures, what it prints and what it refuses."""

import importlib.util
import re
import subprocess
import sys
from collections import Counter

from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError
from ddetr_d2.modeling import DETR

import pytest
import torch
from detectron2.modeling import build_model

from ..conftest import ROOT, TINY

SPEC = importlib.util.spec_from_file_location("analyze", ROOT / "tools" / "analyze_model.py")
analyze = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(analyze)

# Parameters of the reference implementation, and its GFLOPs at 800 x 1066 pixels as fvcore counts.
REFERENCE = {
    "deformable_detr_single_scale": (34_066_593, 76.4),
    "deformable_detr_single_scale_dc5": (34_066_593, 125.1),
    "deformable_detr": (40_069_665, 166.0),
    "deformable_detr_refine": (40_849_660, 166.3),
    "deformable_detr_refine_two_stage": (41_181_529, 170.3),
}
# The same for DETR; the last figure is what the count of the reference leaves out, the product of
# queries and keys in masked attention.
DENSE_REFERENCE = {
    "detr": (41_524_768, 80.0, 1.27),
    "detr_dc5": (41_524_768, 155.6, 17.78),
}
CLASSES = ["MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]


def config(name):
    return str(ROOT / "configs" / f"{name}.yaml")


@pytest.fixture(params=["deformable_detr_refine_two_stage", "detr"])
def tiny(request):
    return build_model(setup_cfg(config(request.param), [*TINY, *CLASSES]))


def run(*arguments, name="deformable_detr_refine_two_stage", opts=(*TINY, *CLASSES)):
    analyze.main(["--config-file", config(name), "--tasks", *arguments, *opts])


@pytest.mark.parametrize("name", REFERENCE)
def test_figures_of_the_reference(name):
    parameters, gflops = REFERENCE[name]
    opts = ["MODEL.DEVICE", "cpu", "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "91"]
    model = build_model(setup_cfg(config(name), opts))
    assert analyze.count_parameters(model)["total"]["all"] == parameters

    counts, unsupported = analyze.count_flops(model, (800, 1066))
    assert not unsupported
    total = counts["total"].total() / 1e9
    assert total == pytest.approx(gflops, rel=0.01)
    # The two differences in what is counted, see docs/flops.md, are all there is.
    grid_sample = counts["total"]["ms_deform_attn"] * 4 / 5 / 1e9
    total += grid_sample - counts["total"]["ms_deform_attn"] / 1e9
    if "refine" in name:
        total += 6 * 300 * (2 * 256 * 256 + 256 * 4) / 1e9  # box heads, run twice
    assert total == pytest.approx(gflops, abs=0.06)


@pytest.mark.parametrize("name", DENSE_REFERENCE)
def test_figures_of_the_dense_reference(name):
    parameters, gflops, left_out = DENSE_REFERENCE[name]
    opts = ["MODEL.DEVICE", "cpu", "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "91"]
    model = build_model(setup_cfg(config(name), opts))
    assert analyze.count_parameters(model)["total"]["all"] == parameters

    counts, unsupported = analyze.count_flops(model, (800, 1066))
    assert not unsupported
    total = counts["total"].total() / 1e9
    assert total == pytest.approx(gflops + left_out, rel=0.001)
    # Half of what attention costs is the product of queries and keys; that among the queries of
    # the decoder is not masked.
    unmasked = 2 * 6 * 100 * 100 * 256
    masked = (counts["total"]["attention"] - unmasked) / 2 / 1e9
    assert masked == pytest.approx(left_out, abs=0.04)
    assert total - masked == pytest.approx(gflops, abs=0.06)


def test_parts_make_up_the_total(tiny):
    flops, _ = analyze.count_flops(tiny, (64, 96))
    parameters = analyze.count_parameters(tiny)
    for counts in (
        parameters,
        flops,
        analyze.count_activations(tiny, (64, 96)),
    ):
        assert list(counts) == [*analyze.PARTS, "total"]
        parts = [counts[part] for part in analyze.PARTS]
        assert sum(parts, Counter()) == Counter(counts["total"])
        # The queries of DETR are learned and cost no arithmetic.
        free = ["queries"] if type(tiny) is DETR and counts is not parameters else []
        assert all(counts[part].total() > 0 for part in analyze.PARTS if part not in free)


def test_heads_of_every_layer_are_counted(tiny):
    counts, _ = analyze.count_flops(tiny, (64, 96))
    outputs = 4 if type(tiny) is DETR else 3  # classes, and "no object" of the softmax
    assert counts["heads"]["linear"] == 2 * 20 * (64 * outputs + 2 * 64 * 64 + 64 * 4)


def test_the_model_is_left_as_it_was(tiny):
    tiny.train()
    analyze.count_flops(tiny, (64, 96))
    assert tiny.training
    (output,) = tiny.eval()([{"image": torch.zeros(3, 64, 96)}])
    assert set(output) == {"instances"}


def test_operators_without_a_formula_are_named(tiny, capsys):
    tiny.backbone.register_forward_hook(lambda _, args, out: {k: v.erf() for k, v in out.items()})
    analyze.report_flops(tiny, Counter([(64, 96)]))
    times = len(tiny.in_features)
    expected = f"Not counted, for want of a formula: aten::erf ({times} times)"
    assert expected in capsys.readouterr().out


def test_prints_a_table_for_each_task(capsys):
    run("parameter", "flop", "activation", "structure", "--size", "64", "96")
    output = capsys.readouterr().out
    assert output.index("Parameters") < output.index("FLOPs") < output.index("Activations")
    assert "one image of 64 x 96 pixels" in output
    assert "Not counted" not in output
    assert "MSDeformAttn(" in output
    for part in analyze.PARTS:
        assert len(re.findall(rf"^\| {part} ", output, re.MULTILINE)) == 3


def test_options_may_follow_the_tasks_at_once(capsys):
    run("parameter", opts=("MODEL.DEFORMABLE_DETR.HIDDEN_DIM", "64", *TINY, *CLASSES))
    assert "| total " in capsys.readouterr().out


def test_mean_over_a_test_set(shapes_opts, capsys):
    opts = [*TINY, *shapes_opts]
    run("flop", "-n", "5", opts=opts)
    output = capsys.readouterr().out
    assert "6 classes, those of tiny_train" in output
    assert "mean over 2 images" in output  # there are no more
    mean, deviation = map(float, re.search(r"Total GFLOPs: (\S+) ± (\S+)", output).groups())

    opts += ["MODEL.DEFORMABLE_DETR.NUM_CLASSES", "6"]
    cfg = setup_cfg(config("deformable_detr_refine_two_stage"), opts)
    sizes = list(analyze.image_sizes(cfg, 2).elements())
    model = build_model(cfg)
    first, second = (analyze.count_flops(model, size)[0]["total"].total() for size in sizes)
    assert mean == pytest.approx((first + second) / 2e9, rel=1e-3)
    assert deviation == pytest.approx(abs(first - second) / 2e9, rel=0.1)


def test_classes_of_known_data_sets_need_no_files(capsys):
    run("parameter", opts=TINY)
    assert "80 classes, those of coco_2017_train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "opts", "message"),
    [
        (["flops"], [], "--tasks flops: expected any of parameter, flop"),
        (["flop", "--size", "0", "96"], [], "--size 0 96: both must be at least 1"),
        (["flop", "-n", "0"], [], "--num-inputs is 0; it must be at least 1"),
        (["flop", "-n", "2"], ["DATASETS.TEST", "('none',)"], "names 'none'"),
        (["flop", "-n", "2"], ["DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
        (["flop"], ["MODEL.DEFORMABLE_DETR.NUM_QUERY", "2"], "did you mean"),
        (
            ["flop"],
            ["DATASETS.TRAIN", "('none',)"],
            "To count without data sets, give MODEL.DEFORMABLE_DETR.NUM_CLASSES",
        ),
    ],
)
def test_mistakes_are_explained(arguments, opts, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(*arguments, opts=[*TINY, *opts])


def test_a_mistake_ends_the_program_without_a_traceback():
    process = subprocess.run(
        [sys.executable, "tools/analyze_model.py", "--config-file", "none.yaml", "--tasks", "flop"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: config file none.yaml does not exist")
