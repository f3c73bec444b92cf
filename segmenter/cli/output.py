"""All that the commands print: `out` for results, `err` for the rest. What cannot be printed ends no command."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from segmenter.errors import printable


def out(*lines: object) -> None:
    """Prints each argument as one line on stdout; characters that would steer a terminal become escapes."""
    for line in lines:
        print(_in_line(line))


def err(*lines: object) -> None:
    """The same on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    for line in lines:
        tqdm.write(_in_line(line), file=sys.stderr)
    sys.stderr.flush()


def _in_line(text: object) -> str:
    return printable(text).replace("\n", "\\n")


class Lasting:
    """A stream that goes on without what it is of: what cannot be written is dropped.

    Attributes:
        failure: why, if so.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream  # None: it was closed when Python started
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        try:
            self._try(lambda stream: stream.write(text))
        except UnicodeEncodeError:  # the terminal's encoding has no such character
            encoding = self._stream.encoding
            self._try(lambda stream: stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def _try(self, act: Callable[[TextIO], Any]) -> None:
        if self.failure is not None:
            return
        try:
            if self._stream is None:
                raise OSError(errno.EBADF, "it is closed")
            act(self._stream)
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError) as error:  # a full disk, a pipe that nobody reads; closed
            self.failure = error
            with contextlib.suppress(OSError, ValueError, AttributeError):  # else Python tries once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting() -> Iterator[Lasting]:
    """Puts `Lasting` streams in place of stdout and stderr, for all that prints; gives that of stdout."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file would get its number, and what libraries print there
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Lasting(before[0]), Lasting(before[1])
    try:
        yield sys.stdout
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
