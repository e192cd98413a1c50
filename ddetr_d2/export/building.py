"""Compiling libraries by which runtimes run the operator of ``--sampling extension``."""

import argparse
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..errors import UserError

KERNELS = Path(__file__).parents[1] / "layers" / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")


def build_library(
    path: str, source: Path, headers: Sequence[Path] = (), libraries: Sequence[Path] = ()
) -> None:
    """Compile a source and the kernels of the operator into a shared library.

    The environment variables CXX and CXXFLAGS name another compiler and further options.

    Args:
        path: the library to write.
        source: a C++ file in this folder.
        headers: folders of further headers.
        libraries: shared libraries to link with.

    Raises:
        UserError: the sources or the compiler are missing, or the compiler fails.
    """
    if not (source.exists() and KERNELS.exists()):
        raise UserError(
            f"the sources of the operator, {KERNELS}, are not here; use a clone of the repository."
        )
    # Headers alone: those of 16-bit numbers from PyTorch, which the library does not need.
    folders = [KERNELS, Path(torch.__file__).parent / "include", *headers]
    include = [word for folder in folders for word in ("-isystem", str(folder))]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [source, *sorted(KERNELS.glob("cpu/kernels_*.cpp"))]
        objects = [f"{folder}/{file.stem}.o" for file in sources]
        commands = [
            [*compiler, *flags, *include, "-c", str(file), "-o", compiled]
            for file, compiled in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        _run([*compiler, "-shared", "-o", path, *objects, *map(str, libraries)])


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no C++ compiler {command[0]!r}; install one.") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"{shlex.join(command)} failed:\n{error.stderr}") from error


def run_build(
    build: Callable[[str], None], description: str, arguments: Sequence[str] | None = None
) -> None:
    """The program that calls ``build`` with the path from the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", metavar="FILE", help="shared library to write")
    args = parser.parse_args(arguments)
    build(args.output)
    print(f"wrote {args.output}")
