"""Packs the alias module together with the .pth file that activates it."""

import os

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPth(build_py):
    """Puts the .pth file beside the module, that is into site-packages; setuptools cannot."""

    pth = "detectron2_alias.pth"

    def run(self):
        super().run()
        self.copy_file(self.pth, os.path.join(self.build_lib, self.pth))

    def get_outputs(self, include_bytecode=1):
        return [*super().get_outputs(include_bytecode), os.path.join(self.build_lib, self.pth)]


setup(cmdclass={"build_py": BuildWithPth})
