"""Labels in scripts that Matplotlib's own font does not have.

With fonts made here: nothing depends on which are installed.
"""

import logging
import warnings

from ddetr_d2.visualization import SamplingPanel, SamplingPoints, draw_sampling, labels
from ddetr_d2.visualization.labels import MISSING, set_label_fonts

import matplotlib
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """As on a computer without fonts, before the first label; a list to put font files in."""
    own = matplotlib.get_data_path()
    fonts = [entry for entry in font_manager.fontManager.ttflist if own in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    files = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    monkeypatch.setattr(labels, "_family_of", {})
    monkeypatch.setattr(labels, "_reported", set())
    for function in (labels._missing_letters, labels._installed_fonts):
        function.cache_clear()
    yield files
    for function in (labels._missing_letters, labels._installed_fonts):
        function.cache_clear()


@pytest.fixture
def install(installed, tmp_path):
    """Makes a font whose letters are black blocks."""

    def make(family, letters):
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for point in ((0, 1000), (1000, 1000), (1000, 0)):
            pen.lineTo(point)
        pen.closePath()
        names = [".notdef", *(f"u{ord(c):04X}" for c in letters)]
        builder = FontBuilder(1000)
        builder.setupGlyphOrder(names)
        builder.setupCharacterMap({ord(c): f"u{ord(c):04X}" for c in letters})
        builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
        builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
        builder.setupHorizontalHeader(ascent=1000, descent=0)
        builder.setupNameTable({"familyName": family, "styleName": "Regular"})
        builder.setupOS2(sTypoAscender=1000, usWeightClass=400)
        builder.setupPost()
        path = tmp_path / f"{family}.ttf"
        builder.save(path)
        installed.append(str(path))

    return make


def prepared(text):
    """The text as :func:`set_label_fonts` leaves it, and its picture, drawn without a warning."""
    figure = Figure((4, 1))
    canvas = FigureCanvasAgg(figure)
    label = figure.text(0.1, 0.3, text, fontsize=30)
    set_label_fonts([label])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas.draw()
    return label, np.asarray(canvas.buffer_rgba())[..., 0]


def test_fonts_that_have_the_letters_are_added(install, caplog):
    install("Hangul Blocks", "삼각형")
    install("Han Blocks", "三角形星")
    label, picture = prepared("cat 三角 삼각")
    assert label.get_text() == "cat 三角 삼각"
    assert label.get_fontfamily() == ["sans-serif", "Han Blocks", "Hangul Blocks"]
    assert not caplog.records
    squares = prepared(f"cat {MISSING * 2} {MISSING * 2}")[1]
    assert (picture < 128).sum() > 2 * (squares < 128).sum()  # four blocks


def test_as_few_fonts_as_will_do(install):
    install("Half", "三角")
    install("Whole", "三角形星")
    assert prepared("三角形")[0].get_fontfamily() == ["sans-serif", "Whole"]


def test_letters_of_matplotlibs_own_font_need_none(caplog):
    label, _ = prepared("Ελληνικά Кириллица مثلث 😀")
    assert label.get_fontfamily() == ["sans-serif"]
    assert MISSING not in label.get_text() and not caplog.records


def test_without_a_font_squares_are_drawn_and_the_log_says_once_what_to_install(caplog):
    with caplog.at_level(logging.WARNING, "ddetr_d2"):
        assert prepared("三角形 1")[0].get_text() == MISSING * 3 + " 1"
        assert prepared("星 삼각형")[0].get_text() == f"{MISSING} {MISSING * 3}"
        assert prepared("त्रिकोण")[0].get_text() == MISSING * 7
        assert prepared("\N{SLICE OF PIZZA}")[0].get_text() == MISSING
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    for message, script, package in zip(
        messages,
        ("Han", "Devanagari", "emoji"),
        ("fonts-noto-cjk", "fonts-noto-core", "fonts-symbola"),
        strict=True,
    ):
        assert script in message and package in message
        assert message.isascii()  # for terminals of any encoding


@pytest.mark.parametrize(
    "name, drawn",
    [
        ("$5 to $x^2$ \\alpha", "$5 to $x^2$ \\alpha"),
        ("two\nlines\tand  blanks", "two lines and blanks"),
        ("half\ud83d\x00", f"half{MISSING * 2}"),
        ("e\u0301", "é"),
        ("\u2067a\u200d\ufe0f\u2069", "\u2067a\u200d\ufe0f\u2069"),  # invisible ones
        ("", ""),
    ],
)
def test_characters_are_drawn_literally(name, drawn):
    label, picture = prepared(name)
    assert label.get_text() == drawn
    assert label.get_parse_math() is False
    assert (picture < 128).any() == bool(name)


def instances():
    boxes = Boxes(torch.tensor([[10.0, 10.0, 190.0, 90.0]]))
    return Instances(
        (100, 200), pred_boxes=boxes, scores=torch.tensor([0.9]), pred_classes=torch.tensor([0])
    )


@pytest.mark.parametrize("visualizer", [Visualizer, VideoVisualizer])
def test_detectron2s_visualizers(install, visualizer):
    install("Han Blocks", "三角形")
    metadata = Metadata(thing_classes=["三角形 $"], thing_colors=[[0, 255, 0]])
    image = np.zeros((100, 200, 3), np.uint8)
    if visualizer is Visualizer:
        drawing = Visualizer(image, metadata).draw_instance_predictions(instances())
    else:
        drawing = VideoVisualizer(metadata).draw_instance_predictions(image, instances())
    set_label_fonts(drawing.ax.texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing.get_image()
    (label,) = drawing.ax.texts
    assert label.get_text() == "三角形 $ 90%"
    assert "Han Blocks" in label.get_fontfamily()


def test_pictures_of_sampling_points():
    points = SamplingPoints(
        torch.tensor([20.0, 20.0]), torch.full((1, 1, 1, 2), 20.0), torch.ones(1, 1, 1)
    )
    panel = SamplingPanel("decoder: 三角形", points, (10, 10, 30, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: glyph missing
        picture = draw_sampling(np.zeros((40, 40, 3), np.uint8), [panel])
    assert picture.ndim == 3
