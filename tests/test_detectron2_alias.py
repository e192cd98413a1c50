"""What third_party/detectron2 promises.

With an upstream Detectron2 in the environment there is no alias and nothing to test.
"""

import importlib
import importlib.util
import pickle
import runpy
import subprocess
import sys
from importlib import resources

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("detectron2_alias") is None,
    reason="Detectron2 is not installed through the alias",
)


def run(code):
    """Run code in an interpreter that has imported nothing yet."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "name", ["layers", "structures", "data.transforms", "projects.point_rend", "utils.visualizer"]
)
def test_same_modules(name):
    alias = importlib.import_module(f"detectron2.{name}")
    assert alias is importlib.import_module(f"LabGym.detectron2.{name}")
    assert alias.__spec__.name == f"LabGym.detectron2.{name}"


def test_same_modules_if_the_wheels_name_comes_first():
    out = run(
        """
import LabGym.detectron2.utils.logger
import detectron2.utils.logger, detectron2.structures
import LabGym.detectron2 as target
assert detectron2 is target and detectron2.utils.logger is target.utils.logger
assert detectron2.structures is target.structures

import logging
detectron2.utils.logger.setup_logger()
logging.getLogger("LabGym.detectron2.engine.hooks").info("first")
logging.getLogger("detectron2.engine.hooks").info("second")
"""
    )
    # Log lines look as upstream's, and each appears once.
    assert "LabGym" not in out
    assert out.count("d2.engine.hooks") == 2
    assert out.count("first") == out.count("second") == 1


def test_pickles():
    from detectron2.structures import Boxes

    assert pickle.loads(pickle.dumps(Boxes)) is Boxes
    # as pickled where Detectron2 has its own name
    assert pickle.loads(b"cdetectron2.structures.boxes\nBoxes\n.") is Boxes


def test_resources():
    from detectron2 import model_zoo

    assert (resources.files("detectron2") / "model_zoo" / "configs").is_dir()
    assert model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml").endswith(".yaml")


def test_runs_as_program():
    assert "collect_env_info" in runpy.run_module("detectron2.utils.collect_env")


def test_missing_module_is_reported_under_the_name_asked_for():
    with pytest.raises(ModuleNotFoundError, match="'detectron2.no_such_module'"):
        importlib.import_module("detectron2.no_such_module")


def test_gives_way_to_installed_detectron2(tmp_path):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = 'installed'")
    (package / "layers.py").write_text("name = __name__")
    run(
        f"""
import sys
sys.path.append({str(tmp_path)!r})
import detectron2, detectron2.layers
assert detectron2.__version__ == "installed"
assert detectron2.layers.name == "detectron2.layers"
try:
    import detectron2.structures
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("mixes two Detectron2s")
assert "LabGym" not in sys.modules
"""
    )


def test_costs_nothing_at_start():
    run("import sys; assert not {'torch', 'LabGym', 'detectron2'} & set(sys.modules)")
