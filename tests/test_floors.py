"""No dependency is admitted in a version that is known to be unsafe, nor shut out where the package works without."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from segmenter import ops

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FLAWED = {  # the last version with the flaw
    "pillow": "10.2.0",  # CVE-2024-28219: a buffer overflow in the colour transforms
    "tqdm": "4.66.2",  # CVE-2024-34062: code in command-line options
    "onnx": "1.17.0",  # CVE-2024-7776, CVE-2025-51480: files written outside their folder
    "torch": "2.5.1",  # CVE-2025-32434: weights_only=True runs code
    "pyyaml": "5.3.1",  # CVE-2020-14343: full_load runs code
    "setuptools": "78.1.0",  # CVE-2025-47273: files written outside their folder
}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> list[Requirement]:
    """Of the package, its extras and its build."""
    content = project()
    extras = content["project"]["optional-dependencies"]
    texts = [
        *content["project"]["dependencies"],
        *itertools.chain(*extras.values()),
        *content["build-system"]["requires"],
    ]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("name", FLAWED)
def test_versions_with_known_flaws_are_not_admitted(name):
    found = [r for r in requirements() if r.name == name]
    assert found, "is no requirement any more"
    assert not any(r.specifier.contains(FLAWED[name]) for r in found)


def test_triton_is_asked_for_as_the_kernels_need_it_and_admitted_as_torch_pins_it():
    content = project()["project"]
    (triton,) = (r for r in map(Requirement, content["dependencies"]) if r.name == "triton")
    assert triton.specifier.contains("3.2.0"), "torch 2.6, the lowest we admit, could not be installed"
    (needed,) = (r for r in map(Requirement, content["optional-dependencies"]["gpu"]) if r.name == "triton")
    assert str(needed.specifier) == f">={'.'.join(map(str, ops.MIN_TRITON))}"
