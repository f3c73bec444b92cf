"""Tests that need a CUDA device: `pytest -m gpu`, under five minutes on one card.

Most of a first run would be compiling, on one core. So before the first test, processes of their own run the same tests
side by side, by which the kernels come into Triton's cache; what becomes of them does not count, because tests disturb
each other there. `--compile-first 0` leaves that out.

REHEARSE_GPU_TESTS=1 runs them on the CPU at small sizes, with Triton's interpreter in place of the device, so that
their own code is known to work before a card is at hand. What only a card can show (graphs, streams, compiled code,
memory of the device) is skipped there.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REHEARSAL = os.environ.get("REHEARSE_GPU_TESTS") == "1"
HERE = Path(__file__).parent
COMPILING = 240.0  # seconds that compiling first may take
PROCESSES = min(16, os.cpu_count() or 1)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                if not REHEARSAL:
                    item.add_marker(pytest.mark.skip(reason="no CUDA device"))
                elif item.get_closest_marker("card"):
                    item.add_marker(pytest.mark.skip(reason="only a card can show it"))


def pytest_collection_finish(session):
    option = session.config.option
    processes = PROCESSES if option.compile_first is None else option.compile_first
    names = [item.nodeid for item in session.items if HERE in item.path.parents]
    elsewhere = hasattr(session.config, "workerinput") or option.collectonly  # xdist compiles side by side anyway
    if processes > 1 and names and torch.cuda.is_available() and not elsewhere:
        say = session.config.pluginmanager.get_plugin("terminalreporter").write_line
        say(f"compiling first: {len(names)} tests in up to {processes} processes ... ")
        say(compile_first(shares(names, processes), session.config.rootpath))


def shares(names: list[str], processes: int) -> list[list[str]]:
    """Names of tests, for each process some. All cases of a test function go to one: they need the same kernels."""
    by_function: dict[str, list[str]] = {}
    for name in names:
        by_function.setdefault(name.partition("[")[0], []).append(name)
    found: list[list[str]] = [[] for _ in range(processes)]
    for cases in sorted(by_function.values(), key=len, reverse=True):
        min(found, key=len).extend(cases)
    return [share for share in found if share]


def compile_first(groups: list[list[str]], root: Path, limit: float = COMPILING) -> str:
    """Runs groups of tests side by side, whatever becomes of them; what to tell of it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--compile-first", "0"]
    options = {"cwd": root, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    start = time.monotonic()
    running = [subprocess.Popen([*command, *group], **options) for group in groups]
    ended = 0
    try:
        for process in running:
            try:
                process.wait(max(0.0, start + limit - time.monotonic()))
                ended += 1
            except subprocess.TimeoutExpired:
                pass  # what it did not compile the tests themselves do
    finally:
        for process in running:
            process.kill()
            process.wait()
    return f"compiled for {time.monotonic() - start:.0f} s; {ended} of {len(running)} processes ended by themselves"


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
