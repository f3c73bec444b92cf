"""Threads that work ahead of the model: they read the images that come next, and count what became of those before.

Calls begin in the order they are put. While the arrays that they gave hold more than MAX_BYTES, only the call that is
waited for begins.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

MAX_BYTES = 1 << 30  # of arrays that wait to be used; no further call begins above it
_CLOSING_SECONDS = 1.0

T = TypeVar("T")


@dataclass(eq=False)
class Call:
    """`function(source)`, made by a thread. Once `done`, it has an `error`, or gave `value`.

    Attributes:
        nbytes: what the arrays in `value` count for, until the call is released.
    """

    function: Callable[[Any], Any]
    source: Any
    value: Any = None
    error: BaseException | None = None
    done: bool = False
    nbytes: int = 0


C = TypeVar("C", bound=Call)


class ReadAhead:
    """At most `workers` threads, which make calls for one other thread. Close it to end them."""

    def __init__(self, workers: int):
        self.max_bytes = MAX_BYTES
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._waiting: deque[Call] = deque()
        self._wanted: Call | None = None
        self._held = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def full(self) -> bool:
        return self._held > self.max_bytes

    def put(self, call: C) -> C:
        """Has a call made by a thread, and returns it."""
        with self._changed:
            self._waiting.append(call)
            self._changed.notify_all()
        if len(self._threads) < self._workers:
            # daemons: a stream that nobody closes, or a file system that hangs, must not keep Python from ending
            self._threads.append(threading.Thread(target=self._work, name="segmenter-reader", daemon=True))
            self._threads[-1].start()
        return call

    def run(self, call: Call) -> None:
        """Makes a call in this thread."""
        try:
            call.value = call.function(call.source)
        except BaseException as error:  # whatever it is: somebody waits for this call
            call.error = error
        with self._changed:
            call.nbytes = _nbytes(call.value)
            self._held += call.nbytes
            call.done = True
            self._changed.notify_all()

    def wait(self, call: Call) -> None:
        """Returns once the call is made."""
        with self._changed:
            self._wanted = call  # so it is the next one to be made, however much is held
            self._changed.notify_all()
            while not call.done:
                self._changed.wait()

    def release(self, call: Call) -> None:
        """What it gave counts no longer."""
        with self._changed:
            self._held -= call.nbytes
            self._changed.notify_all()

    def result(self, call: Call) -> Any:
        """Waits for a call and releases it; gives its value, or raises its error."""
        self.wait(call)
        self.release(call)
        if call.error is not None:
            raise call.error
        return call.value

    def close(self) -> None:
        """Ends the threads. One that is reading is given a second; it ends by itself after that."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_CLOSING_SECONDS / len(self._threads))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (call := self._next()) is None:
                    self._changed.wait()
                if self._closed:
                    return
                self._waiting.remove(call)
            self.run(call)
            del call  # while it waits, the thread keeps no image alive

    def _next(self) -> Call | None:
        """The call to begin now, if any."""
        if self._wanted in self._waiting:
            return self._wanted
        return self._waiting[0] if self._waiting and not self.full else None


def usual_workers() -> int:
    """Threads, unless said otherwise: one a processor, at most 4."""
    return min(4, os.cpu_count() or 1)


def behind(items: Iterable[T], n: int) -> Iterator[T]:
    """The items in their order, each given out once `n` after it have been taken. What taking one raises comes after
    the items before it."""
    waiting: deque[T] = deque()
    failure = None
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > n:
                yield waiting.popleft()
    except Exception as error:
        failure = error
    while waiting:
        yield waiting.popleft()
    if failure is not None:
        raise failure


def _nbytes(value: Any) -> int:
    return sum(map(_nbytes, value)) if isinstance(value, tuple) else getattr(value, "nbytes", 0)
