"""Alias of `python -m samf.benchmarks`, for one release."""

import runpy

if __name__ == "__main__":
    runpy.run_module("samf.benchmarks", run_name="__main__", alter_sys=True)
