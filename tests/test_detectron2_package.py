"""What third_party/detectron2 promises of the Detectron2 that it installs."""

import importlib.metadata
import importlib.util
import os
import pickle
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTALL = ROOT / "third_party" / "detectron2" / "install.py"


@pytest.fixture(scope="module")
def install():
    spec = importlib.util.spec_from_file_location("install_detectron2", INSTALL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_only_detectron2_is_taken_and_has_its_own_name(install, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "RENAMED_FILES", 1)
    wheel = make_wheel(
        tmp_path / "carrier.whl",
        {
            "LabGym/__init__.py": "raise ImportError",
            "LabGym/detectron2/__init__.py": "__version__ = '0.6'",
            "LabGym/detectron2/layers.py": "from LabGym.detectron2 import __version__ as v",
            "LabGym/detectron2/model_zoo/configs/LVISv0.5/a.yaml": "LabGym.detectron2",
            "labgym-3.1.2.dist-info/METADATA": "",
        },
    )
    install.unpack(wheel, tmp_path / "source")
    files = sorted(
        str(path.relative_to(tmp_path / "source"))
        for path in (tmp_path / "source").rglob("*")
        if path.is_file()
    )
    assert files == [
        "detectron2/__init__.py",
        "detectron2/layers.py",
        "detectron2/model_zoo/configs/LVISv0.5/a.yaml",
        "pyproject.toml",
    ]
    code = "import detectron2.layers; assert detectron2.layers.v == '0.6'"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "source")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_another_wheel_is_refused(install, tmp_path):
    wheel = make_wheel(tmp_path / "other.whl", {"LabGym/detectron2/__init__.py": ""})
    with pytest.raises(SystemExit, match="other.whl is not the expected wheel: 0 files"):
        install.unpack(wheel, tmp_path / "source")
    assert not (tmp_path / "source" / "pyproject.toml").exists()


def test_gives_way_to_an_installed_detectron2(install, tmp_path, monkeypatch, capsys):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(install, "pip", lambda *_: pytest.fail("installs another one"))
    assert install.main() == 0
    assert capsys.readouterr().out == f"Detectron2 is installed already: {package}\n"


def installed_by_us():
    try:
        distribution = importlib.metadata.distribution("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return "under its own name" in (distribution.metadata["Summary"] or "")


@pytest.mark.skipif(not installed_by_us(), reason="another Detectron2 is installed")
def test_what_is_installed():
    from detectron2 import model_zoo
    from detectron2.structures import Boxes

    assert importlib.metadata.version("detectron2") == "0.6"
    assert pickle.dumps(Boxes, 0).startswith(b"cdetectron2.structures.boxes\n")
    assert (resources.files("detectron2") / "model_zoo" / "configs").is_dir()
    assert model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml").endswith(".yaml")
    assert not any(name.partition(".")[0] == "LabGym" for name in sys.modules)
    # Nothing runs when an interpreter starts.
    code = "import sys; assert not {'torch', 'detectron2', 'detectron2_alias'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
