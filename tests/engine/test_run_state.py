"""Figures of a run that is continued."""

import json

from ddetr_d2.engine.run_state import RunStorage, restore_storage, storage_state


def test_continued_twice_between_two_evaluations(tmp_path):
    """AP was written before the first time, total_loss has not been written yet."""
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"iteration": 10, "bbox/AP": 50.0}) + "\n")
    storage = RunStorage(10)
    storage.put_scalar("bbox/AP", 50.0, smoothing_hint=False)
    for step in (11, 12):
        storage.put_scalar("total_loss", 2.0 * step, cur_iter=step)
    state = storage_state(storage, str(metrics))
    for _ in range(3):
        with metrics.open("a") as file:
            file.write(json.dumps({"iteration": 13}) + "\n")  # by the run that was killed
        continued = RunStorage(13)
        restore_storage(state, continued, str(metrics))
        state = storage_state(continued, str(metrics))
    assert len(metrics.read_text().splitlines()) == 1
    assert continued.histories()["bbox/AP"].values() == [(50.0, 10)]
    assert continued.histories()["total_loss"].values() == [(22.0, 11), (24.0, 12)]
    # What a writer has to write still.
    assert continued.latest() == {"total_loss": (24.0, 12)}
