"""Tests that need a CUDA device: `pytest -m gpu`, under five minutes on one card.

REHEARSE_GPU_TESTS=1 runs them on the CPU at small sizes, with Triton's interpreter in place of the device, so that
their own code is known to work before a card is at hand. What only a card can show (graphs, streams) is skipped there.
"""

import os
from pathlib import Path

import pytest
import torch

from tests.gpu.compile_first import pytest_runtestloop, pytest_terminal_summary  # noqa: F401

REHEARSAL = os.environ.get("REHEARSE_GPU_TESTS") == "1"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                if not REHEARSAL:
                    item.add_marker(pytest.mark.skip(reason="no CUDA device"))
                elif item.get_closest_marker("card"):
                    item.add_marker(pytest.mark.skip(reason="only a card can show it"))


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def full_precision():
    """float32 products in float32, and back to what it was."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def size(full, rehearsal):
    """A problem size: the full one on a card."""
    return full if torch.cuda.is_available() else rehearsal
