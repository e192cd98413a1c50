"""train_net.py as a user runs it."""

import json
import re
import shutil

from ddetr_d2.data.synthetic import make_synthetic

import pytest
import torch

from .conftest import MEMBERS, ROOT, TINY


def config(name):
    return ["--config-file", str(ROOT / "configs" / f"{name}.yaml")]


def ap(output):
    """AP of the last evaluation in a log."""
    return float(re.findall(r"copypaste: ([\d.]+|nan),", output)[-1])


@pytest.mark.parametrize("variant", MEMBERS)
def test_one_step_and_one_evaluation(variant, train_net, shapes_opts, tmp_path):
    run = train_net(
        *config(variant), *TINY, *shapes_opts, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", str(tmp_path)
    )
    assert run.returncode == 0, run.stderr
    assert "Running on cpu" in run.stdout
    assert ap(run.stdout) >= 0
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any("bbox/AP" in line for line in metrics)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_train_resume_and_evaluate(train_net, shapes_opts, tmp_path):
    options = [*TINY, *shapes_opts, "OUTPUT_DIR", str(tmp_path), "SOLVER.CHECKPOINT_PERIOD", "2"]
    first = train_net(*config("deformable_detr_refine"), *options, "SOLVER.MAX_ITER", "2")
    assert first.returncode == 0, first.stderr
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert checkpoint["class_names"][:2] == ["circle", "square"]

    resumed = train_net(
        *config("deformable_detr_refine"), "--resume", *options, "SOLVER.MAX_ITER", "4"
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "Starting training from iteration 2" in resumed.stdout
    after = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert after["iteration"] == 3

    weights = ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    evaluated = train_net(*config("deformable_detr_refine"), "--eval-only", *options, *weights)
    assert evaluated.returncode == 0, evaluated.stderr
    assert ap(evaluated.stdout) == ap(resumed.stdout)

    # The checkpoint brings its configuration, data sets included.
    by_itself = train_net("--eval-only", *weights, "OUTPUT_DIR", str(tmp_path / "again"))
    assert by_itself.returncode == 0, by_itself.stderr
    assert by_itself.stdout.count("copypaste") == evaluated.stdout.count("copypaste")
    assert ap(by_itself.stdout) == ap(evaluated.stdout)


def test_amp_on_the_cpu(train_net, shapes_opts, tmp_path):
    run = train_net(
        *config("deformable_detr"), *TINY, *shapes_opts, "SOLVER.MAX_ITER", "2",
        "SOLVER.AMP.ENABLED", "True", "OUTPUT_DIR", str(tmp_path),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train_net, shapes_opts):
    """A checkpoint of the tiny refined model after one step."""
    folder = tmp_path_factory.mktemp("trained")
    run = train_net(
        *config("deformable_detr_refine"), *TINY, *shapes_opts, "SOLVER.MAX_ITER", "1",
        "OUTPUT_DIR", str(folder),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return folder / "model_final.pth"


def assert_user_error(run, *words):
    """The program ended with one line that has all of ``words``, and no traceback."""
    assert run.returncode == 2, run.stdout + run.stderr
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.stderr
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in run.stderr + run.stdout


def test_missing_config_file(train_net):
    run = train_net("--config-file", str(ROOT / "configs" / "deformable_detr_refin.yaml"))
    assert_user_error(run, "does not exist", "deformable_detr_refine.yaml")


def test_config_file_that_is_no_config(train_net, tmp_path):
    (tmp_path / "a.yaml").write_text("[1, 2")
    assert_user_error(train_net("--config-file", str(tmp_path / "a.yaml")), "no valid YAML")
    (tmp_path / "b.yaml").write_text("just words")
    assert_user_error(train_net("--config-file", str(tmp_path / "b.yaml")), "KEY: value")


def test_misspelt_key_in_the_file(train_net, tmp_path):
    (tmp_path / "a.yaml").write_text("MODEL:\n  DEFORMABLE_DETR:\n    NUM_QUERYS: 3\n")
    run = train_net("--config-file", str(tmp_path / "a.yaml"))
    assert_user_error(run, "NUM_QUERYS", "did you mean MODEL.DEFORMABLE_DETR.NUM_QUERIES?")


def test_misspelt_key_and_wrong_value_on_the_command_line(train_net):
    run = train_net(*config("deformable_detr"), "SOLVER.BASELR", "1")
    assert_user_error(run, "SOLVER.BASELR", "did you mean SOLVER.BASE_LR?")
    run = train_net(*config("deformable_detr"), "SOLVER.BASE_LR", "high")
    assert_user_error(run, "SOLVER.BASE_LR high")
    run = train_net(*config("deformable_detr"), "SOLVER.BASE_LR")
    assert_user_error(run, "KEY VALUE pairs")


def test_coco_that_is_not_there(train_net):
    run = train_net(*config("deformable_detr"), *TINY)
    assert_user_error(run, "coco_2017_train", "DETECTRON2_DATASETS")


def test_contradicting_number_of_classes(train_net, shapes_opts, tmp_path):
    run = train_net(
        *config("deformable_detr"), *TINY, *shapes_opts, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "80",
        "OUTPUT_DIR", str(tmp_path),
    )  # fmt: skip
    assert_user_error(run, "80", "6 classes")


def test_more_gpus_than_there_are(train_net):
    run = train_net(*config("deformable_detr"), "--num-gpus", "99")
    assert_user_error(run, "--num-gpus 99")


@pytest.mark.parametrize("mode", [[], ["--eval-only"]])
def test_weights_that_are_missing_or_damaged(mode, train_net, shapes_opts, trained, tmp_path):
    options = [*mode, *TINY, *shapes_opts, "OUTPUT_DIR", str(tmp_path)]
    missing = str(tmp_path / "missing.pth")
    run = train_net(*config("deformable_detr_refine"), *options, "MODEL.WEIGHTS", missing)
    assert_user_error(run, missing, "MODEL.WEIGHTS")

    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(trained.read_bytes()[:10_000])
    run = train_net(*config("deformable_detr_refine"), *options, "MODEL.WEIGHTS", str(damaged))
    assert_user_error(run, str(damaged), "damaged")

    empty = tmp_path / "empty.pth"
    torch.save({"hello": 1}, empty)
    run = train_net(*config("deformable_detr_refine"), *options, "MODEL.WEIGHTS", str(empty))
    assert_user_error(run, str(empty), "no weights")


@pytest.mark.parametrize("mode", [[], ["--eval-only"]])
def test_weights_of_another_architecture(mode, train_net, shapes_opts, trained, tmp_path):
    run = train_net(
        *config("deformable_detr_refine_two_stage"), *mode, *TINY, *shapes_opts,
        "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(trained),
    )  # fmt: skip
    assert_user_error(run, str(trained), "does not fit", "missing")

    wider = ["MODEL.DEFORMABLE_DETR.HIDDEN_DIM", "96"]
    run = train_net(
        *config("deformable_detr_refine"), *mode, *TINY, *wider, *shapes_opts,
        "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", str(trained),
    )  # fmt: skip
    assert_user_error(run, str(trained), "differ in shape")


def test_evaluation_without_weights(train_net, shapes_opts, tmp_path):
    run = train_net(
        *config("deformable_detr"), "--eval-only", *TINY, *shapes_opts, "OUTPUT_DIR", str(tmp_path)
    )
    assert_user_error(run, "MODEL.WEIGHTS is empty")


def other_classes(shapes, folder):
    """The validation set with two classes instead of six."""
    content = json.loads((shapes / "val.json").read_text())
    content["categories"] = [{"id": 1, "name": "round"}, {"id": 2, "name": "angular"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 1 + annotation["category_id"] % 2
    (folder / "other.json").write_text(json.dumps(content))
    return [
        *(
            "DATASETS.COCO_FORMAT",
            repr([["other", str(folder / "other.json"), str(shapes / "val")]]),
        ),
        *("DATASETS.TRAIN", "('other',)"),
        *("DATASETS.TEST", "('other',)"),
    ]


def test_detector_weights_start_a_detector_of_other_classes(train_net, shapes, trained, tmp_path):
    options = [*TINY, *other_classes(shapes, tmp_path), "OUTPUT_DIR", str(tmp_path / "out")]
    weights = ["MODEL.WEIGHTS", str(trained)]
    run = train_net(*config("deformable_detr_refine"), *options, *weights, "SOLVER.MAX_ITER", "1")
    assert run.returncode == 0, run.stderr
    assert "0 keep their heads (none), 2 start anew (round, angular)" in run.stdout
    run = train_net(*config("deformable_detr_refine"), "--eval-only", *options, *weights)
    assert_user_error(run, "no class in common", "round, angular", "circle, square")


def test_evaluation_matches_classes_by_name(train_net, shapes, shapes_opts, trained, tmp_path):
    """Renumbered and reordered classes, and one less: the same AP of every class."""
    content = json.loads((shapes / "val.json").read_text())
    used = {a["category_id"] for a in content["annotations"]}
    content["categories"] = [
        {"id": 20 - c["id"], "name": c["name"]} for c in content["categories"] if c["id"] in used
    ]
    for annotation in content["annotations"]:
        annotation["category_id"] = 20 - annotation["category_id"]
    (tmp_path / "val.json").write_text(json.dumps(content))
    outputs = []
    for folder in (shapes, tmp_path):
        opts = [
            option.replace(str(shapes / "val.json"), str(folder / "val.json"))
            for option in shapes_opts
        ]
        run = train_net(
            *config("deformable_detr_refine"), "--eval-only", *TINY, *opts,
            "MODEL.WEIGHTS", str(trained), "OUTPUT_DIR", str(tmp_path / folder.name),
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        results = json.loads(
            (tmp_path / folder.name / "inference/tiny_val/coco_instances_results.json").read_text()
        )
        number = {
            c["id"]: c["name"] for c in json.loads((folder / "val.json").read_text())["categories"]
        }
        kept = {number[c] for c in number}
        outputs.append(
            (
                ap(run.stdout),
                sorted((number.get(r["category_id"]), r["score"], r["image_id"]) for r in results),
            )
        )
    (first, all_results), (second, some) = outputs
    assert first == second
    assert some == [result for result in all_results if result[0] in kept]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_cut_short_is_replaced_and_named(
    workers, train_net, shapes, shapes_opts, tmp_path
):
    folder = tmp_path / "shapes"
    shutil.copytree(shapes, folder)
    damaged = sorted((folder / "train").iterdir())[:2]
    damaged[0].write_bytes(damaged[0].read_bytes()[:2000])  # the header is whole
    opts = [option.replace(str(shapes), str(folder)) for option in shapes_opts]
    opts += [*TINY, "SEED", "2", "DATALOADER.NUM_WORKERS", workers, "SOLVER.MAX_ITER", "4"]
    out = tmp_path / "out"
    run = train_net(*config("deformable_detr"), *opts, "OUTPUT_DIR", str(out))
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("another image takes its place") == 1
    (line,) = (out / "unreadable_images.txt").read_text().splitlines()
    assert line.startswith(f"{damaged[0]}\t")

    damaged[1].write_bytes(damaged[1].read_bytes()[:2000])
    run = train_net(*config("deformable_detr"), *opts, "OUTPUT_DIR", str(tmp_path / "stopped"))
    assert_user_error(run, "2 of the 4 training images cannot be used", "DATALOADER.MAX_UNREADABLE")


def test_an_evaluation_that_fails_keeps_the_training(train_net, shapes, shapes_opts, tmp_path):
    folder = tmp_path / "shapes"
    shutil.copytree(shapes, folder)
    damaged = sorted((folder / "val").iterdir())[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:2000])
    opts = [option.replace(str(shapes), str(folder)) for option in shapes_opts]
    opts += [*TINY, "TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "3", "OUTPUT_DIR", str(tmp_path)]
    run = train_net(*config("deformable_detr"), *opts)
    assert_user_error(run, "the evaluation failed", damaged.name, "--resume")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    damaged.write_bytes(whole)
    run = train_net(*config("deformable_detr"), "--resume", *opts)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Evaluation results for bbox") == 2  # that of iteration 2 is made up


def test_an_image_without_a_header_is_named_at_the_start(train_net, shapes, shapes_opts, tmp_path):
    folder = tmp_path / "shapes"
    shutil.copytree(shapes, folder)
    damaged = sorted((folder / "train").iterdir())[0]
    damaged.write_bytes(b"<html>404</html>")
    opts = [option.replace(str(shapes), str(folder)) for option in shapes_opts]
    run = train_net(*config("deformable_detr"), *TINY, *opts, "OUTPUT_DIR", str(tmp_path / "out"))
    assert_user_error(run, "1 of 4 image files cannot be read", damaged.name)


def test_overfits_four_images(train_net, tmp_path):
    # Of one size: the group normalisation of padded batches would differ from that of evaluation.
    make_synthetic(tmp_path / "four", train=4, val=0, min_size=192, max_size=192)
    declared = [["four", str(tmp_path / "four" / "train.json"), str(tmp_path / "four" / "train")]]
    run = train_net(
        *config("synthetic_demo"), "MODEL.DEVICE", "cpu",
        "DATASETS.COCO_FORMAT", repr(declared), "DATASETS.TRAIN", "('four',)",
        "DATASETS.TEST", "('four',)", "INPUT.RANDOM_FLIP", "none",
        "SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "450", "TEST.EVAL_PERIOD", "0",
        "SEED", "0", "OUTPUT_DIR", str(tmp_path / "out"),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert ap(run.stdout) > 90
