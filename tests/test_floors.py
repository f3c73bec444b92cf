"""No dependency is admitted in a version that is known to be unsafe."""

import ast
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FLAWED = {  # the last version with the flaw
    "pillow": "10.2.0",  # CVE-2024-28219: a buffer overflow in the colour transforms
    "tqdm": "4.66.2",  # CVE-2024-34062: code in command-line options
    "onnx": "1.17.0",  # CVE-2024-7776, CVE-2025-51480: files written outside their folder
    "torch": "2.5.1",  # CVE-2025-32434: weights_only=True runs code
    "pyyaml": "5.3.1",  # CVE-2020-14343: full_load runs code
    "setuptools": "78.1.0",  # CVE-2025-47273: files written outside their folder
}


def requirements() -> list[Requirement]:
    """Of setup.py, the extras too, and of the build."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    values = {
        k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in ("install_requires", "extras_require")
    }
    build = ast.literal_eval((ROOT / "pyproject.toml").read_text().split("requires = ")[1].split("\n")[0])
    texts = [*values["install_requires"], *(t for extra in values["extras_require"].values() for t in extra), *build]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("name", FLAWED)
def test_versions_with_known_flaws_are_not_admitted(name):
    found = [r for r in requirements() if r.name == name]
    assert found, "is no requirement any more"
    assert not any(r.specifier.contains(FLAWED[name]) for r in found)
