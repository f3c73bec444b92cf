"""A long measurement in steps: each a command in a process of its own, with a share of the time that is left.

A step that fails, hangs or runs out of time is noted and does not block the others. What came of each stands in the
results file, which is whole after every step, so that a later call goes on where this one ended.
"""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.machine import ROOT

DONE = "done"
OUT_OF_TIME = "stopped: out of time"
NOT_STARTED = "not started: out of time"
GRACE = 45.0  # seconds that a step may run over its share: the row that was being measured, and writing
LEAST = 10.0  # seconds below which no step is begun


@dataclasses.dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        command: arguments of this Python; a program of its own if it begins with a path.
        share: of what is left of the time. missing: why it cannot run here.
        limit: the option by which it is told its time: "--deadline" (Unix time), "--minutes" or "--compile-first"
            (seconds, half of it); "": it is ended. once: no later call begins it again once it was done.
        variables: of its environment.
    """

    name: str
    command: tuple[str, ...]
    share: float
    limit: str = "--deadline"
    once: bool = False
    missing: str = ""
    variables: tuple[tuple[str, str], ...] = ()


def run(step: Step, seconds: float, log: Path) -> dict[str, Any]:
    """Runs one step, its output in `log`. Returns its entry for the results file."""
    if step.missing:
        return {"name": step.name, "state": step.missing, "seconds": 0.0}
    if seconds < LEAST * step.share:
        return {"name": step.name, "state": NOT_STARTED, "seconds": 0.0}
    start = time.monotonic()
    told = {"--deadline": f"{time.time() + seconds:.0f}", "--minutes": f"{seconds / 60:.2f}"}
    told["--compile-first"] = f"{seconds / 2:.0f}"
    full = [*step.command, *([step.limit, told[step.limit]] if step.limit else [])]
    full = full if step.command[0].startswith("/") else [sys.executable, *full]
    print(f"{step.name}: up to {seconds:.0f} s, output in {log}", flush=True)
    with log.open("w") as file:
        options = {"stdout": file, "stderr": subprocess.STDOUT, "env": {**os.environ, **dict(step.variables)}}
        try:
            code = subprocess.run(full, cwd=ROOT, timeout=seconds + GRACE, **options).returncode
        except subprocess.TimeoutExpired:
            code = None
    state = {0: DONE, None: OUT_OF_TIME, 5: "nothing to do"}.get(code, f"failed with exit status {code}")
    return {"name": step.name, "state": state, "seconds": round(time.monotonic() - start, 1)}
