"""What is installed by `make setup` holds all that the package says it needs."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def names(lines: list[str]) -> set[str]:
    """Packages of requirements, under the names that PyPI gives them."""
    found = (re.match(r"[\w.-]+", line.strip()) for line in lines)
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found if match}


def test_requirements_are_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = names(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted |= names(extra)
    wanted |= names((ROOT / "requirements.in").read_text().splitlines())
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    assert wanted - {"ddetr-d2"} <= names([pin for pin in pins if "==" in pin]), "run make pins"
