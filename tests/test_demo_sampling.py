"""Pictures of sampling points: demo/demo.py --show-sampling and ddetr_d2.visualization."""

import sys
from pathlib import Path

from ddetr_d2.checkpoint import DetrCheckpointer
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError, exit_on_user_error
from ddetr_d2.visualization import AttentionRecorder, SamplingPanel, SamplingPoints, draw_sampling

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demo"))  # as Python does for the program

import images  # noqa: E402
from sampling import SamplingRequest  # noqa: E402

import demo  # noqa: E402

# Levels of strides 8, 16 and 32; four heads start with the directions right, down, left, up.
CONFIG = f"""\
_BASE_: {ROOT}/configs/synthetic_demo.yaml
MODEL:
  DEVICE: cpu
  RESNETS:
    STEM_OUT_CHANNELS: 8
    RES2_OUT_CHANNELS: 8
  DEFORMABLE_DETR:
    HIDDEN_DIM: 32
    NUM_HEADS: 4
    ENC_POINTS: 2
    DEC_POINTS: 2
    DIM_FEEDFORWARD: 32
    NUM_QUERIES: 10
    ENC_LAYERS: 2
    DEC_LAYERS: 2
    NUM_CLASSES: 3
DATASETS:
  TRAIN: ()
  TEST: ()
INPUT:
  MIN_SIZE_TEST: 64
  MAX_SIZE_TEST: 96
"""
# The same as a DETR.
DETR = (
    *("MODEL.META_ARCHITECTURE", "DETR"),
    *("MODEL.DEFORMABLE_DETR.IN_FEATURES", "['res4']"),
    *("MODEL.DEFORMABLE_DETR.NUM_FEATURE_LEVELS", "1"),
    *("MODEL.DEFORMABLE_DETR.WITH_BOX_REFINE", "False"),
    *("MODEL.DEFORMABLE_DETR.TWO_STAGE", "False"),
)
DIRECTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
STRIDES = torch.tensor([8.0, 16.0, 32.0])


@pytest.fixture(autouse=True)
def no_log(monkeypatch):
    """Detectron2's loggers would keep the stdout of the first test."""
    monkeypatch.setattr(demo, "setup_logger", lambda **_: None)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("sampling") / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def build(config):
    def build(*opts):
        torch.manual_seed(0)
        return build_model(setup_cfg(str(config), opts)).eval()

    return build


def record(model, height, width):
    """Run the model on an image of this size, seen as one of twice the size."""
    inputs = {
        "image": torch.rand(3, height, width) * 255,
        "height": 2 * height,
        "width": 2 * width,
    }
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        (output,) = model([inputs])
    return recorder, output["instances"]


def steps(scale=1.0):
    """(4 heads, 3 levels, 2 points, 2): one and two cells of the level in the head's direction."""
    distance = STRIDES[:, None] * torch.tensor([1.0, 2.0]) * scale
    return DIRECTIONS[:, None, None] * distance[None, ..., None]


def test_encoder_looks_around_the_token_at_the_pixel(build):
    recorder, _ = record(build(), 64, 96)
    points = recorder.from_pixel((100, 50), (128, 192))  # cells are 16 pixels wide
    assert points.cell == (96, 48, 112, 64)
    torch.testing.assert_close(points.reference, torch.tensor([104.0, 56.0]))
    torch.testing.assert_close(points.locations, points.reference + steps(2.0))
    torch.testing.assert_close(points.weights, torch.full((4, 3, 2), 1 / 6))


@pytest.mark.parametrize(
    "pixel, cell", [((0, 0), (0, 0, 16, 16)), ((191, 127), (176, 112, 192, 128))]
)
def test_pixels_in_the_corners(build, pixel, cell):
    recorder, _ = record(build(), 64, 96)
    assert recorder.from_pixel(pixel, (128, 192)).cell == cell


def test_padded_images(build, monkeypatch):
    """80 pixels are padded to 128: 16, 8 and 4 cells, of which 10, 5 and 3 count as unpadded."""
    model = build()
    monkeypatch.setattr(type(model.backbone), "size_divisibility", 64)
    recorder, _ = record(model, 64, 80)
    points = recorder.from_pixel((159, 0), (128, 160))  # cell 9 of 10
    assert points.cell == (144, 0, 160, 16)
    torch.testing.assert_close(points.reference, torch.tensor([152.0, 8.0]))
    center = torch.tensor([[9.5, 0.5], [4.75, 0.25], [2.85, 0.125]])  # in cells of each level
    expected = (center * STRIDES[:, None])[:, None] * 2 + steps(2.0)
    torch.testing.assert_close(points.locations, expected)


def test_without_attention_across_levels_a_token_looks_at_its_own(build, monkeypatch):
    model = build("MODEL.DEFORMABLE_DETR.MULTI_SCALE_ATTENTION", "False")
    monkeypatch.setattr(type(model.backbone), "size_divisibility", 64)
    recorder, _ = record(model, 64, 80)
    points = recorder.from_pixel((159, 17), (128, 160))
    assert points.cell == (144, 16, 160, 32)
    torch.testing.assert_close(points.reference, torch.tensor([152.0, 24.0]))
    torch.testing.assert_close(points.locations, points.reference + steps(2.0)[:, :1])
    torch.testing.assert_close(points.weights, torch.full((4, 1, 2), 1 / 2))


def test_decoder_looks_around_the_reference_point(build):
    """Without refinement all layers look around the point that a query has learned."""
    opts = ("MODEL.DEFORMABLE_DETR.TWO_STAGE", "False")
    model = build(*opts, "MODEL.DEFORMABLE_DETR.WITH_BOX_REFINE", "False")
    recorder, instances = record(model, 64, 96)
    learned = model.transformer.queries
    position = learned.query_embed.weight[:, :32]
    reference = learned.reference_points(position).sigmoid() * torch.tensor([192.0, 128.0])
    for query in instances.queries[:3]:
        points = recorder.from_query(query, instances.image_size)
        torch.testing.assert_close(points.reference, reference[query].detach())
        torch.testing.assert_close(points.locations, points.reference + steps(2.0))
        assert points.cell is None


def test_decoder_of_the_two_stage_variant_looks_at_the_box(build):
    """Boxes do not move with initial weights: the last one is the reference of the last layer,
    whose points lie at 1/2 and 2/2 of half its sides."""
    recorder, instances = record(build(), 64, 96)
    box = instances.pred_boxes[0]
    points = recorder.from_query(instances.queries[0], instances.image_size)
    torch.testing.assert_close(points.reference, box.get_centers()[0])
    x0, y0, x1, y1 = box.tensor[0].tolist()
    half = torch.tensor([x1 - x0, y1 - y0]) / 2
    offsets = DIRECTIONS[:, None, None] * torch.tensor([[0.5], [1.0]]) * half
    torch.testing.assert_close(
        points.locations, (points.reference + offsets).expand(4, 3, 2, 2), rtol=1e-4, atol=1e-3
    )


def test_weights_of_a_head_sum_to_one_and_are_those_of_the_last_layer(build):
    model = build()
    transformer = model.transformer  # the weights of the other layers stay equal
    for attention in (
        transformer.encoder.layers[-1].self_attn,
        transformer.decoder.layers[-1].cross_attn,
    ):
        torch.nn.init.normal_(attention.attention_weights.weight)
    recorder, instances = record(model, 64, 96)
    size = instances.image_size
    encoder = recorder.from_pixel((5, 5), size)
    decoder = recorder.from_query(instances.queries[0], size)
    for points in (encoder, decoder):
        torch.testing.assert_close(points.weights.sum((1, 2)), torch.ones(4))
        assert points.weights.std() > 0.01


def test_hooks_are_removed(build):
    model = build()
    recorder, _ = record(model, 64, 96)
    before = recorder.from_pixel((5, 5), (128, 192))
    model([{"image": torch.zeros(3, 64, 64)}])
    torch.testing.assert_close(recorder.from_pixel((5, 5), (128, 192)).reference, before.reference)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_mistakes_in_python(build):
    recorder, _ = record(build("MODEL.DEFORMABLE_DETR.ENC_LAYERS", "0"), 64, 96)
    with pytest.raises(UserError, match="192,5 lies outside of the image of 192 x 128"):
        recorder.from_pixel((192, 5), (128, 192))
    with pytest.raises(UserError, match="ENC_LAYERS is 0"):
        recorder.from_pixel((5, 5), (128, 192))
    with pytest.raises(UserError, match="this one is a Linear"):
        AttentionRecorder(torch.nn.Linear(1, 1))


def panel(x, y, box):
    """Two points right and left of (x, y), the left one with all the weight."""
    locations = torch.tensor([[x + 10.0, y], [x - 10.0, y]]).view(1, 1, 2, 2)
    weights = torch.tensor([0.0, 1.0]).view(1, 1, 2)
    return SamplingPanel("$_{", SamplingPoints(torch.tensor([x, y]), locations, weights), box)


def test_the_picture_shows_points_in_the_colour_of_their_weight():
    picture = draw_sampling(np.zeros((60, 80, 3), np.uint8), [panel(40.0, 30.0, (25, 20, 55, 40))])
    axes = picture[:, : int(picture.shape[1] * 0.85)].astype(int)  # without the colour bar
    yellow = np.argwhere((axes[..., 0] > 200) & (axes[..., 1] > 200) & (axes[..., 2] < 100))
    blue = np.argwhere((axes[..., 2] > 100) & (axes[..., 0] < 60) & (axes[..., 1] < 60))
    green = np.argwhere((axes[..., 1] > 200) & (axes[..., 0] < 50))
    assert len(yellow) > len(blue) > 5
    cross = green.mean(0)
    assert yellow.mean(0)[1] < cross[1] - 30 and blue.mean(0)[1] > cross[1] + 30
    assert abs(yellow.mean(0)[0] - cross[0]) < 3


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (40, 60)])
def test_any_shape_and_number(shape):
    height, width = shape
    image = np.zeros((height, width, 3), np.uint8)
    for number in (1, 2, 5):
        box = (0, 0, width, height)
        picture = draw_sampling(image, [panel(width / 2, height / 2, box)] * number)
        assert picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8
        assert 200 < min(picture.shape[:2]) and max(picture.shape[:2]) < 2000


def test_a_query_with_several_classes_is_shown_once(build):
    recorder, instances = record(build(), 64, 96)
    chosen = Instances(
        (128, 192),
        pred_boxes=Boxes(torch.tensor([[1.0, 1, 9, 9], [1.0, 1, 9, 9], [2.0, 2, 8, 8]])),
        scores=torch.tensor([0.9, 0.8, 0.7]),
        pred_classes=torch.tensor([2, 1, 0]),
        queries=torch.tensor([4, 4, 3]),
    )
    metadata = Metadata(thing_classes=["RBC", "WBC", "Platelets"])
    panels = SamplingRequest(5, [(7, 9)], None).panels(recorder, chosen, metadata)
    assert [p.title for p in panels] == [
        "decoder: Platelets 90%",
        "decoder: RBC 70%",
        "encoder: pixel 7,9",
    ]
    assert panels[1].box == (2, 2, 8, 8) and panels[2].box == (0, 0, 16, 16)
    assert len(SamplingRequest(1, [], None).panels(recorder, chosen, Metadata())) == 1


@pytest.fixture
def arguments(config, build):
    def arguments(*args, opts=()):
        weights = config.parent / f"{'detr' if opts else 'model'}.pth"
        if not weights.exists():
            DetrCheckpointer(build(*opts), str(config.parent)).save(weights.stem)
        fixed = ["--config-file", str(config), "--confidence-threshold", "0"]
        changes = ["--opts", *opts, "MODEL.WEIGHTS", str(weights)]
        return demo.get_parser().parse_args([*fixed, *map(str, args), *changes])

    return arguments


def write_image(path, size=(96, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path)
    return path


def test_the_program_writes_pictures(arguments, tmp_path, capsys):
    write_image(tmp_path / "a" / "x.png")
    write_image(tmp_path / "a" / "x.jpg", size=(50, 70))
    out = tmp_path / "out"
    inputs = ["--input", tmp_path / "a", "--output", out]

    assert demo.run(arguments(*inputs, "--show-sampling", "--sampling-pixels", "0,0", "49,63")) == 0

    written = sorted(p.name for p in out.iterdir())
    assert written == ["x.jpg", "x.png", "x_sampling.png", "x_sampling_2.png"]
    picture = cv2.imread(str(out / "x_sampling.png"))
    assert picture.std() > 10
    assert "x_sampling_2.png" in capsys.readouterr().out
    assert demo.run(arguments(*inputs, "--sampling-detections", "0")) == 0
    assert "none to show where the detector looks" in capsys.readouterr().out


def test_the_program_writes_heat_maps_of_detr(arguments, tmp_path):
    image = write_image(tmp_path / "x.png")
    inputs = ["--input", image, "--output", tmp_path / "out"]
    chosen = ["--sampling-detections", "3", "--sampling-pixels", "0,0"]
    assert demo.run(arguments(*inputs, *chosen, opts=DETR)) == 0
    picture = cv2.imread(str(tmp_path / "out" / "x_sampling.png"))
    # On the black image, and without the colour bar, weights are all that is coloured.
    assert (np.ptp(picture[:, : int(picture.shape[1] * 0.8)].astype(int), axis=2) > 50).mean() > 0.1


def test_the_window_shows_them_after_the_drawing(arguments, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(demo, "check_windows", lambda: None)
    monkeypatch.setattr(images, "show", lambda picture, wait: shown.append(picture) or True)
    image = write_image(tmp_path / "x.png")
    assert demo.run(arguments("--input", image, "--sampling-detections", "1")) == 0
    assert len(shown) == 2
    assert shown[0].shape != shown[1].shape


def test_not_of_augmented_copies(arguments, tmp_path):
    args = arguments("--input", write_image(tmp_path / "x.png"), "--output", tmp_path / "out")
    args.show_sampling, args.opts = True, [*args.opts, "TEST.AUG.ENABLED", "True"]
    with pytest.raises(UserError, match="set TEST.AUG.ENABLED False"):
        demo.run(args)


@pytest.mark.parametrize(
    "message, args",
    [
        ("of images only", ["--webcam", "--show-sampling"]),
        ("of images only", ["--video-input", "clip.avi", "--sampling-pixels", "3,4"]),
        ("--sampling-pixels 3;4 is no pixel", ["--input", "{}", "--sampling-pixels", "3;4"]),
        ("--sampling-pixels 3 is no pixel", ["--input", "{}", "--sampling-pixels", "3"]),
        ("x.png: pixel 96,3 lies outside", ["--input", "{}", "--sampling-pixels", "0,0", "96,3"]),
        ("-1 is no number", ["--input", "{}", "--sampling-detections", "-1"]),
        ("x_sampling.png would replace", ["--input", "{}", "{}_sampling.png", "--show-sampling"]),
    ],
)
def test_mistakes(arguments, tmp_path, capsys, message, args):
    write_image(tmp_path / "x.png")
    write_image(tmp_path / "out" / "x_sampling.png")
    args = [arg.replace("{}_", str(tmp_path / "out" / "x_")) for arg in args]
    args = [arg.replace("{}", str(tmp_path / "x.png")) for arg in args]
    with pytest.raises(SystemExit) as exit, exit_on_user_error():
        demo.run(arguments(*args, "--output", tmp_path / "out"))
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
