"""`python -m samf.benchmarks`: measure speed and memory."""

import sys

from samf.benchmarks.runner import main

if __name__ == "__main__":
    sys.exit(main())
