"""A test that hangs fails, and those after it run: the settings of pyproject.toml, with seconds in place of minutes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = """
def test_waits():
    __import__("time").sleep(300)

def test_hangs_in_c():
    hash(__import__("functools").reduce(lambda t, _: (t, t), range(60), ()))

def test_after():
    pass
"""


@pytest.mark.more
def test_tests_that_hang_fail_and_the_others_run(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-n", "1", "-p", "no:cacheprovider"]
    limits = ["-o", "timeout=1", "-o", "faulthandler_timeout=2"]
    command = [sys.executable, "-m", "pytest", *options, *limits, "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 1 passed" in done.stdout
    assert "test_it.py:3: Failed" in done.stdout, "where the first one waited"
    assert "crashed while running 'test_it.py::test_hangs_in_c'" in done.stdout
    assert 'test_it.py", line 6 in test_hangs_in_c' in done.stderr
