"""tools/replay_step.py: a step of a training that was not finite, on its own."""

from ddetr_d2.errors import UserError

import pytest
import torch

from ..conftest import ROOT, TINY

CONFIG = ["--config-file", str(ROOT / "configs" / "deformable_detr.yaml")]


@pytest.fixture(scope="module")
def failed(train_net, shapes_opts, tmp_path_factory):
    """What a run whose every step is not finite leaves."""
    folder = tmp_path_factory.mktemp("failed")
    run = train_net(
        *CONFIG, *TINY, *shapes_opts, "MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]", "SEED", "3",
        "SOLVER.MAX_ITER", "9", "SOLVER.MAX_SKIPPED_STEPS", "2", "OUTPUT_DIR", str(folder),
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert "iteration 2 gives numbers that are not finite, first in the output of" in run.stderr
    assert run.stdout.count("is left out") == 2
    return folder / "not_finite_0000002.pth"


def table(output):
    """Rows of the printed table: (in training, now) by name."""
    rows = [line.split() for line in output.splitlines() if line.startswith(("loss_", "gradient"))]
    return {name: values for name, *values in rows}


def test_the_step_is_not_finite_again(failed, replay_step, capsys):
    assert replay_step([str(failed)]) == 1
    output = capsys.readouterr().out
    content = torch.load(failed, weights_only=True)
    assert output.startswith("iteration 2, images ")
    for record in content["batch"][0]:
        assert record["file_name"] in output
    rows = table(output)
    assert set(rows) == set(content["values"]) > {"loss_class", "gradient_norm"}
    assert rows["loss_class"] == ["nan", "nan"]
    assert "The first bad value: the output of backbone.stem.conv1." in output


def test_with_another_key_it_is_finite(failed, replay_step, capsys):
    assert replay_step([str(failed), "MODEL.PIXEL_STD", "[50.0, 50.0, 50.0]"]) == 0
    output = capsys.readouterr().out
    assert "The step is finite now." in output
    then, now = table(output)["loss_class"]
    assert then == "nan" and 0 < float(now) < 100


def test_the_same_values(failed, replay_step, capsys, tmp_path):
    """Dropout included: finite values, as if a training had written them."""
    finite = ["MODEL.PIXEL_STD", "[50.0, 50.0, 50.0]"]
    replay_step([str(failed), *finite])
    first = {name: now for name, (_, now) in table(capsys.readouterr().out).items()}
    content = torch.load(failed, weights_only=True)
    content["values"] = {name: float(value) for name, value in first.items()}
    torch.save(content, tmp_path / "step.pth")
    replay_step([str(tmp_path / "step.pth"), *finite])
    for name, (then, now) in table(capsys.readouterr().out).items():
        assert then == now, name
    replay_step([str(failed), *finite, "MODEL.DEFORMABLE_DETR.DROPOUT", "0.0"])
    assert table(capsys.readouterr().out)["loss_class"][1] != first["loss_class"]


def test_files_of_other_kinds(failed, replay_step, tmp_path):
    def message(content=None, *opts, name="file.pth"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(UserError) as error:
            replay_step([str(path), *opts])
        assert str(path) in str(error.value)
        return str(error.value)

    assert "does not exist" in message(name="missing.pth")
    assert "damaged" in message(failed.read_bytes()[:5000])
    assert "damaged" in message(b"hello")
    assert "is no step of a training: it has no batch" in message({"model": {}})
    assert "is no step of a training" in message([1, 2])
    content = torch.load(failed, weights_only=True)
    wider = message(content, "MODEL.DEFORMABLE_DETR.HIDDEN_DIM", "96")
    assert "does not fit the configuration" in wider
    with pytest.raises(UserError, match="SOLVER.FOO"):
        replay_step([str(failed), "SOLVER.FOO", "1"])
