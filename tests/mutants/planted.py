"""The planted bugs: one text edit each, in a file of the project, and the tests that should find it.

All groups (constants that are lists) of the files `planted_*.py` beside this one.
"""

import importlib
from pathlib import Path

from tests.mutants.mutant import Mutant

_MODULES = [f"tests.mutants.{path.stem}" for path in sorted(Path(__file__).parent.glob("planted_*.py"))]
_GROUPS = [
    group
    for module in map(importlib.import_module, _MODULES)
    for name, group in vars(module).items()
    if name.isupper() and isinstance(group, list) and not name.startswith("_")
]
MUTANTS = list(dict.fromkeys(mutant for group in _GROUPS for mutant in group))

__all__ = ["MUTANTS", "Mutant"]
