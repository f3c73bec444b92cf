"""Every shipped kernel configuration, compiled without a GPU: python -m bench.compile_report; see bench/compile."""

import sys

from bench.compile.report import main

if __name__ == "__main__":
    sys.exit(main())
