"""Builds the library by which onnxruntime runs ONNX files of ``--sampling extension``.

::

    python -m ddetr_d2.export.onnxruntime_extension libddetr_d2_onnxruntime.so

It needs a C++ compiler; the sources of the operator come with the package. The library works with
onnxruntime 1.17 and all later versions.
"""

from pathlib import Path

from ..errors import exit_on_user_error
from .building import build_library, run_build

SOURCE = Path(__file__).with_suffix(".cpp")


def build(path: str) -> None:
    """Write the shared library ``path``.

    Raises:
        UserError: the sources or the compiler are missing, or the compiler fails.
    """
    build_library(path, SOURCE)


if __name__ == "__main__":
    with exit_on_user_error():
        run_build(build, __doc__)
