"""`python -m segmenter`."""

import signal
import sys

try:
    from segmenter.cli import main
except KeyboardInterrupt:
    print("segmenter: error: interrupted", file=sys.stderr)
    sys.exit(130)

status = main()
signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is written; while Python ends, Ctrl-C would only hide the status
sys.exit(status)
