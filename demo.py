"""Alias of `python -m samf.experiments.demo`, for one release."""

import runpy

if __name__ == "__main__":
    runpy.run_module("samf.experiments.demo", run_name="__main__", alter_sys=True)
