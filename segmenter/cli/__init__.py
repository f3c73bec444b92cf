"""The command line: `python -m segmenter`, or `segmenter` once installed.

Exit status: 0 fine, 1 anything unexpected, 2 usage, 3 some files failed, 4 checkpoint, 5 device, 130 interrupted,
143 training was stopped and has saved.
"""

import importlib
import sys
import traceback
import warnings
from collections.abc import Sequence

from segmenter.cli import errors
from segmenter.cli.arguments import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; errors are one line on stderr."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version, or a usage error that argparse has reported
        return int(stop.code or 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _one_line_warning
            command = importlib.import_module(f"segmenter.cli.{args.command}")  # here, so that --help needs no torch
            return command.run(args)
    except KeyboardInterrupt:
        return _fail("interrupted", errors.INTERRUPTED, debug=False)
    except errors.CommandError as error:
        return _fail(str(error), error.status, args.debug)
    except OSError as error:  # a folder that cannot be written, a full disk ...
        return _fail(f"{error.filename or 'output'}: {error.strerror or error}", errors.FAILURE, args.debug)
    except Exception as error:
        hint = "" if args.debug else " (--debug shows where)"
        return _fail(f"{type(error).__name__}: {error}{hint}", errors.FAILURE, args.debug)


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"segmenter: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _one_line_warning(message: Warning | str, *_: object, **__: object) -> None:
    from tqdm import tqdm

    tqdm.write(f"segmenter: warning: {' '.join(str(message).split())}", file=sys.stderr)  # keeps a progress bar whole
