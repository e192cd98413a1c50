"""The CUDA kernels compile, also where there is no GPU to run them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

CUDA = Path(__file__).parents[2] / "ddetr_d2" / "layers" / "csrc" / "cuda"


def find_nvcc() -> str | None:
    if cpp_extension.CUDA_HOME is not None:
        nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
        if nvcc.exists():
            return str(nvcc)
    return shutil.which("nvcc")


@pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_kernels_compile_for_sm_80_and_sm_90(tmp_path):
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", version)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        pytest.skip(f"nvcc is not of torch's CUDA version, {torch.version.cuda}")
    sources = sorted(CUDA.glob("*.cu"))
    assert sources
    for source in sources:
        done = subprocess.run(
            [
                nvcc,
                "-c",
                str(source),
                "-o",
                str(tmp_path / f"{source.stem}.o"),
                "-std=c++17",
                "-DUSE_CUDA",
                "-DTORCH_TARGET_VERSION=0x020a000000000000",
                "-O1",  # Half the time; what is tested is that it compiles.
                "-gencode=arch=compute_80,code=sm_80",
                "-gencode=arch=compute_90,code=sm_90",
                "--threads=2",
                "-Xcompiler=-fPIC",
                *(f"-isystem={path}" for path in cpp_extension.include_paths("cpu")),
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        warnings = [line for line in done.stderr.splitlines() if str(CUDA.parent) in line]
        assert not warnings, "\n".join(warnings)
