"""The processes that compile and measure: one that dies or hangs costs what it was at, and says so."""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any
from unittest import mock

import torch

from bench.compile import report
from bench.tuning import measure
from bench.tuning.buckets import Bucket

LIMIT = 120.0  # seconds for checking and timing one configuration


class OutOfTime(Exception):
    """The time is used up."""


@contextlib.contextmanager
def _interpreting(on: bool) -> Iterator[None]:
    """Processes started within it interpret kernels, or compile them, whatever this one does."""
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        if on:
            os.environ["TRITON_INTERPRET"] = "1"
        yield


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # CUDA, torch's threads and LLVM do not survive a fork
    return concurrent.futures.ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,))


class Compilers:
    """Compiles (bucket, configuration) pairs in `jobs` processes, in their order, and gives each when it is asked for.

    Args:
        deadline: `time.monotonic()` after which nothing is waited for.
    """

    def __init__(self, tasks: list[tuple[Bucket, Any]], jobs: int, deadline: float):
        self.tasks, self.jobs, self.deadline = tasks, jobs, deadline
        self.done: dict[tuple[Bucket, Any], report.Kernel] = {}
        self._start()

    def _start(self) -> None:
        others = multiprocessing.active_children()
        with _interpreting(False):
            self.pool = _pool(self.jobs)
            left = [task for task in self.tasks if task not in self.done]
            self.futures = {task: self.pool.submit(measure.compiled, *task) for task in left}
        self.processes = [child for child in multiprocessing.active_children() if child not in others]

    def __call__(self, bucket: Bucket, config: Any) -> report.Kernel:
        """As `measure.compiled`; a crash of the compiler is an error too. Raises OutOfTime."""
        task = bucket, config
        if task not in self.done:
            try:
                self.done[task] = self.futures[task].result(max(0.0, self.deadline - time.monotonic()))
            except TimeoutError:
                raise OutOfTime from None
            except BrokenProcessPool:  # a dead worker takes all that wait with it: find out whether it was this one
                died = "does not compile: the compiler's process died"
                self.done[task] = report.row_of(bucket.case, bucket.architecture, died)
                with contextlib.suppress(BrokenProcessPool), _interpreting(False), _pool(1) as alone:
                    self.done[task] = alone.submit(measure.compiled, *task).result()
                self._start()
        return self.done[task]

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        for process in self.processes:
            process.kill()
        self.pool.shutdown(cancel_futures=True)


class Device:
    """The one process that has the GPU, or the interpreter. It is started anew after an error."""

    def __init__(self, device: str, deadline: float):
        self.device, self.deadline = device, deadline
        self.pool: concurrent.futures.ProcessPoolExecutor | None = None
        self.pid: int | None = None

    def run(self, function: Callable, *arguments: Any) -> Any:
        """`function(*arguments)` in that process. Raises OutOfTime, RuntimeError if it died or hung, what it raises."""
        left = self.deadline - time.monotonic()
        try:
            if self.pool is None:
                with _interpreting(self.device == "cpu"):
                    self.pool = _pool(1)
                    self.pid = self.pool.submit(os.getpid).result()
            return self.pool.submit(function, *arguments).result(max(0.0, min(LIMIT, left)))
        except TimeoutError:
            self.close()
            if left < LIMIT:
                raise OutOfTime from None
            raise RuntimeError(f"did not end in {LIMIT:.0f} s") from None
        except BrokenProcessPool:
            self.close()
            raise RuntimeError("its process died") from None
        except Exception:  # after an error of CUDA nothing else would run
            self.close()
            raise

    def __call__(self, bucket: Bucket, config: Any) -> dict[str, Any]:
        """`measure.measured`, without a GPU of tiny inputs; what is raised there is its "error"."""
        bucket = dataclasses.replace(bucket, tiny=self.device == "cpu")
        try:
            return self.run(measure.measured, bucket, config, self.device)
        except OutOfTime:
            raise
        except Exception as error:
            return {"error": f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:300]}"}

    def close(self) -> None:
        """Ends the process, whatever it is at."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        if self.pool is not None:
            self.pool.shutdown()
        self.pool = self.pid = None
