"""`python -m segmenter`."""

import sys

try:
    from segmenter.cli import main
except KeyboardInterrupt:
    print("segmenter: error: interrupted", file=sys.stderr)
    sys.exit(130)

sys.exit(main())
