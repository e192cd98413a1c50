"""Weights by their name on the hub, which is one on the loopback address here."""

from pathlib import Path

import ddetr_d2.checkpoint.hub  # noqa: F401  registers the handler
from ddetr_d2.errors import UserError

import pytest
from detectron2.utils.file_io import PathManager

from ..hub import COMMIT, Hub

SAFETENSORS = {"config.json": "{}", "model.safetensors": "tensors", "README.md": "read"}
PICKLED = {"config.json": "{}", "pytorch_model.bin": "pickled", "preprocessor_config.json": "[]"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    for model, files in {
        "org/both": SAFETENSORS | PICKLED,
        "org/pickled": PICKLED,
        "org/other": {"weights/detector.pth": "a detector"},
    }.items():
        for name, text in files.items():
            path = tmp_path / "models" / model / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    with Hub(tmp_path / "models") as server:
        # What HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE set when a program starts.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def test_safetensors_are_preferred(hub):
    folder = Path(PathManager.get_local_path("hf://org/both"))
    assert (folder / "model.safetensors").read_text() == "tensors"
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "preprocessor_config.json"]


def test_pickled_weights_where_there_are_no_others(hub):
    folder = Path(PathManager.get_local_path(f"hf://org/pickled@{COMMIT}"))
    assert (folder / "pytorch_model.bin").read_text() == "pickled"


def test_a_file_of_a_model(hub):
    path = PathManager.get_local_path("hf://org/other@main/weights/detector.pth")
    assert Path(path).read_text() == "a detector"
    assert hub.fetched == ["weights/detector.pth"]


def test_fetched_once(hub):
    for _ in range(2):
        PathManager.get_local_path("hf://org/both")
    assert hub.fetched.count("model.safetensors") == 1


def test_offline_from_the_cache(hub, monkeypatch):
    online = PathManager.get_local_path("hf://org/both")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert PathManager.get_local_path("hf://org/both") == online
    with pytest.raises(UserError, match="hf://org/pickled cannot be fetched: it is not in the"):
        PathManager.get_local_path("hf://org/pickled")


@pytest.mark.parametrize(
    "path, message",
    [
        ("hf://org", "is no model on the hub; give hf://ORG/NAME"),
        ("hf://org/absent", "there is no public model org/absent"),
        ("hf://org/both@v2", "org/both has no revision 'v2'"),
        ("hf://org/both@v2/config.json", "org/both has no revision 'v2'"),
        ("hf://org/both/model.pth", "org/both has no file 'model.pth'"),
        ("hf://org/other", "org/other has no model.safetensors and no pytorch_model.bin; name a"),
    ],
)
def test_what_is_not_there(hub, path, message):
    with pytest.raises(UserError, match=message):
        PathManager.get_local_path(path)


def test_hub_that_cannot_be_reached(hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match="hf://org/both cannot be fetched: it is not in the cache"):
        PathManager.get_local_path("hf://org/both")
