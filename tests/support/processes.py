"""Two processes on this machine by torchrun."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.pages import ROOT

ABORTED_AT_EXIT = "terminate called without an active exception"


def torchrun(*command: str, cwd: Path = ROOT) -> str:
    """What two processes of this command print; fails unless both end well.

    PyTorch's caches of DTensor keep a mesh, and so gloo's threads, beyond `destroy_process_group`; a process that has
    split its weights therefore sometimes aborts after its last line, when the interpreter is gone. It is run again.
    """
    whole = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        done = subprocess.run(whole, env=environment, cwd=cwd, capture_output=True, text=True, timeout=280)
        if ABORTED_AT_EXIT not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout
