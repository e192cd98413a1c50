#!/usr/bin/env python
"""Install Detectron2 0.6 from PyPI, unless a Detectron2 is there already.

::

    python third_party/detectron2/install.py

Detectron2 is not on PyPI, but a wheel there carries all of it under another name
(requirements-detectron2.txt names the wheel and its hash). This program takes that one folder out
of the wheel, gives its modules their own name back and installs it as the package ``detectron2``.

Exit code: 0; 1 if the wheel cannot be had or is not the expected one.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = Path(__file__).resolve().parents[2] / "requirements-detectron2.txt"
CARRIER = "LabGym"
VERSION = "0.6"
# Python files of the wheel that name Detectron2's modules, and how often.
RENAMED_FILES = 133

PROJECT = f"""\
[build-system]
requires = ["setuptools>=64"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "{VERSION}"
description = "Detectron2 out of the wheel {CARRIER}, under its own name, without compiled parts"
license = {{text = "Apache-2.0"}}
requires-python = ">=3.9"
dependencies = [
    "cloudpickle", "fvcore", "iopath", "matplotlib", "numpy", "omegaconf", "pillow", "pycocotools",
    "tabulate", "tensorboard", "termcolor", "torch", "torchvision", "tqdm", "yacs",
]

[tool.setuptools]
include-package-data = false

[tool.setuptools.packages.find]
include = ["detectron2*"]

[tool.setuptools.package-data]
detectron2 = ["**/*.yaml"]
"""


def main() -> int:
    if installed := find_detectron2():
        print(f"Detectron2 is installed already: {installed}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(Path(folder, "wheel"))
        source = Path(folder, "source")
        unpack(wheel, source)
        pip("install", "--no-build-isolation", str(source))
    return 0


def find_detectron2() -> str | None:
    """Where a Detectron2 that is under its own name lies; None if there is none."""
    for finder in sys.meta_path:
        # The regular finder only: an import hook may lend the name to something else.
        if getattr(finder, "__name__", "") == "PathFinder":
            spec = finder.find_spec("detectron2")
            if spec is not None:
                return str(Path(spec.origin or next(iter(spec.submodule_search_locations))).parent)
    return None


def download(folder: Path) -> Path:
    """The wheel, whose hash pip has compared."""
    pip("download", "--no-deps", "--ignore-requires-python", "--require-hashes",
        "--requirement", str(REQUIREMENT), "--dest", str(folder))  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    """Write Detectron2 out of ``wheel``, under its own name, as a project that pip installs."""
    renamed = 0
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.startswith(f"{CARRIER}/detectron2/") or name.endswith("/"):
                continue
            content = archive.read(name)
            if name.endswith(".py"):
                own = content.replace(f"{CARRIER}.detectron2".encode(), b"detectron2")
                renamed += own != content
                content = own
            path = folder / name.removeprefix(f"{CARRIER}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    if renamed != RENAMED_FILES:
        sys.exit(f"error: {wheel.name} is not the expected wheel: {renamed} files to rename")
    (folder / "pyproject.toml").write_text(PROJECT)


def pip(*arguments: str) -> None:
    """Run pip for this interpreter; ends the program if it fails, after its own message."""
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]]
    if code := subprocess.run(command).returncode:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
