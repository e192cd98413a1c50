"""torch.compile of the detector."""

import pytest
import torch
from torch._dynamo.utils import counters

SIZES = [(130, 98), (194, 162), (150, 130)]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def make_batch(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)}
        for size in sizes
    ]


def assert_same(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        result, wanted = result["instances"], wanted["instances"]
        torch.testing.assert_close(result.scores, wanted.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            result.pred_boxes.tensor, wanted.pred_boxes.tensor, atol=1e-2, rtol=0
        )


@pytest.mark.parametrize(
    "variant, backend", [("deformable_detr_single_scale", "aot_eager"), ("detr", "eager")]
)
def test_one_graph_without_breaks_for_images_of_many_sizes(variant, backend, build):
    model = build(variant)
    batches = [make_batch(size, (100, 90)) for size in SIZES]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
        model.predict = torch.compile(model.predict, dynamic=True, fullgraph=True, backend=backend)
        for batch, wanted in zip(batches, expected, strict=True):
            assert_same(model(batch), wanted)
    assert counters["stats"]["unique_graphs"] == 1


def test_the_model_itself(build):
    """Lists of images break the graph; the rest is compiled."""
    model = build("deformable_detr_single_scale")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for size in SIZES[:2]:
            batch = make_batch(size, (100, 90))
            assert_same(compiled(batch), model(batch))
