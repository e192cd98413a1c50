"""Counting images that cannot be read, in several processes; see test_loader.py for one."""

from ddetr_d2.data.unreadable import UnreadableImage, UnreadableImages
from ddetr_d2.errors import UserError

import pytest


def test_processes_stop_together():
    """Each has met one bad image, and none would stop by itself."""
    bad = [UnreadableImage("a.jpg", "a.jpg is gone"), UnreadableImage("b.jpg", "b.jpg is gone")]
    processes = [UnreadableImages(100, 0.01) for _ in bad]
    for process, image in zip(processes, bad, strict=True):
        process.found([image, image])
        process.check()
    pending = [process.pending for process in processes]
    assert pending == [[bad[0]], [bad[1]]]
    for process in processes:
        with pytest.raises(UserError, match="2 of the 100 training images"):
            process.agree(lambda own: pending)
        assert process.pending == []
    assert processes[0].state_dict() == processes[1].state_dict()
