"""What DetrCheckpointer saves, keeps and resumes."""

from ddetr_d2.checkpoint import DetrCheckpointer
from ddetr_d2.errors import UserError

import pytest
import torch
from detectron2.checkpoint import Checkpointer


class Model(torch.nn.Module):
    """A parameter under a name of this project."""

    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Linear(2, 2)

    @property
    def weight(self):
        return self.projection.weight


class Entry:
    """Something that has a state."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_resuming_restores_all_that_was_saved(tmp_path):
    source, target = Model(), Model()
    written = Entry({"seed": 3, "state": torch.arange(3)})
    DetrCheckpointer(source, str(tmp_path), run=written).save("model_0000009", iteration=9)
    assert files(tmp_path) == ["last_checkpoint", "model_0000009.pth"]
    read = Entry(None)
    checkpointer = DetrCheckpointer(target, str(tmp_path), run=read)
    assert checkpointer.has_checkpoint()
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 9
    assert checkpointer.resumed_from == str(tmp_path / "model_0000009.pth")
    assert torch.equal(target.weight, source.weight)
    assert read.state["seed"] == 3 and torch.equal(read.state["state"], torch.arange(3))
    # The weights alone where a run starts from them.
    read.state = None
    checkpointer.resume_or_load(str(tmp_path / "model_0000009.pth"), resume=False)
    assert read.state is None and checkpointer.resumed_from == ""


def test_a_folder_without_checkpoints_starts_from_the_weights(tmp_path):
    source, target = Model(), Model()
    DetrCheckpointer(source, str(tmp_path)).save("weights")
    checkpointer = DetrCheckpointer(target, str(tmp_path / "run"))
    checkpointer.resume_or_load(str(tmp_path / "weights.pth"), resume=True)
    assert torch.equal(target.weight, source.weight)
    assert not checkpointer.has_checkpoint() and checkpointer.resumed_from == ""


def test_checkpoints_of_earlier_versions_resume(tmp_path):
    """Written in place by Detectron2, without what is saved beside the model today."""
    source, target = Model(), Model()
    Checkpointer(source, str(tmp_path), trainer=Entry({"iteration": 4})).save("model_0000004")
    checkpointer = DetrCheckpointer(target, str(tmp_path), trainer=(trainer := Entry(None)), keep=1)
    checkpointer.resume_or_load("", resume=True)
    assert trainer.state == {"iteration": 4}
    assert torch.equal(target.weight, source.weight)
    checkpointer.save("model_0000009")
    assert "model_0000004.pth" in files(tmp_path)  # whose it is nobody knows


def test_a_checkpoint_that_cannot_be_written(tmp_path):
    checkpointer = DetrCheckpointer(Model(), str(tmp_path), keep=1)
    checkpointer.save("model_0000009")
    (tmp_path / "model_0000019.pth").mkdir()
    with pytest.raises(UserError, match="19.pth cannot be written: Is a dir.*; continue with --re"):
        checkpointer.save("model_0000019")
    assert files(tmp_path) == ["last_checkpoint", "model_0000009.pth", "model_0000019.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000009.pth"
    (tmp_path / "model_0000019.pth").rmdir()
    checkpointer.save("model_0000019")
    assert files(tmp_path) == ["last_checkpoint", "model_0000019.pth"]


def test_last_checkpoint_is_named_when_it_is_there(tmp_path):
    checkpointer = DetrCheckpointer(Model(), str(tmp_path), keep=1)
    checkpointer.save("model_0000009")
    (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "last_checkpoint").mkdir()
    with pytest.raises(UserError, match="last_checkpoint cannot be written"):
        checkpointer.save("model_0000019")
    # The new one is whole, the old one is not removed before it has its name.
    assert files(tmp_path) == ["last_checkpoint", "model_0000009.pth", "model_0000019.pth"]


def test_the_newest_are_kept_across_resuming(tmp_path):
    def checkpointer():
        return DetrCheckpointer(Model(), str(tmp_path), keep=2)

    for name in ("model_0000001", "model_coco", "model_9999999", "inference"):  # not of this run
        (tmp_path / f"{name}.pth").touch()
    others = files(tmp_path)
    run = checkpointer()
    for iteration in (9, 19, 29):
        run.save(f"model_{iteration:07d}", iteration=iteration)
    run.save("model_best", newest=False, iteration=29)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000029.pth"
    newest = ["model_0000019.pth", "model_0000029.pth"]
    expected = [*others, *newest, "last_checkpoint", "model_best.pth"]
    assert files(tmp_path) == sorted(expected)
    run = checkpointer()
    run.resume_or_load("", resume=True)
    run.save("model_0000029", iteration=29)  # once more, after a fall back
    assert files(tmp_path) == sorted(expected)
    run.save("model_0000039", iteration=39)
    run.save("model_final", iteration=39)
    expected.remove("model_0000019.pth")
    assert files(tmp_path) == sorted([*expected, "model_0000039.pth", "model_final.pth"])


def test_all_are_kept_by_default(tmp_path):
    checkpointer = DetrCheckpointer(Model(), str(tmp_path))
    for iteration in range(5):
        checkpointer.save(f"model_{iteration:07d}")
    assert len(files(tmp_path)) == 6
