"""Which checkpoint a run continues from."""

from ddetr_d2.checkpoint import newest_checkpoint
from ddetr_d2.checkpoint.run_folder import has_checkpoint
from ddetr_d2.checkpoint.whole_files import save_whole
from ddetr_d2.errors import UserError

import pytest


def save(folder, name, iteration):
    save_whole({"model": {}, "iteration": iteration}, f"{folder}/{name}.pth")


@pytest.fixture
def run(tmp_path):
    """A folder with the checkpoints of iterations 99 and 199, the best of 149, the final of 249."""
    for name, iteration in (("0000099", 99), ("0000199", 199), ("best", 149), ("final", 249)):
        save(tmp_path, f"model_{name}", iteration)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def flip(path):
    """Another value of a byte that has a checksum: that of the iteration."""
    content = bytearray(path.read_bytes())
    content[content.index(b"iteration") + 2] ^= 1
    path.write_bytes(content)


def newest(folder, caplog):
    """The name of the checkpoint and what is said about it."""
    caplog.clear()
    path = newest_checkpoint(str(folder))
    assert path.startswith(f"{folder}/")
    return path.removeprefix(f"{folder}/"), [record.message for record in caplog.records]


def test_the_one_named_last_without_a_word(run, caplog):
    assert newest(run, caplog) == ("model_final.pth", [])
    (run / "last_checkpoint").write_text("model_0000099.pth\n")
    assert newest(run, caplog) == ("model_0000099.pth", [])
    save(run, "another_name", 5)
    (run / "last_checkpoint").write_text("another_name.pth")
    assert newest(run, caplog) == ("another_name.pth", [])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (cut, "is cut short or damaged"),
        (flip, "is damaged (the checksum of data.pkl is wrong)"),
    ],
)
def test_the_newest_whole_one_where_the_last_is_not(damage, words, run, caplog):
    damage(run / "model_final.pth")
    assert newest(run, caplog) == (
        "model_0000199.pth",
        [
            f"{run}/last_checkpoint names model_final.pth, which {words}; resuming from "
            "model_0000199.pth (iteration 199), the newest that is whole."
        ],
    )


def test_order_of_iterations(run, caplog):
    """Each time the newest goes, the next follows, whatever it is called."""
    for name in ("model_final.pth", "model_0000199.pth", "model_best.pth", "model_0000099.pth"):
        (run / "last_checkpoint").unlink(missing_ok=True)
        assert newest(run, caplog)[0] == name
        cut(run / name)
        (run / "last_checkpoint").write_text(name)
    message = (
        f"no checkpoint in {run} can be resumed: model_0000099.pth is cut short or damaged, .*"
        "model_final.pth is cut short or damaged.*Copy a whole one .*another OUTPUT_DIR"
    )
    with pytest.raises(UserError, match=message):
        newest_checkpoint(str(run))


def test_all_that_is_damaged_is_named(run, caplog):
    flip(run / "model_final.pth")
    flip(run / "model_0000199.pth")
    name, (message,) = newest(run, caplog)
    assert name == "model_best.pth"
    assert message.endswith(
        "resuming from model_best.pth (iteration 149), the newest that is whole: "
        "model_0000199.pth is damaged (the checksum of data.pkl is wrong)."
    )


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff\xfe", "cannot be read"),
        (bytes(15), "is damaged"),
        (b"../model_0000099.pth", "names ../model_0000099.pth, which is not in the folder"),
        (b"/tmp/model.pth", "names /tmp/model.pth, which is not in the folder"),
        (b"..", "names .., which is not in the folder"),
        (None, "does not exist"),
    ],
)
def test_last_checkpoint_that_names_none(content, words, run, caplog):
    last = run / "last_checkpoint"
    last.unlink() if content is None else last.write_bytes(content)
    name, (message,) = newest(run, caplog)
    assert name == "model_final.pth"
    assert message.startswith(f"{last} {words}; resuming from model_final.pth (iteration 249)")


def test_nothing_to_resume(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert not has_checkpoint(str(folder))
        assert newest_checkpoint(str(folder)) == ""
    (tmp_path / "model_coco.pth").write_bytes(b"somebody's weights")
    assert newest_checkpoint(str(tmp_path)) == ""


def test_a_trace_of_checkpoints_is_not_a_fresh_start(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000099.pth")
    with pytest.raises(UserError, match="can be resumed: model_0000099.pth does not exist"):
        newest_checkpoint(str(tmp_path))
    (tmp_path / "last_checkpoint").write_text("")
    with pytest.raises(UserError, match="can be resumed: last_checkpoint is empty"):
        newest_checkpoint(str(tmp_path))
