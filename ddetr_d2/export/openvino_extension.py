"""Builds the extension by which OpenVINO runs ONNX files of ``--sampling extension``.

::

    python -m ddetr_d2.export.openvino_extension libddetr_d2_openvino.so

It needs a C++ compiler, the package openvino, whose version the extension is then for, and the
sources of the compiled operator, which a clone has.
"""

import argparse
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..errors import UserError, exit_on_user_error
from .formats import require_package

SOURCE = Path(__file__).with_suffix(".cpp")
KERNELS = Path(__file__).parents[1] / "layers" / "csrc"
LIBRARIES = ("openvino", "openvino_onnx_frontend", "tbb")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")


def build(path: str) -> None:
    """Write the shared library ``path``.

    Raises:
        UserError: openvino or the sources are missing, or the compiler fails.
    """
    require_package("openvino", "the extension of OpenVINO")
    import openvino

    if not (SOURCE.exists() and KERNELS.exists()):
        raise UserError(
            f"the sources of the operator, {KERNELS}, are not here; use a clone of the repository."
        )
    installed = Path(openvino.__file__).parent
    # Headers alone: those of 16-bit numbers from PyTorch, which the library does not need.
    headers = [KERNELS, Path(torch.__file__).parent / "include", installed / "include"]
    include = [word for folder in headers for word in ("-isystem", str(folder))]
    libraries = [str(next((installed / "libs").glob(f"lib{name}.so*"))) for name in LIBRARIES]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [SOURCE, *sorted(KERNELS.glob("cpu/kernels_*.cpp"))]
        objects = [f"{folder}/{source.stem}.o" for source in sources]
        commands = [
            [*compiler, *FLAGS, *include, "-c", str(source), "-o", compiled]
            for source, compiled in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        _run([*compiler, "-shared", "-o", path, *objects, *libraries])


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no C++ compiler {command[0]!r}; install one.") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"{shlex.join(command)} failed:\n{error.stderr}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", metavar="FILE", help="shared library to write")
    args = parser.parse_args(arguments)
    build(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
