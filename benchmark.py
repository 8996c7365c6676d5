"""Alias of `python -m samf.benchmarks` and of the module `samf.benchmarks.runner`, for one release."""

import importlib
import runpy
import sys

if __name__ == "__main__":
    runpy.run_module("samf.benchmarks", run_name="__main__", alter_sys=True)
else:
    sys.modules[__name__] = importlib.import_module("samf.benchmarks.runner")
