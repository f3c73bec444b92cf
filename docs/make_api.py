"""API pages from the docstrings, as HTML: python docs/make_api.py out/api (`make api`; needs the extra "docs").

Public names of `segmenter` are loaded when they are first used. Here they are loaded before, or pdoc would not see
them.
"""

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import segmenter

LEFT_OUT = ("segmenter.__main__", "segmenter.cli")  # `segmenter --help` has it


def main(output: str) -> None:
    """Writes the pages. A docstring that pdoc has to warn of is an error."""
    for name in segmenter.__all__:
        vars(segmenter)[name] = getattr(segmenter, name)
    modules = ["segmenter", "segmenter.kernels"]  # pdoc adds the modules of a package, unless it has an __all__
    for module in pkgutil.walk_packages(segmenter.__path__, "segmenter."):
        package = sys.modules[module.name.rpartition(".")[0]]
        if hasattr(package, "__all__") and not module.name.startswith(LEFT_OUT):
            modules.append(module.name)
    pdoc.render.configure(docformat="google", footer_text=f"segmenter {segmenter.__version__}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*modules, output_directory=Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:] or ["out/api"])
