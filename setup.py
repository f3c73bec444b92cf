"""The source archive gets the link segmenter/kernels too, which setuptools leaves out. All else: pyproject.toml."""

import os

from setuptools import setup
from setuptools.command.sdist import sdist


class WithLink(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        os.symlink(os.path.join(os.pardir, "kernels"), os.path.join(base_dir, "segmenter", "kernels"))


setup(cmdclass={"sdist": WithLink})
