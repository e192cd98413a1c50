"""tools/plot_training.py."""

import importlib.util
import json

from ddetr_d2.errors import UserError

import cv2
import pytest

from ..conftest import ROOT

SPEC = importlib.util.spec_from_file_location("plot", ROOT / "tools" / "plot_training.py")
plot = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plot)


def write(folder, lines):
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_draws_a_resumed_run(tmp_path):
    write(
        tmp_path,
        [
            {"iteration": 19, "total_loss": 9.0, "time": 3.0},
            {"iteration": 39, "total_loss": 7.0, "time": 3.0},
            {"iteration": 39, "total_loss": 8.0, "time": 6.0},
            {"iteration": 40, "bbox/AP": 30.0, "bbox/AP50": 50.0},
        ],
    )
    metrics = plot.read_metrics(str(tmp_path))
    assert [line["minutes"] for line in metrics] == pytest.approx([1.0, 3.0, 3.1])
    assert metrics[1]["total_loss"] == 8.0
    plot.main([str(tmp_path)])
    assert cv2.imread(str(tmp_path / "training.png")).shape[1] == 1000


def test_draws_runs_side_by_side(tmp_path, monkeypatch):
    for name, ap in (("first", 30.0), ("second", 40.0)):
        (tmp_path / name).mkdir()
        write(
            tmp_path / name,
            [
                {"iteration": 19, "total_loss": 9.0, "time": 3.0},
                {"iteration": 20, "bbox/AP": ap, "bbox/AP50": 50.0},
            ],
        )
    drawn = []
    monkeypatch.setattr(plot.plt.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plot.main([str(tmp_path / "first"), str(tmp_path / "second")])
    loss_axes, ap_axes = drawn[0].axes
    assert [line.get_label() for line in loss_axes.lines] == ["first", "second"]
    assert [line.get_ydata()[0] for line in ap_axes.lines] == [30.0, 40.0]
    assert [text.get_text() for text in ap_axes.get_legend().get_texts()] == ["first", "second"]


def test_runs_without_metrics_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        plot.read_metrics(str(tmp_path))
    (tmp_path / "metrics.json").write_text("hello")
    with pytest.raises(UserError, match="no file of training metrics"):
        plot.read_metrics(str(tmp_path))
    write(tmp_path, [{"iteration": 1}])
    with pytest.raises(UserError, match="no losses"):
        plot.read_metrics(str(tmp_path))
