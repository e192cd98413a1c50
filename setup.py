"""Builds the compiled operator. Everything else about the package stands in pyproject.toml.

Environment variables:
    DDETR_D2_NO_EXTENSION=1  build nothing; the operator's plain PyTorch form is used
    FORCE_CUDA=1             build the CUDA kernels although no GPU is found here
    CUDA_HOME                where the CUDA toolkit is
    TORCH_CUDA_ARCH_LIST     GPU architectures to build for, such as "8.0;9.0"
    MAX_JOBS                 compilers to run at once
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

CSRC = Path("ddetr_d2", "layers", "csrc")
# The stable ABI of torch 2.10: what is built against a newer one runs with all from this one on.
OLDEST_TORCH = "0x020a000000000000"
# Configurations lie at the top of a clone and within the package where it is installed.
PACKAGES = {
    "packages": [*find_packages(include=["ddetr_d2*"]), "ddetr_d2.configs"],
    "package_dir": {"ddetr_d2.configs": "configs"},
    # The sources are those of the libraries that export/ builds for other runtimes.
    "package_data": {
        "ddetr_d2": ["py.typed", "layers/csrc/**/*", "export/*.cpp", "export/*.h"],
        "ddetr_d2.configs": ["*.yaml"],
    },
}


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def say(message: str) -> None:
    print(f"ddetr_d2: {message}", file=sys.stderr)


def why_no_extension() -> str | None:
    if flag("DDETR_D2_NO_EXTENSION"):
        return "DDETR_D2_NO_EXTENSION is set"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler!r}"
    return None


def why_no_cuda() -> str | None:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if flag("FORCE_CUDA"):
        return None
    if not torch.cuda.is_available():
        return "no GPU is found (FORCE_CUDA=1 builds them nevertheless)"
    if CUDA_HOME is None:
        return "no CUDA toolkit is found (CUDA_HOME names it)"
    version = subprocess.run(
        [str(Path(CUDA_HOME, "bin", "nvcc")), "--version"], capture_output=True, text=True
    )
    release = re.search(r"release (\d+)", version.stdout)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = release[1] if release else "unknown"
        return f"the CUDA toolkit is of version {found}, but torch's is {torch.version.cuda}"
    return None


def correct_cuda_home() -> None:
    """Mend torch's guess, the folder above the nvcc on the PATH: that may be a mere wrapper."""
    nvcc, usual = shutil.which("nvcc"), Path("/usr/local/cuda")
    if nvcc is None or not usual.exists():
        return
    guess = Path(nvcc).parents[1]
    header = "include/cuda_runtime.h"
    if not (any(guess.glob(header)) or any(guess.glob(f"targets/*/{header}"))):
        os.environ.setdefault("CUDA_HOME", str(usual))


def strip_args() -> list[str]:
    """Linux Pythons compile extensions with -g: symbols make the library ten times as large."""
    debug = any(word.startswith("-g") for word in os.environ.get("CFLAGS", "").split())
    return ["-Wl,--strip-all"] if sys.platform == "linux" and not debug else []


def libraries() -> list:
    """One with the schemas and the CPU kernels, and one with the CUDA kernels where they can be."""
    correct_cuda_home()  # Before torch looks at it.
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension, CUDAExtension
    except ImportError:
        raise SystemExit(
            "ddetr_d2: torch is needed to build the operator. Install torch and torchvision first, "
            "then: pip install -e . --no-build-isolation"
        ) from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise SystemExit(f"ddetr_d2: torch 2.10 or newer is needed, found {torch.__version__}")

    def library(extension_class, name: str, sources: list[Path], compile_args: dict):
        return extension_class(
            f"ddetr_d2.layers.{name}",
            [str(source) for source in sorted(sources)],
            depends=[str(header) for header in sorted(CSRC.rglob("*.*h"))],
            define_macros=[("TORCH_TARGET_VERSION", OLDEST_TORCH)],
            extra_compile_args=compile_args,
            extra_link_args=strip_args(),
            py_limited_api=True,  # not linked to torch's library for one version of Python
        )

    compiler = ["-O3", "-fvisibility=hidden", "-Wno-psabi"]
    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
    found = [library(CppExtension, "ops_cpu", sources, {"cxx": compiler})]
    reason = why_no_cuda()
    if reason is None:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        compile_args = {"cxx": compiler, "nvcc": ["-O3", "-DUSE_CUDA"]}
        found.append(library(CUDAExtension, "ops_cuda", [*CSRC.glob("cuda/*.cu")], compile_args))
    say(
        "building CPU kernels" + (f", no CUDA kernels: {reason}" if reason else " and CUDA kernels")
    )
    return found


reason = why_no_extension()
if reason is not None:
    say(f"the operator is not compiled, its slower PyTorch form will be used: {reason}")
    setup(**PACKAGES)
else:
    # After libraries(), which says what to do where torch is missing.
    modules = libraries()
    from setuptools.command.bdist_wheel import bdist_wheel
    from torch.utils.cpp_extension import BuildExtension

    class Wheel(bdist_wheel):
        """For any Python: the libraries hold no Python modules."""

        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    setup(
        **PACKAGES,
        ext_modules=modules,
        # Names that PyTorch loads them by, without that of a Python in it.
        cmdclass={
            "build_ext": BuildExtension.with_options(no_python_abi_suffix=True),
            "bdist_wheel": Wheel,
        },
    )
