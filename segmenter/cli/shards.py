"""`predict` and `eval` by several processes, as torchrun starts them: whose is which image, and one report of all.

The processes never wait for each other and open no connection. Each takes every n-th of the planned images and writes
into the same output folder; the one that finishes last puts the reports together. When one is lost, torchrun ends the
others, and with --max-restarts starts all again: what is done is then skipped, as with --resume.

That is why they report by files, and not by sums over connections as training does (`segmenter.training.distributed`),
whose processes wait for each other at every step anyway: what a lost process has done counts, whatever number of
processes goes on, and one with few images left keeps nobody waiting.
"""

import contextlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segmenter.cli.errors import DEVICE, OK, SOME_FAILED, CommandError
from segmenter.cli.loading import choose_device
from segmenter.cli.output import err
from segmenter.cli.report import Tally, say, write_json
from segmenter.errors import InputError
from segmenter.files import locked, writing_into
from segmenter.text_files import read_json

DIRECTORY = ".segmenter-report"  # below the output; no result can be called so, because hidden folders are no input
_MAX_REPORT = 1_000_000_000  # bytes: all images of a process may have failed
_RUN = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Shard:
    """Which of how many processes this one is.

    Attributes:
        rank, world: this one and how many. local_rank: this one among those of this machine.
        restarts: how often torchrun has started all of them again. run: what tells this start from others.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    restarts: int = 0
    run: str = ""

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str] = os.environ) -> "Shard":
        """As told by torchrun, or by another launcher that sets RANK and WORLD_SIZE; else one process of one.

        Raises:
            CommandError: variables that make no sense.
        """
        if "RANK" not in environment or environment.get("WORLD_SIZE", "1") == "1":
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
        try:
            rank, world, local_rank, restarts = (int(environment.get(name, "0")) for name in names)
        except ValueError:
            rank, world, local_rank, restarts = -1, -1, -1, -1
        if not 0 <= rank < world or local_rank < 0 or restarts < 0:
            found = " ".join(f"{name}={environment.get(name)}" for name in names)
            raise CommandError(f"the environment tells of several processes, but makes no sense: {found}")
        return cls(rank, world, local_rank, restarts, " ".join(environment.get(name, "-") for name in _RUN))

    def device(self, asked: str) -> torch.device:
        """Of several processes, each gets a GPU of its own for "auto" and "cuda"."""
        if self.world > 1 and torch.cuda.is_available() and asked in ("auto", "cuda"):
            count = torch.cuda.device_count()
            if self.local_rank >= count:
                raise CommandError(
                    f"process {self.local_rank} of this machine has no GPU of its own, there are {count}; start fewer "
                    "(--nproc-per-node), or say --device cuda:0 if each process sees only its own, or --device cpu",
                    DEVICE,
                )
            asked = f"cuda:{self.local_rank}"
        device = choose_device(asked)
        if self.world > 1 and device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    @contextlib.contextmanager
    def writing_into(self, output: Path) -> Iterator[None]:
        """Makes the output folder, and keeps all but the other processes of this run from writing into it.

        Raises:
            OSError: it cannot be made, or another run is writing into it.
        """
        with writing_into(output, shared=self.world > 1), contextlib.ExitStack() as stack:
            if self.world > 1:  # another run of several has a process of this rank too
                lock = output / DIRECTORY / f"lock-{self.rank}"
                lock.parent.mkdir(exist_ok=True)
                lock.touch()
                stack.enter_context(locked(lock))
            else:
                shutil.rmtree(output / DIRECTORY, ignore_errors=True)  # what a lost run left
            yield

    def part(self, jobs: Sequence[Any]) -> list[tuple[int, Any]]:
        """This process's jobs, each with its place among all."""
        return list(enumerate(jobs))[self.rank :: self.world]


def run_part(
    shard: Shard,
    output: str,
    jobs: Sequence[Any],
    settings: Any,
    tally: Tally,
    do: Callable[[], None],
    report: Callable[[Tally, float], None],
) -> int:
    """Does this process's part of the jobs and gives its exit status; what stops it early is told of.

    Args:
        output: folder. jobs, settings: what all processes must agree on, as JSON. tally: what `do` counts in.
        do: does the part. report: called by the process that finishes last, with the tally of all and the seconds.
    """
    shared = SharedReport(shard, Path(output), [jobs, settings]) if shard.world > 1 else None
    if shared is not None and shard.rank == 0:
        err(f"segmenter: {shard.world} processes share {len(jobs)} images")
    began, finished = time.perf_counter(), False
    try:
        do()
        finished = True
    finally:
        seconds = time.perf_counter() - began
        if not finished:  # Ctrl-C, a bad sample, a full disk: say what there is
            who = "" if shared is None else f"process {shard.rank} of {shard.world} "
            say(tally, len(shard.part(jobs)), seconds, output, f"{who}stopped early, --resume goes on: ")
    merged = (tally, seconds) if shared is None else shared.finish(tally, seconds)
    if merged is not None:
        report(*merged)
        if shared is not None:
            shared.remove()
    # to torchrun any other status is a lost process, for which it ends the others
    return SOME_FAILED if tally.failed and shared is None else OK


class SharedReport:
    """One report of all processes, made from one file of each in the output folder.

    Args:
        work: whatever all processes must agree on, as JSON: the planned images and the settings.
    """

    def __init__(self, shard: Shard, output: Path, work: Any):
        self.shard = shard
        self.directory = output / DIRECTORY
        self._facts = {"run": shard.run, "work": f"{zlib.crc32(json.dumps(work).encode()):08x}", "id": uuid.uuid4().hex}
        self.directory.mkdir(parents=True, exist_ok=True)
        # over what a lost run left. Should another process of this run finish before this line, and an earlier run of
        # the same name have left "finished" here, then it reports too early, and the last one reports once more.
        self._write({"finished": False})

    def finish(self, tally: Tally, seconds: float) -> tuple[Tally, float] | None:
        """Hands in this process's part. For exactly one process, the last: all parts, and the longest time."""
        self._write({"finished": True, "seconds": seconds, **vars(tally)})
        reports = [self._read(rank) for rank in range(self.shard.world)]
        if not all(report.get("finished") and report["run"] == self.shard.run for report in reports):
            return None
        if any(report["work"] != self._facts["work"] for report in reports):
            text = "the processes tell of different images or options, so no summary is made; run again with --resume"
            err(f"segmenter: warning: {text}")
            return None
        if not self._claim(reports):
            return None
        merged = Tally(sum(r["done"] for r in reports), sum(r["skipped"] for r in reports))
        merged.failed = {int(place): entry for r in reports for place, entry in r["failed"].items()}
        return merged, max(r["seconds"] for r in reports)

    def remove(self) -> None:
        """Deletes the files of the processes: first the parts, so that nobody claims them once more."""
        parts = map(self._path, range(self.shard.world))
        for path in [*parts, *self.directory.glob("claim-*"), *self.directory.glob("lock-*")]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another run may have put something in
            self.directory.rmdir()

    def _claim(self, reports: Sequence[dict[str, Any]]) -> bool:
        """Whether this process is the one to report: several may have seen that all have finished."""
        claim = self.directory / f"claim-{zlib.crc32(''.join(r['id'] for r in reports).encode()):08x}"
        try:
            claim.touch(exist_ok=False)
        except (FileExistsError, FileNotFoundError):  # not found: the folder, after remove()
            return False
        if self._read(self.shard.rank).get("id") == self._facts["id"]:
            return True
        claim.unlink(missing_ok=True)  # reported and removed in the meantime
        return False

    def _path(self, rank: int) -> Path:
        return self.directory / f"rank-{rank}.json"

    def _write(self, state: dict[str, Any]) -> None:
        write_json(self._path(self.shard.rank), self._facts | state)

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            report = read_json(self._path(rank), InputError, _MAX_REPORT)
        except InputError:
            return {}
        return report if isinstance(report, dict) and self._facts.keys() <= report.keys() else {}
