"""Alias of `python -m samf.scripts.convert_published_checkpoint` and of that module, for one release."""

import importlib
import runpy
import sys

if __name__ == "__main__":
    runpy.run_module("samf.scripts.convert_published_checkpoint", run_name="__main__", alter_sys=True)
else:
    sys.modules[__name__] = importlib.import_module("samf.scripts.convert_published_checkpoint")
