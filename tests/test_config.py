"""Configurations by name."""

import ddetr_d2
from ddetr_d2.errors import UserError

import pytest
import yaml

from .conftest import ROOT


@pytest.mark.parametrize("name", ["deformable_detr_refine", "detr.yaml"])
def test_a_configuration_is_found_by_its_name(name):
    path = ddetr_d2.config_file(name)
    with open(path) as file:
        assert yaml.safe_load(file)["OUTPUT_DIR"].endswith(name.removesuffix(".yaml"))


def test_unknown_names():
    with pytest.raises(UserError, match="'deformable_dert'; did you mean deformable_detr"):
        ddetr_d2.config_file("deformable_dert")


def test_an_installed_package_has_them_within(tmp_path, monkeypatch):
    inside = tmp_path / "configs"
    inside.mkdir()
    (inside / "detr.yaml").write_text("MODEL: {}")
    monkeypatch.setattr(ddetr_d2.config, "_CONFIGS", (inside, ROOT / "configs"))
    assert ddetr_d2.config_file("detr") == str(inside / "detr.yaml")
