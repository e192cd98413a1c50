import io
import pickle
from multiprocessing.reduction import ForkingPickler

from ddetr_d2.data.loader import TrainLoader
from ddetr_d2.data.transfer import pack, unpack

import pytest
import torch
from detectron2.structures import Boxes, Instances


def record(width=7):
    instances = Instances((5, width))
    instances.gt_boxes = Boxes(torch.rand(3, 4))
    instances.gt_classes = torch.tensor([2, 0, 1])
    image = torch.randint(256, (3, 5, width)).byte()
    return {"file_name": "a.jpg", "image_id": 4, "image": image, "instances": instances}


def test_records_come_back():
    sent = [record(), record(width=9)]
    received = unpack(pack([(x, []) for x in sent]))
    for x, (y, unreadable) in zip(sent, received, strict=True):
        assert (y["file_name"], y["image_id"], unreadable) == ("a.jpg", 4, [])
        assert y["instances"].image_size == x["instances"].image_size
        torch.testing.assert_close(y["image"], x["image"], rtol=0, atol=0)
        for name in ("gt_boxes", "gt_classes"):
            values = [r["instances"].get(name) for r in (x, y)]
            assert type(values[0]) is type(values[1])
            values = [getattr(value, "tensor", value) for value in values]
            torch.testing.assert_close(*values, rtol=0, atol=0)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5, dtype=torch.float64),
        torch.tensor([True, False, True]),
        torch.zeros(0, 4),
        torch.arange(12).view(3, 4).t(),
        torch.arange(10, dtype=torch.int16)[1::3],
        torch.rand(3).bfloat16().expand(2, 3),
        torch.rand(4, requires_grad=True),
        torch.eye(3).to_sparse(),
        torch.nn.Parameter(torch.rand(2)),
    ],
    ids=lambda x: f"{type(x).__name__} {x.dtype} {tuple(x.shape)}",
)
def test_any_tensor(tensor):
    before, received, after = unpack(pack((torch.ones(1).byte(), tensor, torch.ones(3))))
    assert type(received) is type(tensor)
    torch.testing.assert_close(received.detach(), tensor.detach(), rtol=0, atol=0)
    assert before.item() == 1 and after.tolist() == [1, 1, 1]
    for x in (received, after):  # kernels for vectors want that
        assert x.layout != torch.strided or x.numel() == 0 or x.data_ptr() % 16 == 0


def test_what_is_changed_in_one_is_not_changed_in_another():
    first, second, again = unpack(pack((x := torch.zeros(3), torch.zeros(3), x)))
    first += 1
    assert second.tolist() == [0, 0, 0]
    assert again is first


def test_one_tensor_goes_between_processes():
    file = io.BytesIO()
    shared = []

    class Counting(ForkingPickler):
        def reducer_override(self, value):
            shared.extend([value] if isinstance(value, torch.UntypedStorage) else [])
            return NotImplemented

    Counting(file, pickle.HIGHEST_PROTOCOL).dump(pack([record(), record()]))
    assert len(shared) == 1


def mapper(_):
    return record()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_gets_a_batch_as_one(num_workers):
    records = [{"file_name": f"{i}.jpg"} for i in range(4)]
    loader = TrainLoader(records, mapper, batch_size=2, seed=0, num_workers=num_workers)
    (batch,) = next(iter(loader))
    memory = {x["image"].untyped_storage().data_ptr() for x in batch}
    assert len(memory) == (1 if num_workers else 2)
