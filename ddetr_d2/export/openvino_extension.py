"""Builds the extension by which OpenVINO runs ONNX files of ``--sampling extension``.

::

    python -m ddetr_d2.export.openvino_extension libddetr_d2_openvino.so

It needs a C++ compiler and the package openvino, whose version the extension is then for; the
sources of the operator come with the package.
"""

from pathlib import Path

from ..errors import exit_on_user_error
from .building import build_library, run_build
from .formats import require_package

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARIES = ("openvino", "openvino_onnx_frontend", "tbb")


def build(path: str) -> None:
    """Write the shared library ``path``.

    Raises:
        UserError: openvino, the sources or the compiler are missing, or the compiler fails.
    """
    require_package("openvino", "the extension of OpenVINO")
    import openvino

    installed = Path(openvino.__file__).parent
    libraries = [next((installed / "libs").glob(f"lib{name}.so*")) for name in LIBRARIES]
    build_library(path, SOURCE, [installed / "include"], libraries)


if __name__ == "__main__":
    with exit_on_user_error():
        run_build(build, __doc__)
