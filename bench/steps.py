"""Steps of a long run, each a process with a time limit and a log: of bench.run_all and bench.first_hour."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT

OUT_OF_TIME = "stopped: out of time"
NOT_STARTED = "not started: out of time"
GRACE = 45.0  # seconds that a step may run over its share: the row that was being measured, and writing
LEAST = 10.0  # seconds: with less a step is not started
MINUTES, DEADLINE = "@minutes", "@deadline"  # in a command: its time, and the Unix time at which it ends
HALF = "@half"  # of its time, in seconds


def module(*command: str) -> list[str]:
    """The command that runs a module."""
    return [sys.executable, "-m", *command]


def run(
    name: str, command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs one step, its output in `log`. Returns its entry for the results file.

    Args:
        command: MINUTES, DEADLINE and HALF in it are replaced, so that a step ends by itself: it finishes the row it is
            at and says what is missing.
        environment: joins that of this process.
    """
    if seconds < LEAST:
        return {"name": name, "state": NOT_STARTED, "seconds": 0.0}
    start = time.monotonic()
    limits = {MINUTES: f"{seconds / 60:.2f}", DEADLINE: f"{time.time() + seconds:.0f}", HALF: f"{seconds / 2:.0f}"}
    full = [limits.get(part, part) for part in command]
    print(f"{name}: up to {seconds:.0f} s, output in {log}", flush=True)
    where = {"cwd": ROOT, "env": {**os.environ, **(environment or {})}}
    with log.open("w") as file:
        try:
            done = subprocess.run(full, stdout=file, stderr=subprocess.STDOUT, timeout=seconds + GRACE, **where)
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = None
    state = {0: "done", None: OUT_OF_TIME, 5: "nothing to do"}.get(code, f"failed with exit status {code}")
    return {"name": name, "state": state, "seconds": round(time.monotonic() - start, 1)}
