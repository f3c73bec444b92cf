"""Compiling before the tests of a card: each test is taken once, and what fails, hangs or dies there blocks nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.more
ROOT = Path(__file__).parents[1]
CONFTEST = "from tests.gpu.compile_first import *  # the hooks\n"
OVER_WHEN_IT_HANGS = """
import time
from pathlib import Path
from types import SimpleNamespace
from tests.gpu import compile_first

def monotonic():  # however slow the machine is
    first = Path(__file__).parent / "first"
    return 60.0 if first.exists() and len(first.read_text().splitlines()) == 4 else 0.0

compile_first.time = SimpleNamespace(monotonic=monotonic, sleep=time.sleep)
"""
TESTS = """
import os, signal, sys, time
from pathlib import Path
import pytest

HERE = Path(__file__).parent
CHILD = any("--compile-share" in word for word in sys.argv)

@pytest.mark.parametrize("i", range(12))
def test_(i):
    with (HERE / ("first" if CHILD else "judged")).open("a") as file:
        file.write(f"{i} {os.getpid()}\\n")
    time.sleep(0.3 if CHILD else 0)
    if CHILD and i == FAILS:
        raise AssertionError
    if CHILD and i == DIES:
        os._exit(3)
    if CHILD and i == HANGS:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGTERM})
        time.sleep(1000)
"""


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def run(tmp_path):
    def run(*options, fails=-1, dies=-1, hangs=-1):
        (tmp_path / "conftest.py").write_text(CONFTEST + (OVER_WHEN_IT_HANGS if hangs == 3 else ""))
        constants = f"FAILS, DIES, HANGS = {fails}, {dies}, {hangs}\n"
        (tmp_path / "test_some.py").write_text(constants + TESTS)
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "pytest", str(tmp_path), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr  # whatever happened first, the judged run is green
        assert sorted(int(line[0]) for line in lines(tmp_path / "judged")) == [*range(12)]
        return lines(tmp_path / "first"), done.stdout

    return run


def test_each_test_is_taken_once_by_processes_of_their_own(run):
    first, output = run("--compile-first", "600", "--compile-processes", "2", fails=5)
    assert sorted(int(line[0]) for line in first) == [*range(12)]
    assert len({line[1] for line in first}) == 2
    assert "kernels compiled: 0 first, by 2 processes [0, 0]" in output and "0 more by the tests themselves" in output
    assert "not reached" not in output


def test_a_process_that_dies_leaves_its_tests_to_the_other(run):
    first, _ = run("--compile-first", "600", "--compile-processes", "2", dies=0)
    assert sorted(int(line[0]) for line in first) == [*range(12)]


def test_one_that_hangs_is_ended_at_the_limit(run, tmp_path):
    first, output = run("--compile-first", "60", "--compile-processes", "1", hangs=3)
    assert [int(line[0]) for line in first] == [0, 1, 2, 3]
    assert "8 of 12 tests not reached" in output
    with pytest.raises(ProcessLookupError):
        os.kill(int(first[0][1]), 0)


@pytest.mark.parametrize("options", [("--compile-first", "0"), ()])
def test_it_can_be_turned_off_and_is_off_without_a_card(options, run):
    first, output = run(*options)
    assert not first and "compiled" not in output
