"""Training runs that are killed, stopped, or share a batch: `python -m tests.support.dying_runs FOLDER` makes them all.

Each is one or more processes of its own, forked from one that has imported everything, which is what takes long.
Expects FOLDER/NAME.yml, makes FOLDER/NAME for each, and statuses.json: how each process ended (negative: the signal).
"""

import io
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision.transforms.v2.functional  # noqa: F401  (what the children would import otherwise)

from segmenter.cli import main
from segmenter.training import checkpoint as state
from segmenter.training.loop import Run


def killed_after_save(rank: int) -> None:
    """SIGKILL just after the save of step 3, the end of the first epoch."""
    save = state.save_state

    def save_state(path, content):
        save(path, content)
        if content["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    state.save_state = save_state


def killed_while_saving(rank: int) -> None:
    """SIGKILL when half of the checkpoint of step 5 is written; that of step 4 is whole."""
    save = torch.save

    def half(content, file):
        if content["step"] == 5:
            buffer = io.BytesIO()
            save(content, buffer)
            file.write(buffer.getvalue()[: buffer.tell() // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, file)

    torch.save = half


def terminated(rank: int) -> None:
    """SIGTERM in the second step to the whole process group, those that read samples included, as torchrun does it."""
    _at_step(1, lambda: os.killpg(0, signal.SIGTERM))


def terminated_of_two(rank: int) -> None:
    """SIGTERM in the first step, and only to the process that writes no files."""
    if rank == 1:
        _at_step(0, lambda: os.kill(os.getpid(), signal.SIGTERM))


def undisturbed(rank: int) -> None:
    pass


def _at_step(step: int, act: Callable[[], None]) -> None:
    training_step = Run.training_step

    def interrupted(self, *args, **kwargs):
        if self.step == step:
            act()
        return training_step(self, *args, **kwargs)

    Run.training_step = interrupted


RUNS = {  # name -> what happens in it, and processes
    "killed": (killed_after_save, 1),
    "half": (killed_while_saving, 1),
    "terminated": (terminated, 1),
    "pair": (undisturbed, 2),
    "pair_terminated": (terminated_of_two, 2),
    "pair_bad": (undisturbed, 2),
}


def start(folder: Path, name: str, disturb: Callable[[int], None], rank: int, world: int, port: int) -> int:
    """The process id of one process of a run."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        if world > 1:  # as torchrun says it
            found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in found.items()}})
        disturb(rank)
        status = main(["train", "--recipe", f"{folder / name}.yml", "-o", str(folder / name), "--device", "cpu"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def run_all(folder: Path) -> dict[str, list[int]]:
    statuses = {}
    for name, (disturb, world) in RUNS.items():
        port = free_port()
        pids = [start(folder, name, disturb, rank, world, port) for rank in range(world)]
        statuses[name] = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return statuses


if __name__ == "__main__":
    torch.set_num_threads(1)
    (Path(sys.argv[1]) / "statuses.json").write_text(json.dumps(run_all(Path(sys.argv[1]))))
