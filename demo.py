"""Alias of `python -m samf.experiments.demo` and of the module `samf.experiments.demo`, for one release."""

import importlib
import runpy
import sys

if __name__ == "__main__":
    runpy.run_module("samf.experiments.demo", run_name="__main__", alter_sys=True)
else:
    sys.modules[__name__] = importlib.import_module("samf.experiments.demo")
