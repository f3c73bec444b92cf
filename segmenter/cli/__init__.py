"""The command line: `python -m segmenter`, or `segmenter` once installed.

Exit status: 0 fine, 1 anything unexpected, 2 usage, 3 some files failed, 4 checkpoint, 5 device, 130 interrupted,
143 training was stopped and has saved.
"""

import contextlib
import importlib
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence

from segmenter.cli import errors
from segmenter.cli.arguments import build_parser
from segmenter.cli.output import err, lasting
from segmenter.errors import InputError, cause


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; errors are one line on stderr.

    Work is done and written whether or not it can be told of. If stdout cannot be written, 0 becomes 1.
    """
    with lasting() as stdout:
        status = _run(argv)
        stdout.flush()
        if stdout.failure is None:
            return status
        if not isinstance(stdout.failure, BrokenPipeError):  # who reads no further wants to know no more
            err(f"segmenter: error: standard output cannot be written: {cause(stdout.failure)}")
        return status or errors.FAILURE


def _run(argv: Sequence[str] | None) -> int:
    debug = False
    try:
        args = build_parser().parse_args(argv)
        debug = args.debug
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _one_line_warning
            with _ends_at_ctrl_c():  # imported here, so that --help needs no torch
                command = importlib.import_module(f"segmenter.cli.commands.{args.command}")
            return command.run(args)
    except SystemExit as stop:  # --help, --version, or a usage error that argparse has reported
        return int(stop.code or 0)
    except KeyboardInterrupt:
        exec("")  # else CPython, if an `exec` was interrupted, dies of the signal in the end, whatever its status
        return _fail("interrupted", errors.INTERRUPTED, debug=False)
    except errors.CommandError as error:
        return _fail(str(error), error.status, debug)
    except InputError as error:
        return _fail(str(error), errors.FAILURE, debug)
    except OSError as error:  # a folder that cannot be written, a full disk ...
        return _fail(f"{error.filename or 'output'}: {cause(error)}", errors.FAILURE, debug)
    except Exception as error:
        hint = "" if debug else " (--debug shows where)"
        return _fail(f"{type(error).__name__}: {error}{hint}", errors.FAILURE, debug)


@contextlib.contextmanager
def _ends_at_ctrl_c() -> Iterator[None]:
    """For imports: Ctrl-C ends the process at once; as an exception, it is lost or aborts in half-loaded libraries."""

    def end(number: int, frame: object) -> None:
        with contextlib.suppress(OSError):
            os.write(2, b"segmenter: error: interrupted\n")
        os._exit(errors.INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        err(*traceback.format_exc().splitlines())
    err(f"segmenter: error: {' '.join(message.split())}")
    return status


def _one_line_warning(message: Warning | str, *_: object, **__: object) -> None:
    err(f"segmenter: warning: {' '.join(str(message).split())}")
